"""A run by what its user calls it, and what can be looked at of it."""

from pathlib import Path

from sakd.decisions import Recorded
from sakd.errors import RunError, did_you_mean
from sakd.runs.record import read_record
from sakd.runs.stored import read_config, read_result

NAMED = 3  # runs in an error


def find_run(called: str, runs: Path) -> Path:
    """A run's folder: ``called`` is a folder, the name of one in ``runs``, or the beginning of one name.

    Raises RunError if there is no such run, or more than one.
    """
    for folder in (Path(called), runs / called):
        if (folder / "config.yaml").is_file():
            return folder
    names = sorted(path.parent.name for path in runs.glob("*/config.yaml"))
    found = [name for name in names if name.startswith(called)]
    if len(found) == 1:
        return runs / found[0]
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise RunError(
            f"{called!r}: found {len(found)} runs in {runs} whose names begin so, {', '.join(found[:NAMED])}"
            f"{more}; expected one"
        )
    raise RunError(
        f"{called}: found no such run, expected a run's folder, or a name in {runs} or its beginning."
        f"{did_you_mean(called, names)}"
    )


def read_recorded(folder: Path) -> Recorded:
    """A run with the record of its decisions.

    Raises RunError if the folder is no run's, has no record, or what lies there is damaged.
    """
    return Recorded(folder.resolve().name, read_config(folder), read_record(folder), _data_sha256(folder))


def _data_sha256(folder: Path) -> str | None:
    result = read_result(folder)
    return None if result is None else result["data_sha256"]
