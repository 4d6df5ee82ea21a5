"""All that is to be known of a GPU in one call: ``python -m benchmarks.gpu --minutes 9 --output FOLDER``.

What matters most comes first, each part in a process of its own that ends when its time is over. A part's
rows are written as soon as they are there; ``summary.json`` says which parts are whole, and why others are
not. It needs torch and numpy alone. Columns are explained in benchmarks/README.md.
"""

import argparse
import csv
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import parts
from benchmarks.authors import DISTILLERS as AUTHORS_OWN
from benchmarks.authors import authors_scripts, authors_timed
from benchmarks.step import (
    Timed,
    as_in_a_run,
    checked,
    measure,
    names_in,
    parser_of,
    peak_mb,
    together_timed,
    trainer_timed,
    wait_for,
)
from sakd.data import steps_per_epoch
from sakd.files import write_whole
from sakd.process import tf32
from sakd.training import Cohort, Execution, Teacher, Trainer

ROOT = Path(__file__).parent.parent
WIDE = ["resnet32x4", "resnet8x4"]  # the second pair
# Precision of the networks, how steps are launched, and the order of memory, where it is not as asked for.
OURS = {
    "captured": ("fp32", "graph", None),
    "captured bf16": ("bf16", "graph", "channels_last"),
    "captured tf32": ("tf32", "graph", "channels_last"),
    "eager": ("fp32", "none", None),
}
MEMBERS = (1, 8, 2, 4, 16)  # of cohorts
WARM_UP_STEPS = 3  # until a step is captured, and replayed once
RUN_EPOCHS = 4
SHARE_OF_TESTS = 0.2
SHORTEST = 5.0  # seconds in which no part is begun

Rows = Callable[[Mapping[str, object]], None]


# ---- the parts


def steps(options: argparse.Namespace, add: Rows) -> None:
    """Our step, launched in each way, and the authors' beside it; all of a cell in turn."""
    with (
        nullcontext({}) if options.code is None else authors_scripts(options.code, options.device) as scripts
    ):
        for distiller, mode in product(options.distillers, options.modes):
            cell = cell_of(options, distiller, mode)
            timed: dict[str, Timed] = {}
            for name in (*OURS, "authors") if scripts and distiller in AUTHORS_OWN else OURS:
                with noted(add, cell | {"variant": name}), arithmetic(name):
                    if name == "authors":
                        one = authors_timed(scripts, options, distiller, mode)
                    else:
                        one = trainer_timed(as_variant(options, name), distiller, mode)
                    for _ in range(WARM_UP_STEPS):
                        one.step()
                    timed[name] = one
            measure(list(timed.values()), options)
            for name, one in timed.items():
                add(cell | {"variant": name} | step_row(one, timed, options))
            timed.clear()
            free(options.device)


def step_row(one: Timed, timed: Mapping[str, Timed], options: argparse.Namespace) -> dict[str, object]:
    return {
        "ms": round(one.ms, 3),
        "images_per_second": round(1000 * options.batch / one.ms, 1),
        "eager_over_it": ratio(timed, "eager", one),
        "authors_over_it": ratio(timed, "authors", one),
        "peak_mb": "" if one is timed.get("authors") else round(peak_mb(one, options.device), 1),
    }


def ratio(timed: Mapping[str, Timed], name: str, one: Timed) -> float | str:
    return round(timed[name].ratio_to(one), 3) if name in timed else ""


def epochs(options: argparse.Namespace, add: Rows) -> None:
    """A whole training epoch with its data, of random images; once, since it is long."""
    with_last = WARM_UP_STEPS * options.batch + options.samples % options.batch
    warm_up, whole = (parts.random_images(n).to(options.device) for n in (with_last, options.samples))
    for name, mode, distiller in product(OURS, options.modes, options.distillers):
        cell = cell_of(options, distiller, mode) | {"variant": name}
        with noted(add, cell), arithmetic(name):
            cohort = Cohort(*alike(as_variant(options, name), distiller, mode, 1))
            members = list(cohort.members.values())
            cohort.train_epoch(members, warm_up, options.batch)
            wait_for(options.device)
            start = time.perf_counter()
            cohort.train_epoch(members, whole, options.batch)
            wait_for(options.device)
            seconds = time.perf_counter() - start
            steps = steps_per_epoch(options.samples, options.batch)
            theirs = authors_seconds(options.output, cell, steps)
            add(cell | {"seconds": round(seconds, 3), "steps": steps, "authors_seconds": theirs})
        free(options.device)


def authors_seconds(output: Path, cell: Mapping[str, object], steps: int) -> float | str:
    """So many of the authors' steps, each as long as was measured before; nothing where none was."""
    for file in sorted(output.glob("steps*.csv")):
        with file.open() as opened:
            for row in csv.DictReader(opened):
                if row["ms"] and {**row, **cell, "variant": "authors"} == row:
                    return round(steps * float(row["ms"]) / 1000, 3)
    return ""


