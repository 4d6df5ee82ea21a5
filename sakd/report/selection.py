"""Which runs a report is about: those of a folder that were named or fit filters, or a sweep's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sakd.compare import Described, checksums_of, facts_of, select
from sakd.configuration import Config, find_run, parameters, read_config, short_names
from sakd.errors import RunError, SakdError, in_one_line
from sakd.runs import is_locked, last_words, read_result
from sakd.sweeps import Plan, PlannedRun, Standing, survey


@dataclass(frozen=True)
class Found(Described):
    """A run that a report is about; ``trouble``: why its result cannot be read, if so."""

    config: Config
    standing: Standing
    result: Mapping[str, Any] | None
    trouble: str | None

    @property
    def folder(self) -> Path:
        return Path(self.standing.folder)


@dataclass(frozen=True)
class Selection:
    """What a report is about.

    ``asked``: in the words of its user. ``unreadable``: folders of which not even the configuration can be
    read, and why. ``expected``: short names of the cells that there should be, of a sweep.
    """

    asked: str
    runs: list[Found]
    unreadable: dict[str, str]
    expected: list[dict[str, str]] | None = None


def of_folder(runs: Path, words: Sequence[str] = ()) -> Selection:
    """Runs of a folder. ``words``: runs, by folder, name, or the beginning of a name, and filters as those of
    `sakd compare`; all runs where none are named.

    Raises RunError for a folder or run that is not there, ConfigError for a filter that none can fit.
    """
    if not runs.is_dir():
        raise RunError(f"--from: found {str(runs)!r}, expected a folder of runs")
    filters = [word for word in words if "=" in word and not Path(word).is_dir()]
    named = [find_run(word, runs) for word in words if word not in filters]
    found, unreadable = [], {}
    for folder in dict.fromkeys(named) or sorted(path.parent for path in runs.glob("*/config.yaml")):
        try:
            found.append(_found(read_config(folder), _standing(folder)))
        except RunError as error:
            unreadable[folder.name] = in_one_line(error)
    return Selection(" ".join(words) or f"all runs in {runs}", select(found, filters), unreadable)


def of_sweep(planned: Plan) -> Selection:
    """A sweep's cells, and what they need first. Raises a SakdError where a launcher does not answer."""
    standings = survey(planned.everything, planned.runs)
    found = [_found(run.run.config, standings[run.name]) for run in planned.everything]
    return Selection(" ".join(planned.sweep.overrides), found, {}, _names(planned.cells))


def of_cells(asked: str, cells: Sequence[PlannedRun], states: Mapping[str, str]) -> Selection:
    """A sweep's cells of which it is known what has become of them: one of ``STATES`` by name."""
    found = [_found(cell.run.config, _standing(cell.run.folder, states[cell.name])) for cell in cells]
    return Selection(asked, found, {}, _names(cells))


def _names(cells: Sequence[PlannedRun]) -> list[dict[str, str]]:
    return [short_names(cell.run.config) for cell in cells]


def _found(config: Config, standing: Standing) -> Found:
    result, trouble = None, None
    try:
        result = read_result(Path(standing.folder))
    except SakdError as error:
        trouble = in_one_line(error)
    learned_from = {} if result is None else checksums_of(result)
    facts = facts_of(parameters(config) | learned_from)
    return Found(standing.name, facts, config, standing, result, trouble)


def _standing(folder: Path, state: str | None = None) -> Standing:
    """What has become of a run, by its folder alone where its ``state`` is not known."""
    error = last_words(folder)
    if state is None:
        if (folder / "result.json").exists():
            state = "finished"
        elif is_locked(folder / ".lock"):
            state = "running"
        else:
            state = "lost" if error is None else "failed"
    return Standing(folder.resolve().name, state, str(folder), error=error if state == "failed" else None)
