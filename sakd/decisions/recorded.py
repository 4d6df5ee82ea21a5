"""What is looked at: a run's record of what its spot mode decided, with its name and its configuration."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sakd.configuration import Config, short_names


class Seen(Protocol):
    """Images of one split after the last epoch, as evaluation sees them, without augmentation and noise.

    ``indices``, ``labels``: int64 [M]; ``probability`` of the teacher, float32, and whether the mode would
    have it ``kept``, bool: [M, spots], None for modes that do not learn; ``…_confidence``: the largest
    probability of a class, float32 [M]; ``…_right``: bool [M]; ``student_loss``: cross-entropy, float32 [M].
    """

    indices: np.ndarray
    labels: np.ndarray
    probability: np.ndarray | None
    kept: np.ndarray | None
    student_confidence: np.ndarray
    teacher_confidence: np.ndarray
    student_right: np.ndarray
    teacher_right: np.ndarray
    student_loss: np.ndarray


class Record(Protocol):
    """Which training samples were distilled, at each spot in each epoch.

    ``epochs``: their numbers, int32 [E]; ``spots``: names; ``indices``, ``labels`` of the samples: int64 [N].
    """

    epochs: np.ndarray
    spots: list[str]
    indices: np.ndarray
    labels: np.ndarray

    def kept_of(self, spot: str) -> np.ndarray:
        """Decisions, bool [E, N], at one spot."""

    def of(self, split: str) -> Seen | None:
        """What was seen of the ``train`` or ``test`` images after the last epoch; None before."""


@dataclass(frozen=True)
class Recorded:
    """A run whose decisions are looked at.

    ``data_sha256``: the checksum of its images, None while it is not finished.
    """

    name: str
    config: Config
    record: Record
    data_sha256: str | None = None

    @property
    def names(self) -> dict[str, str]:
        return short_names(self.config)

    @property
    def progress(self) -> str:
        """How many epochs there are: ``"240 epochs"``, or ``"3 epochs so far, of 240"``."""
        done, all_of_them = len(self.record.epochs), self.config["epochs"]
        told = "1 epoch" if done == 1 else f"{done:,} epochs"
        unfinished = self.record.epochs[-1] < all_of_them or self.record.of("train") is None
        return f"{told} so far, of {all_of_them:,}" if unfinished else told
