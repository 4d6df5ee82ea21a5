"""Factor transfer.

Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.at import attention_maps, to_common_size
from sakd.distillers.base import Distiller, Features, at_least_float32, kept_mean
from sakd.errors import ConfigError, check_number
from sakd.networks import StagedNet
from sakd.ranges import Factor, NotNegative
from sakd.spots import Spot

SLOPE = 0.1  # of the leaky ReLUs, the published code's


def encoder(channels: int, factors: int, norm: bool) -> nn.Sequential:
    """Three 3x3 convolutions with leaky ReLU from ``channels`` to ``factors``.

    Each has a batch norm where ``norm`` asks for it.
    """
    layers: list[nn.Module] = []
    for before, after in ((channels, channels), (channels, factors), (factors, factors)):
        layers.append(nn.Conv2d(before, after, 3, padding=1))
        if norm:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.LeakyReLU(SLOPE, inplace=True))
    return nn.Sequential(*layers)


def decoder(factors: int, channels: int) -> nn.Sequential:
    """Three transposed 3x3 convolutions with leaky ReLU, from ``factors`` back to ``channels``."""
    layers: list[nn.Module] = []
    for before, after in ((factors, factors), (factors, channels), (channels, channels)):
        layers += [nn.ConvTranspose2d(before, after, 3, padding=1), nn.LeakyReLU(SLOPE, inplace=True)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """A convolutional auto-encoder of a teacher's maps [B, C, H, W].

    Its code are the factors [B, factors, H, W].
    """

    def __init__(self, channels: int, factors: int):
        super().__init__()
        self.encoder = encoder(channels, factors, norm=False)
        self.decoder = decoder(factors, channels)


class FT(Distiller):
    """Mean absolute difference of the factors' attention maps.

    The teacher's factors are by a paraphraser that learned before, the student's by a translator that learns
    beside it. ``factor_share``: the factors' channels, as a share of the teacher's.
    """

    takes = "map"
    pretraining_shared = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        factor_share: Factor,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("factor_share of FT", factor_share, least=0, above=True)
        factors = {spot.name: int(spot.teacher_shape[0] * factor_share) for spot in self.spots}
        if 0 in factors.values():
            raise ConfigError(
                f"factor_share of FT: found {factor_share}, which leaves no channel; expected more"
            )
        # The paraphrasers come first: their initial weights are then the same beside every student.
        self.paraphrasers = nn.ModuleDict(
            {spot.teacher: Paraphraser(spot.teacher_shape[0], factors[spot.name]) for spot in self.spots}
        ).requires_grad_(False)
        self.translators = nn.ModuleDict(
            {spot.name: encoder(spot.student_shape[0], factors[spot.name], norm=True) for spot in self.spots}
        )

    def pretrained(self, student: StagedNet) -> nn.Module:
        return self.paraphrasers

    def pretraining_loss(self, student: StagedNet, images: Tensor, teacher_features: Features) -> Tensor:
        """Mean squared error of the paraphrased maps, summed over the spots."""
        losses = []
        for stage, paraphraser in self.paraphrasers.items():
            maps = at_least_float32(teacher_features[stage])
            losses.append(F.mse_loss(paraphraser.decoder(paraphraser.encoder(maps)), maps))
        return sum(losses)

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        # The translator's batch norms see the whole batch before rows are masked.
        factors = to_common_size(
            self.translators[spot.name](student), self.paraphrasers[spot.teacher].encoder(teacher)
        )
        student_map, teacher_map = (attention_maps(part) for part in factors)
        return kept_mean((student_map - teacher_map).abs().mean(dim=1), keep)
