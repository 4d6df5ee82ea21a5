"""A finished run, trained again by the code that it was trained by, and compared with what it stored."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sakd.configuration import Config, prerequisites, read_config, sha256_of
from sakd.errors import CheckpointError, RunError
from sakd.files import explained, read_whole, write_whole
from sakd.networks.checkpoints import read_weights
from sakd.runs import Metrics, Run, read_metrics, read_result
from sakd.runs.code import ROOT

FOLDER = ".reproduced"  # beside the run, with a folder for each that was trained again
DIFF = "code.diff"
ON_A_GPU = 1.0  # percentage points of accuracy: there, numbers differ by rounding
OF_TIME = ("seconds", "time", "images_per_second")  # measurements that are never the same
LEFT = ("last.pt", "mlflow.json", "*.lock", ".model*")  # of a run that is needed first
# What the old code is asked to do; it knows runs by their configurations, as this one does.
SCRIPT = """
import json, sys
from sakd.errors import SakdError
from sakd.process import set_up
set_up()
from sakd.terminal import start_logging
start_logging()
from sakd.runs.job import execute
try:
    with open(sys.argv[1]) as file:
        execute(json.load(file))
except SakdError as error:
    sys.exit(f"error: {error}")
"""


@dataclass(frozen=True)
class Reproduced:
    """A run beside the same, trained again. Accuracies in percent, of the last epoch.

    ``bit_for_bit``: all weights are the same, to the last bit; ``first_different``: the first epoch that
    measured something else, None if all measured the same; ``versions``: of packages that differ, before and
    now.
    """

    folder: Path
    bit_for_bit: bool
    first_different: int | None
    accuracy: tuple[float, float]
    devices: tuple[str, str]
    versions: dict[str, tuple[str, str]]

    @property
    def difference(self) -> float:
        """Of the accuracies, in percentage points."""
        return abs(self.accuracy[1] - self.accuracy[0])

    def holds(self, tolerance: float | None) -> bool:
        """True if it is the same: within ``tolerance`` (percentage points), or by default bit for bit."""
        return self.bit_for_bit if tolerance is None else self.difference <= tolerance


def reproduce(folder: Path) -> Reproduced:
    """Train a finished run again, from its commit and code.diff, in ``.reproduced`` beside it.

    A teacher, or a pretraining, that it found finished is found again, if it is still the same. The same
    command again goes on where it was left. Raises RunError if the run is not finished, its code is not known
    or not at hand, or it cannot be trained by it, CheckpointError for weights that it did not store.
    """
    config, result = read_config(folder), read_result(folder)
    if result is None:
        raise RunError(f"{folder}: found no result.json, expected a finished run")
    if result["student"]["accuracy"] is None:
        raise RunError(f"{folder}: found a pretraining, expected the run of a student or a teacher")
    weights = folder / "student.safetensors"
    if sha256_of(weights) != result["student_sha256"]:
        raise CheckpointError(
            f"{weights}: found other weights than result.json beside it has; it was changed"
        )
    again = folder.resolve().parent / FOLDER / folder.resolve().name
    with explained(again):
        (again / "runs").mkdir(parents=True, exist_ok=True)
    _check_out(folder, result, again / "code")
    own = _again(config, result, again / "runs")
    _bring_what_it_needs(config, result, folder.resolve().parent, again / "runs")
    write_whole(again / "config.json", json.dumps(own, indent=1).encode())
    _train(again)
    return _compared(folder, result, again / "runs" / folder.resolve().name)


def _again(config: Config, result: Mapping[str, Any], runs: Path) -> Config:
    """The same run in another folder, with the threads that it had, and tracked nowhere."""
    own = copy.deepcopy(config)
    own |= {"runs": str(runs), "tracking": {"name": "none"}, "threads": result.get("threads", own["threads"])}
    return own


def _check_out(folder: Path, result: Mapping[str, Any], target: Path) -> None:
    """The run's commit, with what differed from it, at ``target``; whole, or not at all."""
    commit = result["code"]["commit"]
    if commit is None:
        raise RunError(f"{folder}: was trained by code of no commit, which cannot be found again")
    if target.exists():
        return
    difference = read_whole(folder / DIFF)
    if result["code"].get("changed") and difference is None:
        raise RunError(f"{folder / DIFF}: no such file; expected what the code had that its commit has not")
    partial = target.with_name("code.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(partial))
        _git("-C", str(partial), "checkout", "--quiet", "--detach", commit)
        if difference:
            _git("-C", str(partial), "apply", "--whitespace=nowarn", str((folder / DIFF).resolve()))
        os.replace(partial, target)
    except subprocess.CalledProcessError as error:
        told = " ".join(error.stderr.split()) or f"git ended with {error.returncode}"
        raise RunError(
            f"{folder}: commit {commit[:12]} cannot be checked out from {ROOT} ({told:.160}); expected a git "
            "checkout that has it"
        ) from error
    except OSError as error:
        raise RunError(f"{target}: the code cannot be checked out ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "safe.directory=*", *arguments], check=True, capture_output=True, text=True)


def _bring_what_it_needs(config: Config, result: Mapping[str, Any], runs: Path, target: Path) -> None:
    """Copy those runs that it needs first, and that are still what it learned from."""
    needed = prerequisites(config)
    for what, own in (("teacher", needed.teacher), ("pretraining", needed.pretraining)):
        if own is None:
            continue
        name, sha256 = Run(own).name, (result.get(what) or {}).get("sha256")
        stored = read_result(runs / name)
        if stored is not None and stored["student_sha256"] == sha256 and not (target / name).exists():
            with explained(target / name):
                shutil.copytree(runs / name, target / name, ignore=shutil.ignore_patterns(*LEFT))


def _train(again: Path) -> None:
    others = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(again / "code"), *([others] if others else [])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(again / "config.json")], env=environment, check=False
    )
    if done.returncode != 0:
        raise RunError(
            f"{again}: the run could not be trained again (exit code {done.returncode}, see above); expected "
            "a commit whose code runs by this Python and these packages"
        )


