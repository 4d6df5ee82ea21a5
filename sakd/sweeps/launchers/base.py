"""What a launcher is: it hands the jobs of a submission over, and knows what has become of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from sakd.configuration.fits import check_keys
from sakd.errors import ConfigError
from sakd.imports import find
from sakd.sweeps.plan import Plan
from sakd.sweeps.submissions import Place, Submission


@dataclass(frozen=True)
class Queued:
    """A job that is not over."""

    state: Literal["waiting", "running", "ending"]  # ending: over, or on its way back into the queue
    id: str | None = None  # by which it can be cancelled, where it has one
    reason: str | None = None  # why it waits


Queue = Mapping[Place, Queued]


class Launcher(ABC):
    """A way to hand jobs over, made from the keys of a file under conf/hydra/launcher with its
    ``_target_``."""

    Settings: ClassVar[type]  # a dataclass, with a field for each key

    def __init__(self, **keys: Any):
        """Raises ConfigError naming the key at fault."""
        check_keys(keys, self.Settings, "hydra.launcher")
        self.settings = self.Settings(**keys)

    @property
    @abstractmethod
    def waits(self) -> bool:
        """True if a launch is over only once its runs are."""

    @abstractmethod
    def check(self, planned: Plan) -> None:
        """Raise a SakdError for what would go wrong with these runs, before anything is submitted."""

    @abstractmethod
    def largest_array(self) -> int | None:
        """The most jobs that may be submitted together; None: any number."""

    @abstractmethod
    def submit(self, submission: Submission, under_way: Mapping[str, str]) -> None:
        """Hand over all of its jobs or, where that is refused or interrupted, none.

        ``under_way``: by run, the ids of jobs that were submitted before. A job begins once those that all of
        its runs need have ended well, and those that some of its runs need have ended.
        """

    @abstractmethod
    def carry_out(self, submission: Submission) -> None:
        """Do what is left to this process of a submission: nothing where others run its jobs."""

    @abstractmethod
    def queue(self, submissions: Sequence[Submission]) -> Queue:
        """Find those of their jobs that are not over. Raises a SakdError where that cannot be known."""

    @abstractmethod
    def cancel(self, ids: Iterable[str]) -> None:
        """End these jobs, whose runs are noted as cancelled, where their own look at that would be late."""

    @abstractmethod
    def logs(self, submission: Submission) -> dict[Place, Path]:
        """Find the logs of those jobs that have said anything."""


def launcher_class(target: str) -> type | None:
    """The class that a ``_target_`` names; None where there is none."""
    try:
        return find(str(target))
    except ImportError:
        return None


def is_launcher(target: str) -> bool:
    """Tell whether a ``_target_`` takes whole sweeps, and not cells one by one as Hydra's launchers do."""
    found = launcher_class(target)
    return isinstance(found, type) and issubclass(found, Launcher)


def launcher_of(keys: Mapping[str, Any]) -> Launcher:
    """Build a launcher. Raises ConfigError naming the key at fault, or where it is none of whole sweeps."""
    target = keys["_target_"]
    if not is_launcher(target):
        raise ConfigError(f"hydra/launcher: found {target}, expected slurm or local")
    return launcher_class(target)(**{key: value for key, value in keys.items() if key != "_target_"})
