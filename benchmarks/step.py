"""Cost of a training step: ``python -m benchmarks.step --help``.

Columns are explained in benchmarks/README.md.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts import Steps, batch, choices, network, run_config, trainers
from sakd.errors import ConfigError, did_you_mean
from sakd.process import quickest_convolutions, tf32
from sakd.training import Execution, Teacher, Trainer
from sakd.training.execution import on_device

COLUMNS = (
    "distiller",
    "mode",
    "pair",
    "device",
    "ms",
    "images_per_second",
    "ratio_to_fixed",
    "ratio_to_floor",
    "peak_mb",
)


@dataclass
class Timed:
    """One step to measure.

    ``holds`` are all tensors that live from step to step, gradients left out; ``captured_bytes`` is the
    memory that captured steps have for themselves.
    """

    distiller: str
    mode: str
    step: Callable[[], object]
    clear_gradients: Callable[[], None] = lambda: None
    holds: Callable[[], Iterable[Tensor]] = tuple
    times: list[float] = field(default_factory=list)  # ms a step
    captured_bytes: Callable[[], int] = lambda: 0

    @property
    def ms(self) -> float:
        return median(self.times)

    def ratio_to(self, other: "Timed") -> float:
        """Median of the rounds' ratios: what slowed one round slowed both."""
        return median(own / others for own, others in zip(self.times, other.times, strict=True))


def floor_timed(options: argparse.Namespace) -> Timed:
    """Timing to take of what no distillation can do without.

    That is the teacher's forward pass, and the student's with its backward pass.
    """
    teacher, student = (options.execution.place(network(name), options.device) for name in options.pair)
    teacher.requires_grad_(False).eval()
    images, labels, _ = batch(options.batch, options.samples, options.device)
    images = options.execution.arrange(images)

    def step() -> None:
        student.zero_grad()
        with options.execution.autocast(options.device):
            with torch.no_grad():
                teacher(images)
            logits = student(images)
        F.cross_entropy(logits.float(), labels).backward()

    return Timed("none", "floor", step, student.zero_grad, lambda: weights_and_buffers_of(teacher, student))


def trainer_timed(options: argparse.Namespace, distiller: str, mode: str) -> Timed:
    """Timing to take of a trainer's step.

    Raises ConfigError if the distiller is not defined for the pair.
    """
    config = run_config(options.pair, distiller, mode, options.batch, options.execution)
    teacher, made = trainers({distiller: config}, options.samples, options.device)
    return together_timed(options, distiller, mode, teacher, made)


def together_timed(
    options: argparse.Namespace, distiller: str, mode: str, teacher: Teacher, trainers: Mapping[str, Trainer]
) -> Timed:
    """Timing to take of a step of all trainers, under the names given."""
    steps = Steps(teacher, trainers, batch(options.batch, options.samples, options.device))
    return Timed(
        distiller,
        mode,
        steps,
        gradients_of(trainers),
        lambda: held_by(teacher, trainers),
        captured_bytes=steps.captured_bytes,
    )


def gradients_of(trainers: Mapping[str, Trainer]) -> Callable[[], None]:
    """A function that gives the trainers' gradients back."""

    def clear() -> None:
        for trainer in trainers.values():
            trainer.forget_gradients()

    return clear


