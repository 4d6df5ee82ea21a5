"""Every key of conf/: its value there, what it may be, and what its comment says.

They are read from the files as they are written, and from what takes them: the schema and constructors.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sakd.configuration.build import TRAINING_RANGES, TRANSFORM_RANGES
from sakd.configuration.fits import expected_of_schema, expected_of_target, target_of
from sakd.configuration.schema import Whole

OF_HYDRA = ("defaults", "hydra")
OF_A_CHOICE = ("name", "_target_", "reference")  # what it is, and no setting of it


class Key(NamedTuple):
    """A key in a file: its path, its value as written, what it may be, and the comment beside it or above."""

    path: str
    value: str
    expected: str
    comment: str


def keys_of(file: Path, node: str = "") -> list[Key]:
    """The keys of a YAML file of conf/, in its order; ``node`` is the path of what the file is."""
    text = file.read_text()
    root = yaml.compose(text, yaml.SafeLoader)
    expected = _expected(root, node)
    left_out = (*OF_HYDRA, *OF_A_CHOICE) if node else OF_HYDRA
    root.value = [(key, value) for key, value in root.value if key.value not in left_out]
    return list(_of_mapping(root, node, text, [_comment_in(line) for line in text.splitlines()], expected))


def about(file: Path) -> str:
    """What the comment says that a file begins with, in one line."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def _of_mapping(
    mapping: yaml.MappingNode, node: str, text: str, comments: list[str], expected: Mapping[str, str]
) -> Iterator[Key]:
    for key, value in mapping.value:
        path = f"{node}.{key.value}" if node else key.value
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _of_mapping(value, path, text, comments, _expected(value, path))
        else:
            written = text[value.start_mark.index : value.end_mark.index]
            comment = _comment(comments, key.start_mark.line, value.end_mark.line)
            yield Key(path, written, expected.get(key.value, ""), comment)


def _expected(mapping: yaml.MappingNode, node: str) -> Mapping[str, str]:
    """What a node's keys may be, in words, as the schema says, and the constructor that it names."""
    expected = expected_of_schema(Whole, node)
    named = [value.value for key, value in mapping.value if key.value == "_target_"]
    if not named:
        return expected
    target = target_of({"_target_": named[0]}, node)
    ranges: Mapping[str, Any] = {}
    if node.startswith("dataset."):
        ranges = TRANSFORM_RANGES
    elif {"optimizer", "schedule"} & {*node.split(".")}:
        ranges = TRAINING_RANGES
    taken = expected_of_target(getattr(target, "Settings", target), ranges)
    return {"_target_": "the import path of what to build", **taken, **expected}


def _comment_in(line: str) -> str:
    """The comment of a line, with its ``#`` where the line is nothing else."""
    return line if line.startswith("#") else line.partition(" #")[2].strip()


def _comment(comments: list[str], first: int, last: int) -> str:
    """The comment in the lines of a key, or, where there is none, the lines of comment right above it."""
    if beside := " ".join(filter(None, comments[first : last + 1])):
        return beside.lstrip("# ")
    above: list[str] = []
    for line in reversed(comments[:first]):
        if not line.startswith("#") or "-->" in line:
            break
        above.insert(0, line.lstrip("# "))
    return " ".join(above) if len(above) < first else ""  # a file's first lines are about the file
