"""Why what a finished run has done is not gone on with: another number of epochs is another run."""

import glob
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from sakd import names
from sakd.configuration import Config, flatten, identity, read_config, short_names
from sakd.configuration.prerequisites import teacher_of
from sakd.errors import SakdError
from sakd.runs.run import Run

log = logging.getLogger("sakd")

TEACHERS = "teacher.training.epochs"
# Keys that say how long training lasts, and what is computed from that.
LENGTH = re.compile(r"(teacher\.training\.)?(epochs|schedule\.\w+)")


def tell_what_is_trained_anew(runs: Iterable[Run]) -> None:
    """Say in one line where a run that begins has a finished twin of another number of epochs.

    Of runs to which the same happens it is said once.
    """
    for run in runs:
        if run.folder.exists():
            continue
        for twin in _finished_alike(run.config):
            other = read_config(twin)
            differing = _differing(run.config, other)
            if "epochs" in differing and all(map(LENGTH.fullmatch, differing)):
                told = _told(run.config, other, differing)
                found = f"epochs: found {run.config['epochs']}, and {twin} is finished with {other['epochs']}"
                log.info("%s; %s", found, told, extra={"news": ("epochs", told)})
                break


def _finished_alike(config: Config) -> Iterator[Path]:
    """Folders of finished runs that are called as this one."""
    *parts, seed = short_names(config).values()
    beginning = glob.escape(names.folder(*parts, f"seed{seed}"))
    for path in sorted(Path(config["runs"]).glob(f"{beginning}-*/result.json")):
        with suppress(SakdError):  # what is damaged is told where it is asked for
            read_config(path.parent)
            yield path.parent


def _differing(config: Config, other: Config) -> list[str]:
    """Keys of the identity with other values; none where the other's cannot be told any more."""
    try:
        own, others = (dict(flatten(identity(each))) for each in (config, other))
    except (AttributeError, KeyError, TypeError, OSError):
        return []
    return [key for key in {**own, **others} if own.get(key) != others.get(key)]


def _told(config: Config, other: Config, differing: list[str]) -> str:
    schedules = [key for key in differing if key.startswith("schedule.")]
    follows = [] if "schedule._target_" in schedules else schedules
    why = f", as {', '.join(follows)} {'follows' if len(follows) == 1 else 'follow'} it" if follows else ""
    told = f"another number is another run, trained from its start{why}"
    if TEACHERS in differing and not (Run(teacher_of(config)).folder / "result.json").exists():
        held = other["teacher"]["training"]["epochs"]
        told += f". So is its teacher, as {TEACHERS} follows epochs: {TEACHERS}={held} keeps the one there is"
    return told
