"""What comparisons, lists and reports know of a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from sakd.configuration import NEUTRAL

ABSENT = "None"  # a key that is not there is a key that is null


@dataclass(frozen=True)
class Described:
    """A run by its name, and by ``facts`` that filters choose it by, as ``facts_of`` gives them."""

    name: str
    facts: Mapping[str, str]

    def fact(self, key: str) -> str:
        """The value of a key as text; an absent key is one at its neutral value."""
        return self.facts.get(key, str(NEUTRAL.get(key, ABSENT)))


@dataclass(frozen=True)
class Finished(Described):
    """A finished run; ``metrics`` are the last epoch's."""

    metrics: Mapping[str, float]
    student_sha256: str
    commit: str | None
    cost: Mapping[str, Mapping[str, int | None]]  # of student and teacher; empty where it is not known
