"""Mixed images: each image of a batch with the one before it, and how much of each label that leaves.

All draws of an epoch are made at its start, from a stream of its own on the CPU: order and crops are those
of an epoch without mixing, and every device and every member of a cohort sees the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta

from sakd.data.batches import Batch
from sakd.streams import drawing_from


class Mixing(NamedTuple):
    """How a batch's images were mixed.

    ``labels``: int64 [B], of the images that were mixed in; ``share``: float32 [], what an image's own label
    still counts, from 0 to 1.
    """

    labels: Tensor
    share: Tensor

    def targets(self, own: Tensor, classes: int) -> Tensor:
        """What each class counts: float32 [B, classes], rows sum to 1. ``own``: int64 [B], the labels."""
        each = torch.arange(classes, device=own.device)
        mixed_in = (self.labels[:, None] == each).float()
        return mixed_in.lerp((own[:, None] == each).float(), self.share)

    def dominant(self, own: Tensor) -> Tensor:
        """The label that counts more, int64 [B]; the own one where both count a half."""
        return torch.where(self.share >= 0.5, own, self.labels)


@dataclass(frozen=True)
class Mix:
    """Which mixing there is: ``mixup`` and ``cutmix`` are the alpha of their Beta distributions, 0 for none.

    With both, each batch gets one of them by a fair draw. Zhang et al., "mixup", ICLR 2018; Yun et al.,
    "CutMix", ICCV 2019.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


Box = tuple[slice, slice]  # rows and columns


def drawn(mix: Mix, steps: int, size: int, seed: int) -> tuple[list[Box | None], list[float]]:
    """What an epoch's batches are mixed by: CutMix's box, None for mixup, and the share of the own label.

    ``size``: of the images, in pixels.
    """
    with drawing_from(seed):  # a Beta distribution takes no generator
        cuts = torch.rand(steps) < (0.5 if mix.mixup and mix.cutmix else float(mix.cutmix > 0))
        alphas = torch.where(cuts, mix.cutmix or 1.0, mix.mixup or 1.0).double()
        shares = Beta(alphas, alphas).sample().tolist()
        centres = torch.rand(steps, 2).tolist()
    boxes = [
        cut_out(share, centre, size) if is_cut else None
        for is_cut, share, centre in zip(cuts.tolist(), shares, centres, strict=True)
    ]
    left = [
        share if box is None else 1 - area(box) / size**2 for box, share in zip(boxes, shares, strict=True)
    ]
    return boxes, left


def cut_out(share: float, centre: Sequence[float], size: int) -> Box:
    """CutMix's box around a centre in [0, 1), of 1 - ``share`` of the area before the edges cut it off."""
    half = int((1 - share) ** 0.5 / 2 * size)
    middles = [int(place * size) for place in centre]
    return tuple(slice(max(middle - half, 0), min(middle + half, size)) for middle in middles)


def area(box: Box) -> int:
    rows, columns = box
    return (rows.stop - rows.start) * (columns.stop - columns.start)


def mixed(
    batches: Iterable[Batch], mix: Mix, steps: int, size: int, seed: int
) -> Iterator[tuple[Batch, Mixing | None]]:
    """An epoch's batches, each image mixed with the one before it by draws of the ``seed``.

    There are so many ``steps``; images are of ``size`` pixels, and are written into. None where there is no
    mixing.
    """
    if not mix:
        yield from ((batch, None) for batch in batches)
        return
    boxes, shares = drawn(mix, steps, size, seed)
    counted = torch.tensor(shares)
    for step, batch in enumerate(batches):
        counted = counted.to(batch.labels.device, non_blocking=True)  # once: nothing waits in later steps
        yield (
            batch._replace(images=mix_images(batch.images, boxes[step], shares[step])),
            Mixing(batch.labels.roll(1), counted[step]),
        )


def mix_images(images: Tensor, box: Box | None, share: float) -> Tensor:
    """Mixup with a ``share`` of each image's own; with a box, CutMix in place. ``images``: [B, C, H, W]."""
    if box is None:
        return images.roll(1, 0).lerp(images, share)
    inside = images[:, :, *box]
    inside.copy_(inside.roll(1, 0))
    return images
