"""Contrastive representation distillation (Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020)."""

from collections.abc import Callable, Sequence
from math import log, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.base import Distiller, kept_mean
from sakd.errors import ConfigError, check_number
from sakd.networks import StagedNet
from sakd.spots import Spot

PRODUCTS = 2**24  # the most inner products held at once


def similarities(anchors: Tensor, bank: Tensor, samples: Tensor) -> Tensor:
    """Inner products [B, K] of each anchor [B, d] with its own samples [B, K] of a bank [n, d].

    Picked from products with the whole bank, some anchors at a time: never a tensor of B x K x d.
    """
    rows = max(PRODUCTS // len(bank), 1)
    parts = zip(anchors.split(rows), samples.split(rows), strict=True)
    return torch.cat([(part @ bank.T).gather(1, own) for part, own in parts])


def differentiated(loss_of: Callable[[Tensor], Tensor], anchors: Tensor) -> Tensor:
    """The scalar ``loss_of(anchors)`` with its gradient taken at once: what it reads may be overwritten before backward."""
    leaf = anchors.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach() + ((anchors - anchors.detach()) * gradient).sum()


class Bank(nn.Module):
    """One network's embeddings [n, d] of all training samples, and the normalising constant Z of what is compared with them."""

    def __init__(self, samples: int, width: int):
        super().__init__()
        bound = sqrt(3 / width)  # the expected squared length is 1
        self.register_buffer("embeddings", torch.empty(samples, width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(()))
        self.register_buffer("z_is_fixed", torch.zeros((), dtype=torch.bool))

    def contrast(self, anchors: Tensor, samples: Tensor, keep: Tensor, temperature: float) -> Tensor:
        """n_kept / B times the mean loss of kept anchors [B, d], of which samples [B, 1 + K] the first is the positive.

        The first call that keeps a row fixes Z. Noise-contrastive estimation is a logistic regression between the positive and
        K draws of noise, whose probability is 1 / n each.
        """
        scores = similarities(anchors, self.embeddings, samples) / temperature
        self._fix_z(scores.detach(), keep)
        logits = scores - self.log_z - log((samples.shape[1] - 1) / len(self.embeddings))
        return kept_mean(F.softplus(logits).sum(dim=1) - logits[:, 0], keep)

    def _fix_z(self, scores: Tensor, keep: Tensor) -> None:
        """n times the mean of exp(scores) over the kept rows; only rows kept count, so that it waits for one."""
        total = torch.where(keep, scores.logsumexp(dim=1), -torch.inf).logsumexp(dim=0)
        log_z = total - (keep.sum() * scores.shape[1] / len(self.embeddings)).log()
        self.log_z.copy_(torch.where(keep.any() & ~self.z_is_fixed, log_z, self.log_z))
        self.z_is_fixed.logical_or_(keep.any())

    def update(self, indices: Tensor, embeddings: Tensor, keep: Tensor, momentum: float) -> None:
        """Move the kept samples' entries towards their new embeddings [B, d]. No index may occur twice."""
        old = self.embeddings[indices]
        new = F.normalize(momentum * old + (1 - momentum) * embeddings.detach(), dim=1)
        self.embeddings.index_copy_(0, indices, torch.where(keep[:, None], new, old))


class CRD(Distiller):
    """A sample's embedding by one network must tell its own entry in the other network's bank from those of other classes.

    Both linear embeddings are learned. Negatives are drawn with replacement, for each sample anew, on the device.
    """

    takes = "vector"

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: float,
        embedding_width: int,
        negatives: int,
        temperature: float,
        momentum: float,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("temperature of CRD", temperature, least=0, above=True)
        self.width, self.negatives, self.temperature, self.momentum = embedding_width, negatives, temperature, momentum
        widths = {spot.name: (spot.student_shape[0], spot.teacher_shape[0]) for spot in self.spots}
        self.embed_student = nn.ModuleDict({name: nn.Linear(s, embedding_width) for name, (s, _) in widths.items()})
        self.embed_teacher = nn.ModuleDict({name: nn.Linear(t, embedding_width) for name, (_, t) in widths.items()})

    def prepare(self, labels: Tensor, classes: int, stream: torch.Generator) -> None:
        super().prepare(labels, classes, stream)
        sizes = labels.bincount(minlength=classes)
        if sizes.max() == len(labels):
            raise ConfigError(
                f"CRD contrasts samples of different classes: found {len(labels)} training samples of class {int(labels[0])} "
                "alone, expected at least two classes"
            )
        # Behind the end of a class's block lie all others': twice in a row, so that they can be counted on from there.
        self.register_buffer("by_class", labels.argsort(stable=True).repeat(2), persistent=False)
        self.register_buffer("block_end", sizes.cumsum(0), persistent=False)
        self.register_buffer("others", len(labels) - sizes, persistent=False)
        like = next(self.parameters())
        self.student_banks, self.teacher_banks = (
            nn.ModuleDict({spot.name: Bank(len(labels), self.width).to(like) for spot in self.spots}) for _ in range(2)
        )

    def draw_negatives(self, indices: Tensor) -> Tensor:
        """For each sample [B] as many of other classes, uniformly and with replacement: [B, negatives]."""
        labels = self.labels[indices, None]
        shape = (len(indices), self.negatives)
        draws = torch.randint(2**62, shape, generator=self.stream, device=labels.device)
        # A remainder of so wide a draw is uniform to one in 2**62 / n.
        return self.by_class[self.block_end[labels] + draws % self.others[labels]]

    def spot_loss(self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor) -> Tensor:
        student_bank, teacher_bank = self.student_banks[spot.name], self.teacher_banks[spot.name]
        samples = torch.cat([indices[:, None], self.draw_negatives(indices)], dim=1)
        with torch.autocast(student.device.type, enabled=False):  # a similarity is divided by the temperature: it needs its digits
            s = F.normalize(self.embed_student[spot.name](student), dim=1)
            t = F.normalize(self.embed_teacher[spot.name](teacher), dim=1)
            by_student = differentiated(lambda anchors: teacher_bank.contrast(anchors, samples, keep, self.temperature), s)
            by_teacher = differentiated(lambda anchors: student_bank.contrast(anchors, samples, keep, self.temperature), t)
            student_bank.update(indices, s, keep, self.momentum)
            teacher_bank.update(indices, t, keep, self.momentum)
        return by_student + by_teacher
