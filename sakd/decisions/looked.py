"""What the spot mode of one run decided: for whom, when, and beside what random would."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sakd.decisions.measures import BesideRandom, Difference, beside_random, class_shares, difference
from sakd.decisions.recorded import Record


@dataclass(frozen=True)
class AtSpot:
    """What was decided at a spot.

    ``shares`` kept of all samples, [epochs]; ``by_class``: of each class in the last epochs, [classes], in
    the order of its labels; ``teacher_right``: the share kept, in the last epoch, among the samples that the
    finished run's teacher gets right, and among the others; ``student_wrong``: so for its student, where it
    is wrong. Both None until the run is finished. ``never``, ``always``: places of the samples that were kept
    in no epoch and in all, int64 [M].
    """

    spot: str
    shares: np.ndarray
    by_class: np.ndarray
    random: BesideRandom
    teacher_right: Difference | None
    student_wrong: Difference | None
    never: np.ndarray
    always: np.ndarray

    @property
    def constant(self) -> str | None:
        """``"always kept"`` or ``"never kept"`` where the spot decides nothing, else None."""
        return {1.0: "always kept", 0.0: "never kept"}.get(self.shares.mean())


def look(record: Record, last: int) -> list[AtSpot]:
    """What was decided at each spot; ``last``: so many epochs count for classes."""
    seen, labels, found = record.of("train"), record.labels, []
    for spot in record.spots:
        kept = record.kept_of(spot)
        found.append(
            AtSpot(
                spot,
                kept.mean(1),
                class_shares(kept[-last:], labels).mean(0),
                beside_random(kept, labels),
                None if seen is None else difference(kept[-1], seen.teacher_right),
                None if seen is None else difference(kept[-1], ~seen.student_right),
                np.flatnonzero(~kept.any(0)),
                np.flatnonzero(kept.all(0)),
            )
        )
    return found


def milestones(epochs: int) -> list[int]:
    """Places of the first epoch, of a quarter, a half and the end of them; each once."""
    return sorted({0, max(epochs // 4 - 1, 0), max(epochs // 2 - 1, 0), epochs - 1})


BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 24  # of a course


def course(shares: Sequence[float]) -> str:
    """Shares over time as bars, from 0 to 1."""
    parts = np.array_split(np.asarray(shares), min(COLUMNS, len(shares)))
    return "".join(BARS[min(int(part.mean() * len(BARS)), len(BARS) - 1)] for part in parts)
