"""Cost of a record of what spot modes decided, and of looking at it: ``python -m benchmarks.record --help``.

The records are made up: decisions that depend on the sample, class and epoch, and ones drawn at random, which
nothing can compress.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.parts import Steps, batch, run_config, trainers
from benchmarks.step import names_in, print_table, write_csv
from sakd.decisions import Recorded, beside, pictures, text
from sakd.runs.record import FILE, Recording, read_record
from sakd.training import Execution
from sakd.training.recording import KeptTable

LAST = 5  # epochs
BATCH = 64
STEPS, ADDED = 5, 1000  # timed, by the medians and as a whole


def decisions(options: argparse.Namespace, structured: bool) -> Recording:
    """A record of random decisions, which each have a probability of their own where it is ``structured``."""
    random = np.random.default_rng(0)
    labels = random.integers(0, options.classes, options.samples)
    spots = [*(f"stage{number}" for number in range(1, options.spots)), "logits"]
    recording = Recording(spots, labels, np.arange(options.samples))
    easy = random.normal(size=options.samples) + labels / options.classes
    for epoch in range(options.epochs):
        kept = random.random((options.spots, options.samples), np.float32) < 0.5
        if structured:
            settled = 8 * epoch / options.epochs  # ever more is kept, at some spots earlier than at others
            scores = 4 * easy + settled * np.linspace(0.5, 2, options.spots)[:, None]
            kept = random.random(scores.shape, np.float32) < 1 / (1 + np.exp(-scores))
        recording.add(epoch + 1, np.packbits(kept, axis=-1))
    return recording


def seen(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """What a finished run knows of as many training images, and a fifth as many test images."""
    random, content = np.random.default_rng(1), {}
    for split, count in (("train", options.samples), ("test", options.samples // 5)):
        shares = random.random((5, count), np.float32)
        probability = random.random((count, options.spots), np.float32)
        names = ("student_confidence", "teacher_confidence", "student_loss", "teacher_loss")
        own: dict[str, np.ndarray] = dict(zip(names, shares[:4], strict=True))
        own |= {
            "student_right": shares[4] < 0.7,
            "teacher_right": shares[3] < 0.8,
            "probability": probability,
        }
        own |= {"route": probability > 0.5, "kept": probability > 0.5}
        if split == "test":
            own |= {"indices": np.arange(count), "labels": random.integers(0, options.classes, count)}
        content |= {f"{split}_{name}": values for name, values in own.items()}
    return content


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU time that the work takes, and what it gives."""
    before = time.process_time()
    given = work()
    return time.process_time() - before, given


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """As ``seconds_of``, rounded for a table."""
    seconds, given = seconds_of(work)
    return round(seconds, 2), given


def row_of(options: argparse.Namespace, structured: bool) -> dict[str, object]:
    config = {
        "epochs": options.epochs,
        "seed": 0,
        "dataset": {"name": "synthetic"},
        "teacher": {"name": "teacher"},
        "student": {"name": "student"},
        "distiller": {"name": "at", "losses": {"at": {}}},
        "spot_mode": {"name": "adaptive"},
    }
    with tempfile.TemporaryDirectory() as folder:
        recording = decisions(options, structured)
        under_way = len(recording.content())
        written, content = timed(lambda: recording.content(seen(options)))
        path = Path(folder) / FILE
        path.write_bytes(content)
        opened, record = timed(lambda: read_record(Path(folder)))
        runs = [Recorded(f"synthetic-{number}", config, record) for number in range(2)]
        read, _ = timed(lambda: text.of_one(runs[0], LAST))
        drawn, figures = timed(lambda: pictures.draw(record, "synthetic"))
        stored, _ = timed(lambda: pictures.contents(figures))
        compared, _ = timed(lambda: text.of_several(beside(runs, LAST)))
    return {
        "decisions": "structured" if structured else "random",
        "of": f"{options.samples} x {options.epochs} x {options.spots}",
        "under_way_mb": round(under_way / 1e6, 1),
        "finished_mb": round(len(content) / 1e6, 1),
        "write_s": written,
        "open_s": opened,
        "text_s": read,
        "draw_s": drawn,
        "store_s": stored,
        "two_runs_s": compared,
    }


def share_of_a_step(options: argparse.Namespace) -> tuple[float, float]:
    """CPU milliseconds of a training step (KD, adaptive), and those in it that go into the record."""
    cpu, pair = torch.device("cpu"), options.pair
    config = run_config(pair, "kd", "adaptive", BATCH, Execution(memory_format="channels_last"))
    teacher, made = trainers({"kd": config}, options.samples, cpu)
    inputs = batch(BATCH, options.samples, cpu)
    step = Steps(teacher, made, inputs)
    step()
    table = KeptTable(options.samples, options.spots, cpu)
    kept = torch.rand(BATCH, options.spots) < 0.5

    def add() -> None:
        for _ in range(ADDED):
            table.add(inputs.indices, kept)

    steps = median(1000 * seconds_of(step)[0] for _ in range(STEPS))
    return steps, 1000 * seconds_of(add)[0] / ADDED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.record", description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--spots", type=int, default=4)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument(
        "--pair", type=names_in("network"), default=["resnet56", "resnet20"], help="teacher,student of a step"
    )
    parser.add_argument("--csv", type=Path, help="the table as a file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows = [row_of(options, structured) for structured in (True, False)]
    print("seconds of CPU time, megabytes (10^6)")
    print_table(rows, list(rows[0]))
    write_csv(rows, options.csv)
    torch.set_num_threads(1)
    step, recorded = share_of_a_step(options)
    print(
        f"a step of {' to '.join(options.pair)} (kd, adaptive, batch {BATCH}, one thread): {step:.1f} ms, of "
        f"which the record {1000 * recorded:.1f} us ({recorded / step:.3%})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
