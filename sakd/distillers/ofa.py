"""OFA: exits at the student's stages learn the teacher's logits.

Hao, Guo, Han, Tang, Hu, Wang, Xu, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in
Knowledge Distillation", NeurIPS 2023.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from sakd.distillers.base import Distiller, Features, at_least_float32, kept_mean, targets
from sakd.errors import ConfigError, check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive
from sakd.spots import Spot


def target_enhanced(
    student: Tensor, teacher: Tensor, is_target: Tensor, temperature: float, exponent: float
) -> Tensor:
    """Cross-entropy to the teacher's probabilities, in which the target's own counts for more: [B].

    They are raised to ``exponent``, the target's by one more and less one again: with exponent 1 that is the
    teacher's distribution as it is. ``student``, ``teacher``: logits [B, classes]; ``is_target``: the same,
    True once a row.
    """
    p_t = (teacher / temperature).softmax(dim=1)
    shares = (p_t + is_target).pow(exponent) - is_target.to(p_t)
    return -(shares * (student / temperature).log_softmax(dim=1)).sum(dim=1)


def halving(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two convolutions, depth by depth and 1x1, each with batch norm and ReLU; the first halves the map."""
    layers: list[nn.Module] = []
    for stride, channels in ((2, channels_in), (1, channels_out)):
        layers += [
            nn.Conv2d(channels_in, channels_in, 3, stride, padding=1, groups=channels_in, bias=False),
            nn.Conv2d(channels_in, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def exit_of(channels: int, halvings: int, width: int, classes: int) -> nn.Sequential:
    """Layers from a map to logits: halvings that double the channels, the last to ``width``; then pooling.

    With no halvings it is a 1x1 convolution.
    """
    widths = [channels * 2**number for number in range(halvings)] + [width]
    layers = [halving(*pair) for pair in pairwise(widths)]
    exit_layers = nn.Sequential(
        *(layers or [nn.Conv2d(channels, width, 1)]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(width, classes),
    )
    for module in exit_layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return exit_layers


class OFA(Distiller):
    """Cross-entropy to the teacher's logits, of exits behind the student's stages and of its own logits.

    An exit's layers learn beside the student. The target's probability is enhanced: raised by one before, and
    lowered by one after, all are raised to ``exponent``.

    Each spot's mask takes rows out of its own exit's loss; exits, with their batch norms, see the whole
    batch. Of the teacher's stage at a spot nothing is used: everywhere its logits teach. A student stage
    beyond the teacher's depth has no exit. Stages of tokens have exits as maps have (the published code gives
    them transformer blocks).

    Raises ConfigError for a vector that is not the logits.
    """

    uses_labels = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        temperature: Positive,
        exponent: Positive,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("temperature of OFA", temperature, least=0, above=True)
        check_number("exponent of OFA", exponent, least=0, above=True)
        self.temperature, self.exponent = temperature, exponent
        width = max(network.shapes["embedding"][0] for network in (student, teacher))
        last = student.index(student.maps[-1])
        self.exits = nn.ModuleDict()
        for spot in self.spots:
            if (spot.student, spot.teacher) == ("logits", "logits"):
                self.exits[spot.name] = nn.Identity()
            elif len(spot.student_shape) == 3:
                halvings = last - student.index(spot.student)
                self.exits[spot.name] = exit_of(spot.student_shape[0], halvings, width, student.classes)
            else:
                raise ConfigError(f"where={where}: found {spot.name}, OFA takes maps and the logits")

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        teacher = at_least_float32(teacher_features["logits"])
        is_target = targets(self.labels[indices], teacher)
        losses = []
        for spot in self.spots:
            logits = self.exits[spot.name](at_least_float32(student_features[spot.student]))
            rows = target_enhanced(logits, teacher, is_target, self.temperature, self.exponent)
            losses.append(kept_mean(rows, keep[spot]))
        return torch.stack(losses).sum()