def cohorts(options: argparse.Namespace, add: Rows) -> None:
    """A step of as many students of one teacher as MEMBERS says, beside that of one alone."""
    options = as_variant(options, quickest(options))
    alone: list[Timed] = []
    for number in MEMBERS:
        cell = cell_of(options, "at", "adaptive") | {"members": number}
        with noted(add, cell):
            together = together_timed(options, "at", "adaptive", *alike(options, "at", "adaptive", number))
            for _ in range(WARM_UP_STEPS):
                together.step()
            for one in alone:
                one.times.clear()
            measure([*alone, together], options)
            over_one = round(together.ratio_to((*alone, together)[0]), 3)
            peak = round(peak_mb(together, options.device), 1)
            add(cell | {"ms": round(together.ms, 3), "over_one": over_one, "peak_mb": peak})
            alone = alone or [together]
        free(options.device)


def busy(options: argparse.Namespace, add: Rows) -> None:
    """The share of a step's time in which the device works, by PyTorch's profiler."""
    for name, distiller, mode in product(OURS, options.distillers, options.modes):
        cell = cell_of(options, distiller, mode) | {"variant": name}
        with noted(add, cell), arithmetic(name):
            if options.device.type != "cuda":
                raise RuntimeError("needs a CUDA device")
            timed = trainer_timed(as_variant(options, name), distiller, mode)
            for _ in range(WARM_UP_STEPS):
                timed.step()
            wait_for(options.device)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                for _ in range(options.steps):
                    timed.step()
                wait_for(options.device)
            spans = [
                (event.time_range.start, event.time_range.end)
                for event in profiled.events()
                if event.device_type == DeviceType.CUDA
            ]
            add(cell | {"busy_percent": round(100 * busy_share(spans), 1), "operations": len(spans)})
        free(options.device)


def busy_share(spans: Iterable[tuple[float, float]]) -> float:
    """Of the time from the first's beginning to the last's end, the share in which any of ``spans`` runs."""
    ordered = sorted(spans)
    worked, until = 0.0, ordered[0][0]
    for start, end in ordered:
        worked += max(0.0, end - max(start, until))
        until = max(until, end)
    return worked / (until - ordered[0][0])


def overhead(options: argparse.Namespace, add: Rows) -> None:
    """What lies between the training epochs of a whole run: evaluation, checkpoint, metrics."""
    calls: dict[str, list[tuple[float, float]]] = {"train_epoch": [], "_evaluate": []}

    def watched(name: str) -> Any:
        original = getattr(Cohort, name)

        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            given = original(*arguments)
            calls[name].append((start, time.perf_counter()))
            return given

        return patch.object(Cohort, name, call)

    cell = cell_of(options, "at", "adaptive")
    with TemporaryDirectory() as folder, watched("train_epoch"), watched("_evaluate"), noted(add, cell):
        from sakd.runs.job import execute  # with packages that a machine may lack

        weights = Path(folder, "teacher.pth")
        torch.save(parts.network(options.pair[0]).state_dict(), weights)
        execution = as_variant(options, quickest(options)).execution
        config = parts.run_config(options.pair, "at", "adaptive", options.batch, execution)
        config |= {"runs": f"{folder}/runs", "device": str(options.device), "epochs": RUN_EPOCHS}
        config |= {"threads": options.threads, "tracking": {"name": "none"}}
        config["teacher"] |= {"checkpoint": str(weights)}
        execute(config, parts.random_images(options.samples))
        add(cell | between(calls["train_epoch"], calls["_evaluate"]))


