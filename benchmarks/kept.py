"""Configurations composed beforehand, for machines without Hydra: ``python -m benchmarks.kept`` writes them
anew, after a change of ``conf/``.

``composed.json`` has a whole configuration, and beside it the nodes of some groups by name, which take the
place of its own. Nothing in them depends on another choice.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from sakd.configuration import Config

FILE = Path(__file__).with_name("composed.json")
NETWORKS = ("resnet8", "resnet56", "resnet20", "resnet32x4", "resnet8x4")
GROUPS = {
    "teacher": NETWORKS,
    "student": NETWORKS,
    "distiller": ("kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "crd"),
    "spot_mode": ("fixed", "adaptive"),
}


def composed(chosen: Mapping[str, str]) -> Config:
    """The configuration with these choices, by group. Raises LookupError for one that is not kept."""
    kept = json.loads(FILE.read_text())
    return kept["whole"][""] | {group: kept[group][name] for group, name in chosen.items()}


def write() -> None:
    from benchmarks import parts  # with Hydra

    kept = {"whole": {"": parts.composed("tracking=none")}}
    for group, names in GROUPS.items():
        kept[group] = {name: parts.composed(f"{group}={name}")[group] for name in names}
    lines = [
        f"{json.dumps(group)}: {{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(node)}" for name, node in nodes.items())
        + "\n}"
        for group, nodes in kept.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write()
