"""What can be looked at of a run's decisions."""

from pathlib import Path

from sakd.configuration import read_config
from sakd.decisions import Recorded
from sakd.runs.record import read_record
from sakd.runs.stored import read_result


def read_recorded(folder: Path) -> Recorded:
    """A run with the record of its decisions.

    Raises RunError if the folder is no run's, has no record, or what lies there is damaged.
    """
    return Recorded(folder.resolve().name, read_config(folder), read_record(folder), _data_sha256(folder))


def _data_sha256(folder: Path) -> str | None:
    result = read_result(folder)
    return None if result is None else result["data_sha256"]
