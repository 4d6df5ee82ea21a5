"""Finished runs in one file: all that a table is made from, for those who have neither folders nor a store.

It is JSON with a checksum: what the runs have in common once, and a line for each of them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sakd.compare.described import Finished
from sakd.errors import RunError
from sakd.files import CHECKSUM, read_json, with_checksum, write_whole

SHARED, RUNS = "shared", "runs"
# Keys that say where things lie on one machine: of no use elsewhere.
PLACES = ("runs", "tracking", "dataset.root", "student.checkpoint", "teacher.checkpoint")
PLACES += ("teacher.training.checkpoint",)

_READ = TypeAdapter(list[Finished])


def write(runs: Sequence[Finished], path: Path) -> None:
    """Write ``runs`` for ``read``, without the keys that say where things lie.

    Raises RunError if the file cannot be written.
    """
    facts = [{key: value for key, value in run.facts.items() if not _is_place(key)} for run in runs]
    shared = dict(set.intersection(*(set(own.items()) for own in facts)))
    lines = [
        {
            "name": run.name,
            "facts": {key: value for key, value in own.items() if key not in shared},
            "metrics": {key: float(value) for key, value in run.metrics.items()},
            "student_sha256": run.student_sha256,
            "commit": run.commit,
            "cost": {network: dict(counts) for network, counts in run.cost.items()},
        }
        for run, own in zip(runs, facts, strict=True)
    ]
    write_whole(path, _a_line_each(with_checksum({SHARED: shared, RUNS: lines})).encode())


def read(path: Path) -> list[Finished]:
    """Read the runs of a file that ``write`` wrote.

    Raises RunError for another file, and for one that was changed since.
    """
    content = read_json(path) or {}
    try:
        shared, lines = content[SHARED], content[RUNS]
        return _READ.validate_python([line | {"facts": shared | line["facts"]} for line in lines])
    except ValidationError as error:
        first, *_ = error.errors()
        where = f"{RUNS}.{'.'.join(map(str, first['loc']))}"
        found, expected = f"found {first['input']!r:.60}", first["msg"]
        raise RunError(f"{path}: {where}: {found}; {expected}") from error
    except (LookupError, TypeError) as error:
        raise RunError(
            f"{path}: found no runs ({error!r}), expected a file that `sakd compare --keep` wrote"
        ) from error


def _is_place(key: str) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in PLACES)


def _a_line_each(content: Mapping[str, Any]) -> str:
    """JSON that shows in a difference which run, or which shared key, is another."""
    shared = json.dumps(content[SHARED], indent=1, sort_keys=True)
    runs = ",\n".join(json.dumps(line, sort_keys=True) for line in content[RUNS])
    return (
        f'{{"{SHARED}": {shared},\n"{RUNS}": [\n{runs}\n],\n"{CHECKSUM}": {json.dumps(content[CHECKSUM])}}}\n'
    )
