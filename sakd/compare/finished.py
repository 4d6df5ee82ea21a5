"""Finished runs, from their folders or from MLflow: the same either way."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml

from sakd import credentials
from sakd.compare import kept
from sakd.compare.described import ABSENT, Described, Finished
from sakd.configuration import check_choice, parameters, read_config
from sakd.errors import ConfigError, RunError, did_you_mean
from sakd.runs import last_metrics, read_result
from sakd.runs.tracking import finished_runs, sqlite_path

STORES = re.compile(r"[a-z0-9+-]+://|databricks(-uc)?$")

AnyRun = TypeVar("AnyRun", bound=Described)


def read(*sources: str) -> list[Finished]:
    """Read every finished student in folders of runs, in MLflow stores by their URI, or in files of them.

    The name ``mlflow`` is the store that MLFLOW_TRACKING_URI names. Teachers, pretrainings and debugging runs
    are left out, and a run that another source has with the same result. Runs of several sources have no
    facts that are so on one machine alone, as those of a file have none. Raises RunError for what cannot be
    read, ConfigError where all that is finished in a source is left out.
    """
    found: dict[tuple[str, str], Finished] = {}
    for run in (run for source in sources for run in _read(_named(source))):
        known = found.setdefault((run.name, run.student_sha256), run)
        if run.cost and not known.cost:  # a store has none
            found[run.name, run.student_sha256] = run
    if len(sources) > 1:
        found = {key: replace(run, facts=kept.facts_of_anywhere(run)) for key, run in found.items()}
    return sorted(found.values(), key=lambda run: run.name)


def file_of(source: str) -> Path:
    """Where a source lies that is a folder or a file of this machine; of a server a path that nothing has."""
    named = _named(source)
    return sqlite_path(named) or Path(named)


def _named(source: str) -> str:
    return os.environ.get(credentials.STORE, "sqlite:///mlflow.db") if source == "mlflow" else source


def _read(source: str) -> list[Finished]:
    if not source or (not STORES.match(source) and not Path(source).is_dir()):
        if Path(source).is_file():
            return kept.read(Path(source))
        raise RunError(
            f"--from: found {source!r}, expected a folder of runs, an MLflow store's URI, mlflow, "
            "or a file that --keep wrote"
        )
    left_out: Counter[str] = Counter()
    from_source = (
        _from_store(credentials.remember(source), left_out)
        if STORES.match(source)
        else _from_folders(Path(source), left_out)
    )
    found = list(from_source)
    if left_out and not found:
        told = ", ".join(f"{count} {what}" for what, count in left_out.most_common())
        raise ConfigError(
            f"{credentials.hidden(source)}: found no finished student to compare, expected some; "
            f"left out: {told}"
        )
    return found


def _from_folders(runs: Path, left_out: Counter[str]) -> Iterator[Finished]:
    for path in runs.glob("*/result.json"):
        if (found := read_folder(path.parent, left_out)) is not None:
            yield found


def read_folder(folder: Path, left_out: Counter[str]) -> Finished | None:
    """Read a finished run's folder; None for what is no student to compare, which is counted in ``left_out``.

    Raises RunError for what cannot be read.
    """
    result = read_result(folder)
    try:
        facts = parameters(read_config(folder))
        if _is_left_out(facts, left_out):
            return None
        if result["teacher"] is None:
            raise ValueError("its result names no teacher")
        metrics = last_metrics(folder) or {}
        return _finished(
            folder.name,
            facts | checksums_of(result),
            metrics,
            result["student_sha256"],
            result["code"]["commit"],
            result.get("cost", {}),
        )
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{folder}: is not a finished run's folder ({error!r}); move it away") from error


def checksums_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Checksums of what a finished run learned from, as facts."""
    teacher = result["teacher"]
    taught = {} if teacher is None else {"teacher.sha256": teacher["sha256"]}
    return taught | {"dataset.sha256": result["data_sha256"]}


def _from_store(uri: str, left_out: Counter[str]) -> Iterator[Finished]:
    for name, facts, metrics, tags in finished_runs(uri):
        if not _is_left_out(facts, left_out):
            taught = {f"{of}.sha256": tags.get(f"sakd.{of}_sha256", ABSENT) for of in ("teacher", "dataset")}
            commit = tags.get("mlflow.source.git.commit")
            yield _finished(name, facts | taught, metrics, tags["sakd.student_sha256"], commit)


def _is_left_out(facts: Mapping[str, str], left_out: Counter[str]) -> bool:
    """True for what is no student to compare; it is counted by what it is."""
    if "distiller.pretrains" in facts:
        left_out["pretrainings"] += 1
    elif facts["dataset"] == "debug":
        left_out["runs of experiment=debug"] += 1
    elif facts["spot_mode"] == "none":
        left_out["networks trained alone"] += 1
    else:
        return False
    return True


def _finished(
    name: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, float],
    student_sha256: str,
    commit: str | None,
    cost: Mapping[str, Mapping[str, int | None]] = MappingProxyType({}),
) -> Finished:
    stops_early = facts.get("early_stop", "None") != "None"
    if metrics.get("epoch") != int(facts["epochs"]) and not stops_early:
        raise RunError(
            f"{name}: found measurements up to epoch {metrics.get('epoch', 0):g}, expected "
            f"{facts['epochs']} as in its configuration; `sakd sync` sends to MLflow what it lacks"
        )
    metrics = {key: value for key, value in metrics.items() if key != "time"}
    return Finished(name, facts_of(facts), metrics, student_sha256, commit, cost)


def facts_of(parameters: Mapping[str, str]) -> dict[str, str]:
    """Parameters and checksums as filters have them: numbers each in one form, and how checksums begin."""
    return {
        key: value[:12] if key.endswith(".sha256") else _canonical(value) for key, value in parameters.items()
    }


def _canonical(text: str) -> str:
    """Write 1.0 as 1, as in a run's identity."""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else repr(number)


def select(runs: Sequence[AnyRun], filters: Sequence[str]) -> list[AnyRun]:
    """The runs that fit every ``key=value[,value…]``.

    Raises ConfigError for a key, or a value, that no run has.
    """
    keys = sorted({key for run in runs for key in run.facts})
    for text in filters:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"{text}: found no value, expected key=value or key=value,value")
        if runs and key not in keys:
            raise ConfigError(f"{key}: no such key in the runs' configurations.{did_you_mean(key, keys)}")
        found = sorted({run.fact(key) for run in runs})
        chosen: set[str] = set()
        for value in re.split(r",(?![^\[]*\])", values):
            readings = {value, _as_written(value)} & {*found}
            if runs and not readings:
                check_choice(key, value, found)
            chosen |= readings
        runs = [run for run in runs if run.fact(key) in chosen]
    return list(runs)


def _as_written(value: str) -> str:
    """Write a value of the command line, or of YAML, as parameters have it.

    ``null`` is None, ``5e-2`` is 0.05.
    """
    try:
        return _canonical(str(yaml.safe_load(value)))
    except yaml.YAMLError:
        return value