def held_by(teacher: Teacher, trainers: Mapping[str, Trainer]) -> Iterable[Tensor]:
    """Tensors that live from step to step, gradients left out."""
    yield from weights_and_buffers_of(teacher.network)
    for trainer in trainers.values():
        yield from weights_and_buffers_of(trainer.student, trainer.distillers, trainer.spot_mode)
        for optimizer in (trainer.optimizer, trainer.policy_optimizer):
            for state in {} if optimizer is None else optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def weights_and_buffers_of(*modules: nn.Module) -> Iterable[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


# ---- measuring


@contextmanager
def as_in_a_run(options: argparse.Namespace) -> Iterator[None]:
    """Threads, device and arithmetic inside as a run with these options has them."""
    torch.set_num_threads(options.threads)
    with on_device(options.device), tf32(options.precision == "tf32"), quickest_convolutions():
        yield


def measure(timed: list[Timed], options: argparse.Namespace) -> None:
    """Time all in turn, round after round, so that what else the machine does meets all alike."""
    for one in timed:
        for _ in range(options.warm_up):
            one.step()
    for _ in range(options.rounds):
        for one in timed:
            wait_for(options.device)
            start = options.clock()
            for _ in range(options.steps):
                one.step()
            wait_for(options.device)
            one.times.append(1000 * (options.clock() - start) / options.steps)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(one: Timed, device: torch.device) -> float:
    """Peak memory in MiB: all tensors alive at a step's fullest moment.

    They are those that it holds, and at most so many that it allocates; captured steps allocate nothing, but
    hold what they were captured in.
    """
    one.clear_gradients()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in one.holds()
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        one.step()
        allocated = torch.cuda.max_memory_allocated(device) - before
    else:
        allocated = peak_on_the_cpu(one.step)
    return (sum(storages.values()) + allocated + one.captured_bytes()) / 2**20


def peak_on_the_cpu(step: Callable[[], object]) -> int:
    """Peak memory in bytes: allocated and not yet freed at the fullest moment.

    It is read from the profiler's trace, whose count goes on from what earlier profiles have left.
    """
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    first = min(changes, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(event["args"]["Total Allocated"] for event in changes) - before


# ---- reporting


def rows_of(timed: list[Timed], options: argparse.Namespace) -> list[dict[str, object]]:
    fixed = {one.distiller: one for one in timed if one.mode == "fixed"}
    (floor,) = (one for one in timed if one.mode == "floor")
    return [
        {
            "distiller": one.distiller,
            "mode": one.mode,
            "pair": "-".join(options.pair),
            "device": options.device_name,
            "ms": round(one.ms, 3),
            "images_per_second": round(1000 * options.batch / one.ms, 1),
            "ratio_to_fixed": round(one.ratio_to(fixed[one.distiller]), 3) if one.distiller in fixed else "",
            "ratio_to_floor": round(one.ratio_to(floor), 3),
            "peak_mb": round(peak_mb(one, options.device), 1),
        }
        for one in timed
    ]


def report(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    print(
        f"{' to '.join(options.pair)}, batch {options.batch}, {options.device_name}, CPU threads: "
        f"{options.threads}, {options.precision}, {options.memory_format}, compile {options.compile}, "
        f"PyTorch {torch.__version__}; {options.clock_name} time, medians of {options.rounds} rounds of "
        f"{options.steps}"
    )
    print_table(rows, [column for column in COLUMNS if column not in ("pair", "device")])
    for mode in options.modes[1:]:
        ratios = {row["distiller"]: row["ratio_to_fixed"] for row in rows if row["mode"] == mode}
        if ratios:
            print(
                f"{mode} / fixed, geometric mean over {', '.join(ratios)}: "
                f"{geometric_mean(ratios.values()):.3f}"
            )


def print_table(rows: list[dict[str, object]], shown: list[str]) -> None:
    """Print rows, names in the first two columns and numbers in the others."""
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in shown]
    for line in [dict(zip(shown, shown, strict=True)), *rows]:
        texts = [str(line[column]) for column in shown]
        aligned = [
            text.ljust(w) if i < 2 else text.rjust(w)
            for i, (text, w) in enumerate(zip(texts, widths, strict=True))
        ]
        print("  ".join(aligned).rstrip())


def write_csv(rows: list[dict[str, object]], file: Path | None) -> None:
    if file is not None:
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


# ---- options


def names_in(group: str) -> Callable[[str], list[str]]:
    """A reader of lists of names with commas, each a file of the group."""

    def parsed(text: str) -> list[str]:
        names, known = text.split(","), choices(group)
        for name in names:
            if name not in known:
                expected = f"expected some of {', '.join(known)}"
                raise argparse.ArgumentTypeError(
                    f"no '{name}' in conf/{group}; {expected}.{did_you_mean(name, known)}"
                )
        return names

    return parsed


def parser_of(program: str, description: str, distillers: list[str], rounds: int) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    parser.add_argument(
        "--pair", type=names_in("network"), default=["resnet56", "resnet20"], help="teacher,student"
    )
    parser.add_argument(
        "--distillers", type=names_in("distiller"), default=distillers, help=",".join(distillers)
    )
    parser.add_argument(
        "--modes", type=names_in("spot_mode"), default=["fixed", "adaptive"], help="fixed,adaptive"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=50_000, help="training samples")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each is timed, all in turn")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--memory-format", choices=["auto", "contiguous", "channels_last"], default="auto")
    parser.add_argument("--compile", choices=["auto", "none", "default", "graph"], default="auto")
    parser.add_argument("--fold-batch-norm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--csv", type=Path, help="write the rows there, too")
    return parser


def checked(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if len(options.pair) != 2:
        parser.error(f"--pair: found {len(options.pair)} networks, expected teacher,student")
    if "none" in options.distillers:
        parser.error("--distillers: none has no teacher")
    options.execution = Execution(
        options.precision, options.memory_format, options.compile, options.fold_batch_norm
    )
    try:
        options.execution.check(options.device)
    except ConfigError as error:
        parser.error(str(error))
    on_one_thread = options.device.type == "cpu" and options.threads == 1
    # One thread's CPU time is its wall time on an idle machine, and says the same on one that others share.
    options.clock, options.clock_name = (
        (time.process_time, "CPU") if on_one_thread else (time.perf_counter, "wall")
    )
    options.device_name = (
        torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu"
    )
    return options


def parse(arguments: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    losses = [name for name in choices("distiller") if name != "none"]
    parser = parser_of("step", "Time and memory of a training step.", losses, rounds=10)
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 1, help="steps per timing")
    parser.add_argument("--warm-up", type=int, default=10 if on_gpu else 2, help="steps before")
    options = checked(parser, arguments)
    options.modes = ["fixed", *(mode for mode in options.modes if mode != "fixed")]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with as_in_a_run(options):
        timed = [floor_timed(options)]
        for distiller in options.distillers:
            try:
                timed += [trainer_timed(options, distiller, mode) for mode in options.modes]
            except ConfigError as error:
                print(f"{distiller} is left out: {error}", file=sys.stderr)
        measure(timed, options)
        rows = rows_of(timed, options)
    report(rows, options)
    write_csv(rows, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
