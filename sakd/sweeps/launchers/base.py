"""What a launcher is: it hands the jobs of a submission over, and knows what has become of them."""

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from sakd.errors import ConfigError, check_number, did_you_mean
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
        names = [field.name for field in dataclasses.fields(self.Settings)]
        for key in keys:
            if key not in names:
                raise ConfigError(
                    f"hydra.launcher.{key}: no such key; expected one of {', '.join(names)}."
                    f"{did_you_mean(key, names)}"
                )
        for name in names:
            if name not in keys:
                raise ConfigError(f"hydra.launcher.{name}: found nothing, expected the key with its value")
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
    module, _, name = str(target).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
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


def check_whole(key: str, value: object, least: int, optional: bool = False) -> None:
    """Raise ConfigError unless ``value``, of ``hydra.launcher.key``, is whole and at least ``least``."""
    if not (optional and value is None):
        check_number(f"hydra.launcher.{key}", value, least, whole=True)


def check_kind(key: str, value: object, kind: type, expected: str, optional: bool = False) -> None:
    """Raise ConfigError unless ``value``, of ``hydra.launcher.key``, is of this ``kind``."""
    if not isinstance(value, kind) and not (optional and value is None):
        expected += " or null" if optional else ""
        raise ConfigError(f"hydra.launcher.{key}: found {value!r}, expected {expected}")