def _compared(folder: Path, before: Mapping[str, Any], again: Path) -> Reproduced:
    now = read_result(again)
    if now is None:
        raise RunError(f"{again}: found no result.json, expected the run, trained again")
    weights = read_weights(folder / "student.safetensors"), read_weights(again / "student.safetensors")
    same = weights[0].keys() == weights[1].keys() and all(
        weights[0][name].equal(weights[1][name]) for name in weights[0]
    )
    told = before.get("versions", {}), now["versions"]
    pairs = {name: tuple(each.get(name, "none") for each in told) for name in {**told[0], **told[1]}}
    return Reproduced(
        again,
        same,
        first_different(read_metrics(folder), read_metrics(again)),
        (before["student"]["accuracy"], now["student"]["accuracy"]),
        (before.get("device", "unknown"), now.get("device", "unknown")),
        {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
    )


def first_different(before: list[Metrics], now: list[Metrics]) -> int | None:
    """The first epoch in which something else was measured, but for times; None if there is none."""
    for epoch in range(max(len(before), len(now))):
        lines = [{**lines[epoch]} if epoch < len(lines) else {} for lines in (before, now)]
        kept = [{key: value for key, value in line.items() if key not in OF_TIME} for line in lines]
        if kept[0] != kept[1]:
            return epoch + 1
    return None


def as_text(found: Reproduced, tolerance: float | None) -> str:
    return "".join(f"{line}\n" for line in _lines(found, tolerance))


def _lines(found: Reproduced, tolerance: float | None) -> Iterator[str]:
    before, now = found.accuracy
    expected = "bit for bit" if tolerance is None else f"within {tolerance:g} percentage points"
    held = "reproduced" if found.holds(tolerance) else "not reproduced"
    devices = " and ".join(dict.fromkeys(found.devices))
    yield f"{held}, {expected}: {before:.2f} % before, {now:.2f} % now, on {devices}"
    if found.bit_for_bit:
        yield "all weights are the same, bit for bit"
    else:
        epoch = found.first_different
        told = "no epoch" if epoch is None else f"epoch {epoch} is the first that"
        yield f"weights differ; {told} measured something else"
    for name, (old, new) in found.versions.items():
        yield f"{name}: {old} before, {new} now"
    yield f"trained again: {found.folder}"
