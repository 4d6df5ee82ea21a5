"""What is looked at: a run's record of what its spot mode decided, with its name and its configuration."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from sakd.configuration import Config, short_names
from sakd.errors import ConfigError


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


def keeps_all(record: Record) -> bool:
    """True if every sample was distilled at every spot in every epoch, so that there is nothing to see."""
    return all(record.kept_of(spot).all() for spot in record.spots)


@dataclass(frozen=True)
class SomeEpochs:
    """A record of which only ``some`` epochs, bool [E], are looked at."""

    whole: Record
    some: np.ndarray

    @property
    def epochs(self) -> np.ndarray:
        return self.whole.epochs[self.some]

    @property
    def spots(self) -> list[str]:
        return self.whole.spots

    @property
    def indices(self) -> np.ndarray:
        return self.whole.indices

    @property
    def labels(self) -> np.ndarray:
        return self.whole.labels

    def kept_of(self, spot: str) -> np.ndarray:
        return self.whole.kept_of(spot)[self.some]

    def of(self, split: str) -> Seen | None:
        return self.whole.of(split)


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
    def is_finished(self) -> bool:
        return self.data_sha256 is not None

    @property
    def progress(self) -> str:
        """Which epochs there are: ``"240 epochs"``, ``"3 epochs so far, of 240"``, or of a finished run whose
        record was off for some ``"3 epochs recorded, of 240"``."""
        epochs, all_of_them = self.record.epochs, self.config["epochs"]
        if isinstance(self.record, SomeEpochs):
            told = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
            return f"{told} of {all_of_them:,}"
        told = "1 epoch" if len(epochs) == 1 else f"{len(epochs):,} epochs"
        if not self.is_finished:
            return f"{told} so far, of {all_of_them:,}"
        done = all_of_them if self.config.get("early_stop") is None else int(epochs[-1])
        return told if len(epochs) == done else f"{told} recorded, of {all_of_them:,}"

    def within(self, first: int, last: int) -> "Recorded":
        """The run with what it decided in the epochs from ``first`` to ``last`` alone.

        Raises ConfigError if it has none of them.
        """
        epochs = self.record.epochs
        some = (epochs >= first) & (epochs <= last)
        if not some.any():
            raise ConfigError(
                f"--epochs: found {first}-{last}, expected some of {epochs[0]} to {epochs[-1]}, which "
                f"{self.name} has"
            )
        return replace(self, record=SomeEpochs(self.record, some))
