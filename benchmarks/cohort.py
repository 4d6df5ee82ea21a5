"""Cost of students that learn together, beside each alone: ``python -m benchmarks.cohort --help``.

The same trainers take the same steps twice: each in a cohort of its own, and all in one.
"""

import argparse
import sys

import torch

from benchmarks.authors import DISTILLERS
from benchmarks.parts import Steps, batch, run_config, trainers
from benchmarks.step import (
    Timed,
    as_in_a_run,
    checked,
    measure,
    parser_of,
    peak_mb,
    print_table,
    together_timed,
    write_csv,
)
from sakd.errors import ConfigError


def timed_of(options: argparse.Namespace) -> tuple[Timed, Timed]:
    """Timings to take: of a step of every member alone, one after the other, and of all together."""
    configs = {}
    for distiller in options.distillers:
        for mode in options.modes:
            configs[f"{distiller} {mode}"] = run_config(
                options.pair, distiller, mode, options.batch, options.execution
            )
    teacher, made = trainers(configs, options.samples, options.device)
    inputs = batch(options.batch, options.samples, options.device)
    alone = [Steps(teacher, {name: trainer}, inputs) for name, trainer in made.items()]

    def each() -> None:
        for step in alone:
            step()

    together = together_timed(options, f"{len(made)}", "together", teacher, made)
    return Timed(f"{len(made)}", "alone", each), together


def row_of(alone: Timed, together: Timed, options: argparse.Namespace) -> dict[str, object]:
    return {
        "pair": "-".join(options.pair),
        "members": int(together.distiller),
        "alone_ms": round(alone.ms, 1),
        "together_ms": round(together.ms, 1),
        "ratio": round(together.ratio_to(alone), 3),
        "peak_mb": round(peak_mb(together, options.device), 1),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("cohort", "Steps of students together, beside each alone.", DISTILLERS, rounds=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per timing")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before")
    parser.set_defaults(modes=["fixed"])
    return checked(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with as_in_a_run(options):
        try:
            alone, together = timed_of(options)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        measure([alone, together], options)
        row = row_of(alone, together, options)
    print(
        f"{' to '.join(options.pair)}, {', '.join(options.modes)}, batch {options.batch}, "
        f"{options.device_name}, CPU threads: {options.threads}, PyTorch {torch.__version__}; "
        f"{options.clock_name} time, medians of {options.rounds} rounds"
    )
    print_table([row], list(row))
    write_csv([row], options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
