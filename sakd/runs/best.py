"""A run's best epoch so far: whose weights may be kept, and after which training may stop early."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sakd.names import HEADLINE, VALIDATION
from sakd.runs.stored import Metrics


@dataclass
class BestEpoch:
    """The first epoch with the highest accuracy ``by`` validation, or else test images."""

    by: str
    epoch: int = 0
    accuracy: float = -1.0  # percent
    test_accuracy: float | None = None  # beside it

    @classmethod
    def of(cls, validates: bool, metrics: list[Metrics]) -> "BestEpoch":
        """The best of the epochs so far, of a run with validation images or without."""
        best = cls(VALIDATION if validates else HEADLINE)
        for measured in metrics:
            best.is_raised_by(measured)
        return best

    def is_raised_by(self, measured: Metrics) -> bool:
        """Take in an epoch; True if it is the best now. A pretraining's never is."""
        if measured.get(self.by, -1.0) <= self.accuracy:
            return False
        self.epoch, self.accuracy = int(measured["epoch"]), measured[self.by]
        self.test_accuracy = measured.get(HEADLINE)
        return True


@dataclass(frozen=True)
class BestWeights:
    """Weights of the best epoch, and what is to be said of them in a result."""

    epoch: BestEpoch
    weights: Mapping[str, Tensor]

    def about(self) -> dict[str, Any]:
        return {"epoch": self.epoch.epoch, "by": self.epoch.by, "accuracy": self.epoch.test_accuracy}
