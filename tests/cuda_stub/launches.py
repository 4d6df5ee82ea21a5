"""Launches of a step, counted over the CUDA stub and written down in launches.csv.

``python -m tests.cuda_stub.launches --write`` writes them anew, after a change that is meant. With overrides
it shows what steps launch under these, for the distillers and spot modes named:
``python -m tests.cuda_stub.launches 'experiment=[cifar100/resnet56_resnet20,debug]' --distillers kd,at,crd``.
"""

import argparse
import csv
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.cuda_stub.build import build, hindrance, told
from tests.test_every_config import DISTILLERS, MODES

LAUNCHES = Path(__file__).with_name("launches.csv")
TOGETHER = ("fixed", "adaptive", "anti")  # spot modes of a cohort's members
EIGHT = ("kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt")  # distillers of a cohort of eight

# Members of each cohort whose steps are counted, by its name: distiller and spot mode of each.
COHORTS = {"none": [("none", "fixed")]}
for distiller in DISTILLERS:
    if distiller != "none":
        COHORTS |= {f"{distiller} {mode}": [(distiller, mode)] for mode in MODES}
        COHORTS[f"{distiller} together"] = [(distiller, mode) for mode in TOGETHER]
COHORTS |= {f"eight {mode}": [(name, mode) for name in EIGHT] for mode in ("fixed", "adaptive")}


def operations(step: Mapping[str, int]) -> int:
    """How many operations a step launched one by one: outside of its graphs, if it has some."""
    return sum(step[kind] for kind in ("kernels", "library_calls", "copies", "fills"))


def known() -> dict[str, dict[str, int]]:
    """Operations of a step that are written down, by name: ``eager``, and those outside when ``captured``."""
    with LAUNCHES.open() as file:
        return {row.pop("name"): {key: int(n) for key, n in row.items()} for row in csv.DictReader(file)}


def write(library: Path) -> None:
    eager, captured = (told(library, "steps", "cuda", compiled) for compiled in ("none", "graph"))
    rows = [
        [name, *(operations(found[f"cuda {name}"]["steps"][0]) for found in (eager, captured))]
        for name in COHORTS
    ]
    with LAUNCHES.open("w") as file:
        csv.writer(file, lineterminator="\n").writerows([["name", "eager", "captured"], *rows])


def show(library: Path, distillers: str, modes: str, overrides: list[str]) -> None:
    for compiled in ("none", "graph"):
        for name, found in told(library, "pair", "cuda", compiled, distillers, modes, *overrides).items():
            step = found["error"] or found["steps"][0]
            seen = step if isinstance(step, str) else f"{operations(step)} {step}"
            print(f"compile={compiled} {name}: {seen}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--distillers", default="kd,at,crd")
    parser.add_argument("--modes", default="fixed,adaptive")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if hindrance() is not None:
        parser.error(hindrance())
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        if options.write:
            write(library)
        else:
            show(library, options.distillers, options.modes, options.overrides)


if __name__ == "__main__":
    main()
