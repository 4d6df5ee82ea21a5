"""Finished runs in one file: what a table is made from, for those who have neither folders nor a store.

It is JSON with a checksum: what the runs have in common once, and a line for each of them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sakd.compare.described import Finished
from sakd.credentials import hidden
from sakd.errors import RunError
from sakd.files import CHECKSUM, parse_json, with_checksum, write_whole

SHARED, RUNS = "shared", "runs"
# Keys that say where things lie on one machine: of no use elsewhere.
PLACES = ("runs", "tracking", "dataset.root", "student.checkpoint", "teacher.checkpoint")
PLACES += ("teacher.training.checkpoint",)
NEEDED = ("dataset", "teacher", "student", "distiller", "spot_mode", "seed", "teacher.sha256")

_READ = TypeAdapter(list[Finished])


def write(runs: Sequence[Finished], path: Path) -> None:
    """Write ``runs`` for ``read``, without what says where things lie.

    Of a path that is the value of another key the last part is kept. Raises RunError if the file cannot be
    written.
    """
    facts = [facts_of_anywhere(run) for run in runs]
    shared = dict(set.intersection(*(set(own.items()) for own in facts)))
    lines = [
        {
            "name": run.name,
            "facts": {key: value for key, value in own.items() if key not in shared},
            "metrics": {key: _as_json(value) for key, value in run.metrics.items()},
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
    expected = "expected a file that `sakd compare --keep` wrote"
    try:
        content = parse_json(path.read_bytes(), always_sealed=True)
        shared, lines = content[SHARED], content[RUNS]
        runs = _READ.validate_python([line | {"facts": shared | line["facts"]} for line in lines])
    except ValidationError as error:
        first, *_ = error.errors()
        where = f"{RUNS}.{'.'.join(map(str, first['loc']))}"
        raise RunError(f"{path}: {where}: found {first['input']!r:.60}; {first['msg']}") from error
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except KeyError as error:
        raise RunError(f"{path}: found no {error.args[0]}, {expected}") from error
    except (TypeError, ValueError) as error:
        raise RunError(f"{path}: {error}; {expected}") from error
    for run in runs:
        if lacking := [key for key in NEEDED if key not in run.facts]:
            raise RunError(f"{path}: {run.name}: found no {lacking[0]}, {expected}")
    return runs


def facts_of_anywhere(run: Finished) -> dict[str, str]:
    """A run's facts without what is so on one machine alone: no places, and of other paths the last part."""
    return {key: _shown(text) for key, text in run.facts.items() if not _is_place(key)}


def _is_place(key: str) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in PLACES)


def _shown(text: str) -> str:
    return hidden(Path(text).name if text.startswith(("/", "~/")) else text)


def _as_json(value: float) -> float | str:
    """The number, or its name, which JSON knows no number for."""
    return float(value) if math.isfinite(value) else str(float(value))


def _a_line_each(content: Mapping[str, Any]) -> str:
    """JSON that shows in a difference which run, or which shared key, is another."""
    shared = json.dumps(content[SHARED], indent=1, sort_keys=True)
    runs = ",\n".join(json.dumps(line, sort_keys=True) for line in content[RUNS])
    return (
        f'{{"{SHARED}": {shared},\n"{RUNS}": [\n{runs}\n],\n"{CHECKSUM}": {json.dumps(content[CHECKSUM])}}}\n'
    )
