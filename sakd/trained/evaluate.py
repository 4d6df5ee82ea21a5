"""How good a trained network is on a part of a data set, and how far it agrees with its teacher."""

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.data import Images
from sakd.decisions.text import page
from sakd.process import tf32
from sakd.trained.images import batches

BINS = 15  # of confidence, of equal width
TOP = 5


@dataclass(frozen=True)
class OfClass:
    """What became of a class's images: all but ``images`` in percent."""

    label: int
    images: int
    accuracy: float  # also called recall
    precision: float | None  # None where nothing was taken for it
    confidence: float  # mean, of what it was taken for
    most_taken_for: int | None  # of the mistakes, the most frequent; None without any


@dataclass(frozen=True)
class Evaluated:
    """Measurements of a network on images; percent but for ``loss``, the mean cross-entropy.

    ``top5``: None for five classes and less. ``calibration_error``: the expected one (Guo et al., ICML 2017),
    over ``bins`` of equal width of the largest probability. ``agreement``: images that the teacher takes for
    the same class, None without one; ``teacher_accuracy`` beside it.
    """

    images: int
    top1: float
    top5: float | None
    loss: float
    calibration_error: float
    bins: int
    agreement: float | None
    teacher_accuracy: float | None
    classes: list[OfClass]


@torch.no_grad()
def evaluate(
    module: nn.Module, images: Images, device: torch.device, teacher: nn.Module | None = None
) -> Evaluated:
    """Measure a module in eval, in float32; it takes images as they are stored, and gives logits."""
    module = module.to(device)
    teacher = None if teacher is None else teacher.to(device)
    columns: dict[str, list[Tensor]] = {}
    classes = 0
    with tf32(False):
        for pixels, labels in batches(images, device):
            logits = module(pixels).float()
            classes = logits.shape[1]
            measured = _of_batch(logits, labels)
            if teacher is not None:
                measured["teacher"] = teacher(pixels).argmax(1)
            for name, values in measured.items():
                columns.setdefault(name, []).append(values.cpu())
    return _summed_up({name: torch.cat(values) for name, values in columns.items()}, classes)


def _of_batch(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of each sample, [B]: its label, what it is taken for and how surely, whether it is among the first, its
    loss."""
    confidence, taken_for = logits.softmax(1).max(1)
    first = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    return {
        "label": labels,
        "taken_for": taken_for,
        "confidence": confidence,
        "in_first": (first == labels[:, None]).any(1),
        "loss": F.cross_entropy(logits, labels, reduction="none"),
    }


def _summed_up(columns: dict[str, Tensor], classes: int) -> Evaluated:
    labels, taken_for = columns["label"], columns["taken_for"]
    correct = taken_for == labels
    teacher = columns.get("teacher")
    return Evaluated(
        images=len(labels),
        top1=_percent(correct),
        top5=_percent(columns["in_first"]) if classes > TOP else None,
        loss=columns["loss"].double().mean().item(),
        calibration_error=100 * calibration_error(columns["confidence"], correct),
        bins=BINS,
        agreement=None if teacher is None else _percent(teacher == taken_for),
        teacher_accuracy=None if teacher is None else _percent(teacher == labels),
        classes=[_of_class(label, columns) for label in range(classes) if (labels == label).any()],
    )


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Mean over samples of how far, in a sample's bin, accuracy is from mean confidence, a share.

    ``confidence``: the largest probability, [N]; ``correct``: bool [N]. Guo et al. (2017), "On Calibration of
    Modern Neural Networks", ICML, equation 3; bins are of equal width, closed on their right.
    """
    place = ((confidence.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, place, correct.double() - confidence.double())
    return gap.abs().sum().item() / len(correct)


def _of_class(label: int, columns: dict[str, Tensor]) -> OfClass:
    taken_for = columns["taken_for"]
    own, taken = columns["label"] == label, taken_for == label
    mistakes = taken_for[own & ~taken]
    return OfClass(
        label,
        int(own.sum()),
        _percent(taken[own]),
        _percent(own[taken]) if taken.any() else None,
        100 * columns["confidence"][own].double().mean().item(),
        int(mistakes.bincount().argmax()) if len(mistakes) else None,
    )


def _percent(which: Tensor) -> float:
    return 100 * int(which.sum()) / len(which)


def as_text(name: str, about: str, found: Evaluated) -> str:
    """What was measured, and a line for each class. ``about``: which images of what."""
    told = [f"{name} on {found.images:,} images, {about}", f"top-1 {found.top1:.2f} %"]
    if found.top5 is not None:
        told.append(f"top-5 {found.top5:.2f} %")
    told.append(f"loss {found.loss:.4f}")
    told.append(
        f"expected calibration error {found.calibration_error:.2f} % ({found.bins} bins of equal width)"
    )
    if found.agreement is not None:
        told.append(
            f"agrees with its teacher, which has {found.teacher_accuracy:.2f} %, on {found.agreement:.2f} %"
        )
    table = [["class", "images", "accuracy", "precision", "confidence", "most taken for"]]
    for one in found.classes:
        precision = "-" if one.precision is None else f"{one.precision:.2f}"
        confused = "-" if one.most_taken_for is None else str(one.most_taken_for)
        figures = (f"{one.accuracy:.2f}", precision, f"{one.confidence:.2f}")
        table.append([str(one.label), str(one.images), *figures, confused])
    return page(["\n".join(told), table])


def as_json(name: str, about: str, found: Evaluated) -> str:
    return json.dumps({"network": name, "on": about} | asdict(found), indent=2, allow_nan=False) + "\n"


FORMATS = {"terminal": as_text, "json": as_json}