def between(
    trained: Sequence[tuple[float, float]], evaluated: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Medians over the epochs but the first, in seconds."""
    gaps = [after[0] - before[1] for before, after in pairwise(trained[1:])]
    evaluations = [end - start for start, end in evaluated[1:]]
    found = {
        "epoch_seconds": median(end - start for start, end in trained[1:]),
        "between_seconds": median(gaps),
        "of_which_evaluation": median(evaluations),
    }
    return {name: round(seconds, 4) for name, seconds in found.items()}


@dataclass(frozen=True)
class Part:
    """Something to measure, of one pair; ``share``: at most so much of all the time."""

    measure: Callable[[argparse.Namespace, Rows], None]
    columns: Sequence[str]
    share: float
    wide: bool = False


CELL = ("pair", "distiller", "mode", "variant")
OF_STEPS = (*CELL, "ms", "images_per_second", "eager_over_it", "authors_over_it", "peak_mb", "note")
OF_EPOCHS = (*CELL, "seconds", "steps", "authors_seconds", "note")
PARTS = {
    "steps": Part(steps, OF_STEPS, 0.3),
    "epochs": Part(epochs, OF_EPOCHS, 0.2),
    "cohorts": Part(cohorts, (*CELL[:3], "members", "ms", "over_one", "peak_mb", "note"), 0.2),
    "busy": Part(busy, (*CELL, "busy_percent", "operations", "note"), 0.15),
    "overhead": Part(
        overhead, (*CELL[:3], "epoch_seconds", "between_seconds", "of_which_evaluation", "note"), 0.15
    ),
    "steps_wide": Part(steps, OF_STEPS, 0.3, wide=True),
    "epochs_wide": Part(epochs, OF_EPOCHS, 0.3, wide=True),
}


# ---- what they share


def as_variant(options: argparse.Namespace, name: str) -> argparse.Namespace:
    precision, compiled, order = OURS[name]
    execution = Execution(precision, order or options.memory_format, compiled, options.fold_batch_norm)
    return argparse.Namespace(**vars(options) | {"execution": execution, "precision": precision})


def arithmetic(name: str) -> AbstractContextManager[None]:
    """Context in which a variant is set up, and captured if it is."""
    return tf32(name in OURS and OURS[name][0] == "tf32")


def quickest(options: argparse.Namespace) -> str:
    return "captured" if options.device.type == "cuda" else "eager"


def alike(
    options: argparse.Namespace, distiller: str, mode: str, number: int
) -> tuple[Teacher, dict[str, Trainer]]:
    """A teacher and so many trainers of one distiller and mode."""
    config = parts.run_config(options.pair, distiller, mode, options.batch, options.execution)
    return parts.trainers({f"{n}": config for n in range(number)}, options.samples, options.device)


def cell_of(options: argparse.Namespace, distiller: str, mode: str) -> dict[str, object]:
    return {"pair": "-".join(options.pair), "distiller": distiller, "mode": mode}


@contextmanager
def noted(add: Rows, cell: Mapping[str, object]) -> Iterator[None]:
    """Let what goes wrong inside be a note, and the next begin."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        add({**cell, "note": f"{type(error).__name__}: {first}"})


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- all in one call, each in its time


def run_part(name: str, options: argparse.Namespace) -> None:
    """Measure a part in this process, its rows written as they come."""
    part = PARTS[name]
    options.pair = options.wide_pair if part.wide else options.pair
    with (options.output / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, part.columns, restval="")
        writer.writeheader()

        def add(row: Mapping[str, object]) -> None:
            writer.writerow(row)
            file.flush()

        with as_in_a_run(options):
            part.measure(options, add)


def told(name: str, arguments: Sequence[str], options: argparse.Namespace, seconds: float) -> str:
    """Let a part be measured within so many seconds; what has become of it, in one line."""
    if name == "tests" and find_spec("pytest") is None:
        return "left out: there is no pytest here"
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--part", name]
    if name == "tests":
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "benchmarks"]
        command += ["-p", "no:cacheprovider", "-q", "-m", "gpu", "tests/test_gpu.py"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the tests need none
    log = options.output / f"{name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"cut off after {seconds:.0f} s{rows_told(options.output / f'{name}.csv')}"
    last = (log.read_text().split("\n\n")[-1].splitlines() or [""])[-1]
    if name == "tests":
        return last or f"ended with {code}"
    return f"{f'failed: {last}' if code else 'done'}{rows_told(options.output / f'{name}.csv')}"


def rows_told(file: Path) -> str:
    if not file.exists():
        return ""
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    notes = [row for row in rows if row["note"]]
    return f", {len(rows) - len(notes)} rows" + (
        f", {len(notes)} with a note in their place" if notes else ""
    )


def machine(options: argparse.Namespace) -> dict[str, object]:
    return {
        "device": options.device_name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "batch": options.batch,
        "samples": options.samples,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("gpu", "All that is to be known of a GPU.", ["kd", "at", "crd"], rounds=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the results")
    parser.add_argument(
        "--authors",
        dest="code",
        type=Path,
        help="a clone of zju-vipa/spot-adaptive-pytorch, to be timed beside",
    )
    parser.add_argument("--wide-pair", type=names_in("network"), default=WIDE, help=",".join(WIDE))
    parser.add_argument("--steps", type=int, default=20, help="steps per timing")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before")
    parser.add_argument("--part", choices=PARTS, help="this one alone, in this process")
    options = checked(parser, list(arguments))
    options.output.mkdir(parents=True, exist_ok=True)
    options.output = options.output.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.part is not None:
        run_part(options.part, options)
        return 0
    whole = 60 * options.minutes
    start = time.monotonic()
    summary: dict[str, object] = {"machine": machine(options), "parts": {}}
    for name, share in {"tests": SHARE_OF_TESTS, **{key: part.share for key, part in PARTS.items()}}.items():
        left = whole - (time.monotonic() - start)
        outcome = "left out: no time was left"
        if left > SHORTEST:
            outcome = told(
                name, [*arguments, "--output", str(options.output)], options, min(left, share * whole)
            )
        summary["parts"][name] = outcome
        summary["seconds"] = round(time.monotonic() - start, 1)
        write_whole(options.output / "summary.json", json.dumps(summary, indent=1).encode())
        print(f"{name}: {outcome}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
