"""The checks, in their order, and what they are asked about.

A check returns a state and one line; what the user can mend it may raise, too, as everywhere.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sakd.configuration import Config, build
from sakd.credentials import hidden
from sakd.doctor import folder, machine
from sakd.errors import in_one_line
from sakd.runs.tracking import check_store
from sakd.sweeps.launchers import SlurmLauncher, is_launcher, launcher_of
from sakd.sweeps.launchers.trial import canary, check_jobs
from sakd.terminal import counting

State = Literal["ok", "warn", "fail"]  # warn: runs can do with it
Told = tuple[State, str]


@dataclass(frozen=True)
class Asked:
    """What is to be possible: a run, how it is launched, and whether a job of SLURM is to try it.

    ``overrides``: those of the command line, which that job examines, too.
    """

    config: Config
    launcher: Mapping[str, object]
    overrides: tuple[str, ...] = ()
    canary: bool = False


@dataclass(frozen=True)
class Finding:
    """What a check found; ``told`` is one line."""

    name: str
    state: State
    told: str


def examine(asked: Asked, only: Collection[str] = ()) -> Iterator[Finding]:
    """Carry out all checks, or ``only`` those of these names; each finding once it is known."""
    for name, check in CHECKS.items():
        if not only or name in only:
            try:
                state, told = check(asked)
            except Exception as error:  # a driver's or a package's, too: to find these is the task
                state, told = "fail", in_one_line(error)
            yield Finding(name, state, hidden(told))


def _data(asked: Asked) -> Told:
    """Read the data set as a run does, every file of it once; nothing is fetched."""
    node = asked.config["dataset"]
    config = asked.config | {"dataset": node | ({"download": False} if "download" in node else {})}
    dataset = build.dataset(config)
    dataset.ready(Path(config["runs"]) / ".checked_images", counting)
    images = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    return "ok", f"{node['name']}: {images}, {dataset.classes} classes"


def _store(asked: Asked) -> Told:
    uri = asked.config["tracking"].get("uri")
    return "ok", "tracking=none" if uri is None else check_store(uri)


def _runs(asked: Asked) -> Told:
    return folder.check_folder(Path(asked.config["runs"]))


def _slurm(asked: Asked) -> Told:
    """Ask SLURM, where jobs are to go there, and with ``canary`` let one examine its node."""
    launcher = launcher_of(dict(asked.launcher)) if is_launcher(asked.launcher.get("_target_")) else None
    if not isinstance(launcher, SlurmLauncher):
        return "ok", "not asked; hydra/launcher=slurm asks it, --slurm sends a job"
    told = check_jobs(launcher.settings)
    if asked.canary:
        told += f"; {canary(launcher.settings, asked.overrides, Path(asked.config['runs']))}"
    return "ok", told


CHECKS: dict[str, Callable[[Asked], Told]] = {
    "python": lambda _: machine.check_python(),
    "packages": lambda _: machine.check_packages(),
    "torch": lambda _: machine.check_torch(),
    "cuda": lambda asked: machine.check_cuda(asked.config["device"]),
    "data": _data,
    "store": _store,
    "runs": _runs,
    "slurm": _slurm,
}
