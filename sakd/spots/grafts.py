"""The routed network: student and teacher grafted together, spot by spot and sample by sample."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn

from sakd.errors import ConfigError
from sakd.networks import Shape, StagedNet
from sakd.networks.folded import fold_batch_norm
from sakd.spots.spot import Spot


def adapter(source: Shape, target: Shape) -> nn.Module:
    """A layer from features of one shape to another's.

    Maps get a convolution, batch norm and ReLU, vectors a linear layer. Shapes are of one sample: (C, H, W)
    or (d,). The convolution is 1x1 where sizes agree, 3x3 with stride 2 to halve, a transposed 4x4 with
    stride 2 to double, and otherwise the one that fits.

    Raises ConfigError for a map beside a vector.
    """
    if len(source) != len(target):
        raise ConfigError(f"no adapter between a map and a vector: found {source} and {target}")
    if len(source) == 1:
        return nn.Linear(source[0], target[0])
    (c_in, *size_in), (c_out, *size_out) = source, target
    if size_in == [2 * size for size in size_out]:
        convolution: nn.Module = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
    elif size_out == [2 * size for size in size_in]:
        convolution = nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
    elif all(a >= b for a, b in zip(size_in, size_out, strict=True)):
        kernel = tuple(1 + a - b for a, b in zip(size_in, size_out, strict=True))
        convolution = nn.Conv2d(c_in, c_out, kernel)
    else:
        stride = tuple(max(b // a, 1) for a, b in zip(size_in, size_out, strict=True))
        kernel = tuple(b - s * (a - 1) for a, b, s in zip(size_in, size_out, stride, strict=True))
        convolution = nn.ConvTranspose2d(c_in, c_out, kernel, stride=stride)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def frozen_alias(network: StagedNet, fold: bool = False) -> StagedNet:
    """The same network, always in eval and without gradients of its weights, in the same memory.

    Parameters and buffers are shared: what an optimizer or a training pass changes in place is seen at once.
    Nothing runs to keep the two alike, but where ``fold`` says that batch norm is to be folded into
    convolutions: ``refold`` then takes over what has changed. Move the network to its device first.
    """
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()
    }
    shared |= {id(buffer): buffer for buffer in network.buffers()}
    alias = deepcopy(network, shared).requires_grad_(False).eval()
    if fold:
        fold_batch_norm(alias)
    return alias


class Grafts(nn.Module):
    """Adapters at every feature spot, both ways, and the pass of a batch through the routed network.

    At a feature spot with route a (1: teacher), the teacher's next stage gets (1 - a) H(f_s) + a f_t and the
    student's (1 - a) f_s + a A(f_t), with adapters H to the teacher and A to the student; the logits are
    mixed without adapters (Song et al., IEEE TIP 2022).
    """

    def __init__(self, spots: Sequence[Spot]):
        super().__init__()
        self.spots = tuple(spots)
        features = self.spots[:-1]  # the last spot is the logits: nothing runs after it
        self.to_teacher = nn.ModuleList(adapter(spot.student_shape, spot.teacher_shape) for spot in features)
        self.to_student = nn.ModuleList(adapter(spot.teacher_shape, spot.student_shape) for spot in features)

    def forward(
        self,
        student: StagedNet,
        teacher: StagedNet,
        images: Tensor,
        teacher_features: Mapping[str, Tensor],
        route: Tensor,
    ) -> Tensor:
        """Logits [B, classes] of the routed network.

        ``student`` and ``teacher`` are in eval and take no gradients of weights; ``teacher_features`` come
        from the ordinary pass: up to the first spot nothing depends on the route. ``route``: [B, spots], in
        [0, 1].
        """
        first = self.spots[0]
        with torch.no_grad():  # before the first spot there is nothing to learn
            f_s = student.between(None, first.student)(images)
        f_t = teacher_features[first.teacher]
        for k, (spot, following) in enumerate(pairwise(self.spots)):
            to_teacher = mixed(self.to_teacher[k](f_s), f_t, route[:, k])
            to_student = mixed(f_s, self.to_student[k](f_t), route[:, k])
            f_t = teacher.between(spot.teacher, following.teacher)(to_teacher)
            f_s = student.between(spot.student, following.student)(to_student)
        return mixed(f_s, f_t, route[:, -1])


def mixed(student: Tensor, teacher: Tensor, route: Tensor) -> Tensor:
    """Mix (1 - a) ``student`` + a ``teacher``, [B, …], with a = ``route`` [B].

    At 0 and at 1 it is exactly the one or the other.
    """
    # Networks may be in bfloat16.
    kind = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), route.dtype)
    share = route.reshape(-1, *[1] * (student.dim() - 1)).to(kind)
    return torch.lerp(student.to(kind), teacher.to(kind), share)
