"""Contrastive representation distillation.

Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.
"""

from collections.abc import Callable, Sequence
from math import log, sqrt
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.base import Distiller, is_kept, kept_mean
from sakd.errors import ConfigError, check_number
from sakd.networks import StagedNet
from sakd.ranges import BelowOne, NotNegative, Positive, Width
from sakd.spots import Spot

PRODUCTS = 2**24  # the most inner products held at once


def inner_products(anchors: Tensor, bank: Tensor, samples: Tensor) -> Tensor:
    """Inner products [B, K] of each anchor [B, d] with its own samples [B, K] of a bank [n, d].

    They are picked from products with the whole bank, some anchors at a time: never a tensor of B x K x d.
    """
    rows = max(PRODUCTS // len(bank), 1)
    parts = zip(anchors.split(rows), samples.split(rows), strict=True)
    return torch.cat([(part @ bank.T).gather(1, own) for part, own in parts])


def noise_contrastive_losses(scores: Tensor, log_z: Tensor, n: int) -> Tensor:
    """Loss of each row of scores [B, 1 + K], the positive's first: [B].

    It is a logistic regression: the model's probability exp(score) / Z of a sample, against K draws of noise
    with 1 / n each.
    """
    logits = scores - log_z - log((scores.shape[1] - 1) / n)
    return -F.logsigmoid(-logits).sum(dim=1) - logits[:, 0]


def differentiated(loss_of: Callable[[Tensor], Tensor], anchors: Tensor) -> Tensor:
    """The scalar ``loss_of(anchors)`` with its gradient taken at once.

    What it reads may be overwritten before backward.
    """
    leaf = anchors.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach() + ((anchors - anchors.detach()) * gradient).sum()


class Bank(nn.Module):
    """One network's embeddings [n, d] of all training samples, and their constant Z.

    With an anchor's score, exp(score) / Z is the model's probability of a sample.
    """

    def __init__(self, samples: int, width: int, temperature: float, momentum: float):
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        bound = sqrt(3 / width)  # so that the expected squared length is 1
        self.register_buffer("embeddings", torch.empty(samples, width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(()))
        self.register_buffer("z_is_fixed", torch.zeros((), dtype=torch.bool))

    def contrast(self, anchors: Tensor, samples: Tensor, keep: Tensor) -> Tensor:
        """Mean loss of the kept anchors [B, d], times n_kept / B.

        ``samples``: [B, 1 + K] for each, the positive first. The first call that keeps a row fixes Z.
        """

        def loss(anchors: Tensor) -> Tensor:
            scores = inner_products(anchors / self.temperature, self.embeddings, samples)
            self._fix_z(scores.detach(), is_kept(keep))
            return kept_mean(noise_contrastive_losses(scores, self.log_z, len(self.embeddings)), keep)

        return differentiated(loss, anchors)

    def _fix_z(self, scores: Tensor, keep: Tensor) -> None:
        """Set Z to n times the mean of exp(scores) over the first batch's kept rows, if it has any."""
        total = torch.where(keep, scores.logsumexp(dim=1), -torch.inf).logsumexp(dim=0)
        log_z = total - keep.sum().to(total).log() - log(scores.shape[1] / len(self.embeddings))
        self.log_z.copy_(torch.where(keep.any() & ~self.z_is_fixed, log_z, self.log_z))
        self.z_is_fixed.logical_or_(keep.any())

    def update(self, indices: Tensor, embeddings: Tensor, keep: Tensor) -> None:
        """Move the kept samples' entries towards their new embeddings [B, d], in place.

        No index may be there twice.
        """
        old = self.embeddings[indices]
        new = F.normalize(self.momentum * old + (1 - self.momentum) * embeddings.detach(), dim=1)
        self.embeddings.index_copy_(0, indices, torch.where(keep[:, None], new, old))


class CRD(Distiller):
    """Loss by which a network's embedding of a sample must tell it from samples of other classes.

    Those are in the other network's bank. The embeddings are linear and learned, for both networks. Banks
    change at the kept rows alone, whatever their weight.
    """

    takes = "vector"
    uses_labels = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        embedding_width: Width,
        negatives: Annotated[int, Ge(1), Le(2**20)],
        temperature: Positive,
        momentum: BelowOne,
    ):
        super().__init__(student, teacher, where, weight)
        for key, count in (("embedding_width", embedding_width), ("negatives", negatives)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ConfigError(f"{key} of CRD: found {count!r}, expected a whole number of at least 1")
        check_number("temperature of CRD", temperature, least=0, above=True)
        check_number("momentum of CRD", momentum, least=0)
        if momentum >= 1:
            raise ConfigError(f"momentum of CRD: found {momentum!r}, expected a number from 0 to below 1")
        self.embedding_width, self.negatives = embedding_width, negatives
        self.temperature, self.momentum = temperature, momentum
        widths = {spot.name: (spot.student_shape[0], spot.teacher_shape[0]) for spot in self.spots}
        self.embed_student = nn.ModuleDict(
            {name: nn.Linear(s, embedding_width) for name, (s, _) in widths.items()}
        )
        self.embed_teacher = nn.ModuleDict(
            {name: nn.Linear(t, embedding_width) for name, (_, t) in widths.items()}
        )

    def prepare(self, labels: Tensor, classes: int, stream: torch.Generator) -> None:
        super().prepare(labels, classes, stream)
        labels = labels.cpu()  # once, and what is found there is moved
        sizes = labels.bincount(minlength=classes)
        if sizes.max() == len(labels):
            raise ConfigError(
                f"CRD contrasts samples of different classes: found {len(labels)} training samples, all of "
                f"class {int(labels[0])}; expected at least two classes"
            )
        # Samples sorted by class, twice over: from the end of a class's block on, the next n - size are all
        # the others.
        self.register_buffer("by_class", labels.argsort(stable=True).repeat(2), persistent=False)
        self.register_buffer("block_end", sizes.cumsum(0), persistent=False)
        self.register_buffer("others", len(labels) - sizes, persistent=False)
        self.student_banks, self.teacher_banks = self._banks(), self._banks()

    def _banks(self) -> nn.ModuleDict:
        arguments = len(self.labels), self.embedding_width, self.temperature, self.momentum
        like = next(self.parameters())  # drawn on the CPU: the same on every device
        return nn.ModuleDict({spot.name: Bank(*arguments).to(like) for spot in self.spots})

    def draw_negatives(self, indices: Tensor) -> Tensor:
        """Samples of other classes than each of ``indices`` [B], uniform and independent: [B, negatives]."""
        labels = self.labels[indices, None]
        shape = len(indices), self.negatives
        # The range is so wide that remainders are uniform to n / 2^62.
        draws = torch.randint(2**62, shape, generator=self.stream, device=labels.device) % self.others[labels]
        return self.by_class[self.block_end[labels] + draws]

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        student_bank, teacher_bank = self.student_banks[spot.name], self.teacher_banks[spot.name]
        samples = torch.cat([indices[:, None], self.draw_negatives(indices)], dim=1)
        # Similarities are divided by a small temperature, and banks accumulate: both need all their digits.
        with torch.autocast(student.device.type, enabled=False):
            s = F.normalize(self.embed_student[spot.name](student), dim=1)
            t = F.normalize(self.embed_teacher[spot.name](teacher), dim=1)
            loss = teacher_bank.contrast(s, samples, keep) + student_bank.contrast(t, samples, keep)
            student_bank.update(indices, s, is_kept(keep))
            teacher_bank.update(indices, t, is_kept(keep))
        return loss
