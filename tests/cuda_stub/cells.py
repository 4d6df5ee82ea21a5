"""What is run over the CUDA stub: ``python -m tests.cuda_stub.cells PART DEVICE …``.

Prints a JSON line for each thing that was tried: its ``name``, what was seen, and the ``error`` that ended
it, if one did. Nothing is judged here.
"""

import csv
import ctypes
import json
import logging
import os
import sys
import threading
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import gpu, step
from sakd.configuration import Config, build, prerequisites
from sakd.data import Dataset, train_batches
from sakd.process import quickest_convolutions
from sakd.runs import job
from sakd.runs.run import Run
from sakd.runs.underway import UnderWay
from sakd.streams import stream
from sakd.training import Cohort, Trainer, measuring, trainer
from sakd.training.execution import on_device
from sakd.training.graphs import Captured
from tests.conftest import TINY, compose_config, light
from tests.cuda_stub.build import STUB
from tests.cuda_stub.launches import COHORTS
from tests.test_every_config import overrides

SAMPLES, BATCH = 40, 16  # batches of 16, 16 and 8 digits
# Optimizers whose steps are captured, and the keys that they need beside the rate.
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "weight_decay": 5e-4},
    "SGD with dampening": {"momentum": 0.9, "dampening": 0.1},
    "AdamW": {},
    "NAdam": {},
    "Rprop": {},
    "ASGD": {},
}


class Stub:
    """Counts and faults of the devices that are not there."""

    def __init__(self):
        self.library = ctypes.CDLL(os.environ[STUB])
        self.library.stub_counters.restype = self.library.stub_faults.restype = ctypes.c_char_p
        self.names = self.library.stub_counters().decode().split()

    def counts(self) -> dict[str, int]:
        found = (ctypes.c_long * len(self.names))()
        self.library.stub_counts(found)
        return dict(zip(self.names, found, strict=True))

    @contextmanager
    def watched(self) -> Iterator[dict[str, Any]]:
        """Gives what is counted inside, once it is left; ``nodes``: the last capture's; and ``faults``."""
        self.library.stub_forget_faults()
        seen: dict[str, Any] = {}
        before = self.counts()
        try:
            yield seen
        finally:
            after = self.counts()
            seen |= {name: after[name] - before[name] for name in self.names} | {"nodes": after["nodes"]}
            seen["faults"] = self.faults()

    def faults(self) -> list[str]:
        """What was forbidden, or escaped a capture, since they were last watched."""
        return sorted(set(self.library.stub_faults().decode().splitlines()))


stub = Stub()


def excuse_numbers() -> None:
    """Let nobody look at what was not computed: memory that kernels would have written has any bits.

    An epoch's means and an evaluation's score are fetched as they would be, and are 0 then; weights count as
    finite. This is all that is excused.
    """
    fetched_means, fetched_score = measuring.RunningMeans._sum_up, measuring.Score.compute

    def sum_up(self: measuring.RunningMeans, measured: torch.Tensor, samples: int) -> None:
        fetched_means(self, torch.zeros_like(measured), samples)

    def compute(self: measuring.Score) -> dict[str, float]:
        return dict.fromkeys(fetched_score(self), 0.0)

    measuring.RunningMeans._sum_up, measuring.Score.compute = sum_up, compute
    trainer.all_finite = lambda tensors: torch.tensor(True)


def tell(name: str, tried: Callable[[], Mapping[str, Any]]) -> None:
    """Print what ``tried()`` saw, or how it failed."""
    try:
        told = dict(tried())
    except Exception as error:
        frames = reversed(traceback.extract_tb(error.__traceback__)[-6:])
        where = " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        told = {"error": f"{type(error).__name__}: {error} at {where}", "faults": stub.faults()}
    print(json.dumps({"name": name, "error": None} | told), flush=True)


@contextmanager
def said() -> Iterator[list[str]]:
    """What is logged inside."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("sakd")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


# ---- steps


def configured(device: str, compiled: str, distiller: str, mode: str, *more: str) -> Config:
    return composed(distiller, mode, *more) | {"device": device, "compile": compiled}


@cache
def composed(distiller: str, mode: str, *more: str) -> Config:
    small = ("tracking=none", "dataset.flip=true", f"dataset.train_samples={SAMPLES}", f"batch_size={BATCH}")
    return compose_config(
        *TINY, *small, *overrides(distiller), f"distiller={distiller}", f"spot_mode={mode}", *more
    )


def cohort_of(configs: Mapping[str, Config]) -> tuple[Cohort, Dataset]:
    """A cohort of these runs, whose teacher is the first one's, prepared and in its first epoch."""
    first = next(iter(configs.values()))
    device, dataset = build.device(first["device"]), build.dataset(first)
    trainers: dict[str, Trainer] = {}
    teacher = None
    for name, config in configs.items():
        parts = build.parts(config, None if teacher is None else teacher.network)
        trainers[name] = build.trainer(config, parts, device, teacher)
        teacher = trainers[name].teacher
        trainers[name].prepare(dataset, config["batch_size"])
    cohort = Cohort(teacher, trainers)
    for member in cohort.members.values():
        member.begin_epoch()
    return cohort, dataset.to(device)


def steps_of(configs: Mapping[str, Config]) -> dict[str, Any]:
    """What a cohort launches: for ``captures`` of two batch sizes, if it captures, and in ``steps`` then.

    And what is launched for the second and third of its ``batches``, and how many ``views`` these have.
    """
    cohort, dataset = cohort_of(configs)
    with on_device(cohort.device), quickest_convolutions():
        batches = cohort.batches(list(cohort.members.values()), dataset, BATCH)
        full = next(batches)
        with stub.watched() as later:
            other, rest = islice(batches, 2)
        captures = [watched_step(cohort, *batch) for batch in (full, other, rest)][1:]
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps = [watched_step(cohort, *batch) for batch in (full, rest)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    captures = captures if cohort.execution.captures_on(cohort.device) else []
    return {"captures": captures, "steps": steps, "batches": later, "views": len(full[2])}


def watched_step(cohort: Cohort, *drawn: Any) -> dict[str, Any]:
    with stub.watched() as seen:
        cohort.take_step(list(cohort.members.values()), *drawn)
    return seen


def steps(device: str, compiled: str) -> None:
    """Each of COHORTS."""
    for name, members in COHORTS.items():
        tell(f"{device} {name}", lambda members=members: steps_of(configs_of(device, compiled, members)))


def configs_of(device: str, compiled: str, members: Sequence[tuple[str, str]]) -> dict[str, Config]:
    return {" ".join(member): configured(device, compiled, *member) for member in members}


def pair(device: str, compiled: str, distillers: str, modes: str, *more: str) -> None:
    """Distillers in spot modes, both by commas, as other overrides have it, such as an experiment."""
    for distiller, mode in product(distillers.split(","), modes.split(",")):
        keys = (f"device={device}", f"compile={compiled}", f"distiller={distiller}", f"spot_mode={mode}")
        config = compose_config(*light(distiller), *keys, "tracking=none", f"batch_size={BATCH}", *more)
        tell(f"{distiller} {mode}", lambda config=config: steps_of({"": config}))


# ---- what must be seen


def wrongs(device: str) -> None:
    """Faults that a step might have, so that a test can see that they are seen."""
    elsewhere = torch.zeros(4, device="cuda:0" if device == "cuda:1" else "cuda:1")
    here = torch.zeros(4, device=device)

    def capture(function: Callable[..., Any], falls_back: bool = False) -> dict[str, Any]:
        with on_device(torch.device(device)), stub.watched() as seen:
            captured = Captured(function, torch.device(device), falls_back=falls_back)
            with said() as lines:
                for _ in range(3):
                    captured(here)
        return seen | {"said": lines}

    def on_another_device(images: torch.Tensor) -> None:
        images.add_(1)
        with torch.cuda.device(elsewhere.device):
            elsewhere.add_(1)

    def on_another_stream(images: torch.Tensor) -> None:
        images.add_(1)
        with torch.cuda.stream(torch.cuda.Stream(here.device)):
            images.add_(1)

    def backwards_on_another_device(images: torch.Tensor) -> None:
        def hook(gradient: torch.Tensor) -> None:
            elsewhere.add_(1)

        weight = torch.nn.Parameter(torch.ones_like(images))
        weight.register_hook(hook)
        (weight * images).sum().backward()

    def on_a_stream_that_forks(images: torch.Tensor) -> None:
        other, first = torch.cuda.Stream(here.device), torch.cuda.current_stream()
        other.wait_stream(first)
        with torch.cuda.stream(other):
            images.add_(1)
        first.wait_stream(other)

    def waiting(images: torch.Tensor) -> float:
        return images.add_(1).sum().item()

    def reading_the_host(images: torch.Tensor) -> None:
        images.copy_(torch.zeros(4).pin_memory(), non_blocking=True)

    def nothing(images: torch.Tensor) -> None:
        torch.zeros(4).add_(1)

    tell("another device", lambda: capture(on_another_device))
    tell("another stream", lambda: capture(on_another_stream))
    tell("backwards", lambda: capture(backwards_on_another_device))
    tell("a fork", lambda: capture(on_a_stream_that_forks))
    tell("a wait captured", lambda: capture(waiting))
    for function in (waiting, on_another_stream, nothing):
        tell(f"{function.__name__} falls back", lambda function=function: capture(function, True))
    tell("a copy captured", lambda: capture(reading_the_host))
    tell("nothing captured", lambda: capture(nothing))
    tell("a wait", lambda: step_with(device, "none", lambda step: step.measured.sum().item()))
    tell("fifty more", lambda: step_with(device, "none", fifty_more))


def fifty_more(step: Any) -> None:
    for _ in range(50):
        step.measured.add_(1)


def step_with(device: str, compiled: str, more: Callable[[Any], object]) -> dict[str, Any]:
    """Steps of kd fixed that do ``more`` with what they give."""
    config = configured(device, compiled, "kd", "fixed")
    cohort, dataset = cohort_of({"kd": config})
    (member,) = cohort.members.values()
    plain = member.train_step

    def train_step(*inputs: Any) -> Any:
        step = plain(*inputs)
        more(step)
        return step

    member.train_step = train_step
    with on_device(cohort.device):
        first, second, _ = train_batches(dataset, BATCH, stream(0, "data", 1))
        watched_step(cohort, first)
        return watched_step(cohort, second)


# ---- epochs


def epochs_of(config: Config) -> dict[str, Any]:
    """What a trainer captures in each epoch, at which learning rates, and as what optimizers read them."""
    device = build.device(config["device"])
    with said() as lines:
        trainer = build.trainer(config, build.parts(config), device)
    dataset = build.dataset(config)
    counted, rates, faults, kinds, current = [], [], set(), set(), set()

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        kinds.update(type(group["lr"]).__name__ for group in optimizer.param_groups)
        current.add(torch.cuda.current_device())

    hook = register_optimizer_step_pre_hook(note)
    epochs = iter(Cohort(trainer.teacher, {"": trainer}).fit(dataset, config["epochs"], config["batch_size"]))
    for _ in range(config["epochs"]):
        with stub.watched() as seen:
            _, measured = next(epochs)
        counted.append({name: seen[name] for name in ("captures", "escaped", "graphs")})
        rates.append(measured["lr/student"])
        faults |= set(seen["faults"])
    hook.remove()
    return {
        "epochs": counted,
        "rates": rates,
        "rates_are": sorted(kinds),
        "current_devices": sorted(current),
        "faults": sorted(faults),
        "said": lines,
    }


def resumed_rate(config: Config) -> dict[str, Any]:
    """The rate that the first step reads behind a state that was saved at another one."""
    device = build.device(config["device"])
    trainer, saved = (build.trainer(config, build.parts(config), device) for _ in range(2))
    saved.optimizer.param_groups[0]["lr"] = 0.002
    for each in (trainer, saved):
        each.prepare(build.dataset(config))
    trainer.load_state_dict(saved.state_dict())
    next(iter(Cohort(trainer.teacher, {"": trainer}).fit(build.dataset(config), 1, SAMPLES)))
    return {"filled": trainer.steppers["student"].filled}


def optimizer_keys(name: str) -> list[str]:
    """Overrides by which student and policy are trained by an optimizer of torch."""
    cleared = ["~optimizer.momentum", "~optimizer.weight_decay"]
    cleared += ["~spot_mode.optimizer.momentum", "~spot_mode.optimizer.weight_decay"]
    target = f"torch.optim.{name.split()[0]}"
    chosen = [f"optimizer._target_={target}", f"spot_mode.optimizer._target_={target}"]
    keys = [f"{key}={value}" for key, value in OPTIMIZERS.get(name, {}).items()]
    own = [f"+{whose}.{key}" for whose in ("optimizer", "spot_mode.optimizer") for key in keys]
    return cleared + chosen + own


def epochs(device: str, place: str) -> None:
    """Captured epochs: by several optimizers, under a schedule, of images in files, in a pretraining."""
    folder, falling = Path(place), ("epochs=3", "schedule.milestones=[1,2]")
    for name in OPTIMIZERS:
        config = configured(device, "graph", "kd", "adaptive", *falling, *optimizer_keys(name))
        tell(name, lambda config=config: epochs_of(config))
    refused = configured(
        device, "graph", "kd", "adaptive", *optimizer_keys("Adagrad"), f"runs={folder}/refused"
    )
    tell("Adagrad", lambda: {"result": job.execute(refused)})
    tell("left by Adagrad", lambda: {"files": sorted(path.name for path in folder.glob("refused/*"))})
    for name in ("SGD", "Adagrad"):
        chosen = configured(device, "auto", "kd", "adaptive", *falling, *optimizer_keys(name))
        tell(f"auto, {name}", lambda chosen=chosen: epochs_of(chosen))
    tell("resumed rate", lambda: resumed_rate(configured(device, "graph", "kd", "fixed", *falling)))
    tell("pretraining", lambda: epochs_of(pretraining(device, *falling)))
    tell("files", lambda: epochs_of(of_files(device, folder)))
    tell("a thread that pins", lambda: pinned_meanwhile(device))


def pretraining(device: str, *more: str) -> Config:
    """FT's paraphraser in training, as its run has it, under the student's schedule."""
    student = configured(device, "graph", "ft", "fixed", *more)
    return prerequisites(student).pretraining | {key: student[key] for key in ("epochs", "schedule")}


def of_files(device: str, folder: Path) -> Config:
    """A run from images in files, which a thread pins, as conf/dataset/image_folder.yaml has them."""
    for part in ("train", "test"):
        for label in range(2):
            place = folder / "images" / part / str(label)
            place.mkdir(parents=True)
            for number in range(SAMPLES // 2):
                Image.new("RGB", (20, 20), (number, label, 0)).save(place / f"{number}.png")
    files = (
        "dataset=image_folder",
        f"dataset.root={folder}/images",
        "dataset.classes=2",
        "dataset.image_size=16",
    )
    small = (f"batch_size={BATCH}", "dataset.workers=1", "epochs=2", "student=resnet8", "teacher=resnet8")
    return compose_config(
        *files, *small, f"device={device}", "compile=graph", "distiller=kd", "tracking=none"
    )


def pinned_meanwhile(device: str) -> dict[str, Any]:
    """Captures, ours and one in global mode, during which another thread pins memory."""
    here, pinned = torch.zeros(4, device=device), []

    def pin() -> None:
        with suppress(RuntimeError):
            pinned.append(torch.empty(2**20).pin_memory())  # and kept, so that the next has to be allocated

    def function(images: torch.Tensor) -> None:
        images.add_(1)
        other = threading.Thread(target=pin)
        other.start()
        other.join()

    with torch.cuda.device(here.device):
        with stub.watched() as ours:
            captured = Captured(function, here.device)
            for _ in range(2):
                captured(here)
        with stub.watched() as in_global, suppress(RuntimeError):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(here.device), capture_error_mode="global"):
                function(here)
    return {"ours": ours, "global": in_global}


# ---- benchmarks


def benchmarked(device: str, place: str) -> None:
    """Peak memory of a step of a small pair, launched one by one and captured, as benchmarks.step has it.

    And parts of benchmarks.gpu.
    """
    pair = ["--pair", "resnet14,resnet8", "--batch", "16", "--samples", "200", "--device", device]
    for compiled in ("none", "graph"):
        options = step.parse([*pair, "--compile", compiled])

        def peak(options: Namespace = options) -> dict[str, float]:
            with step.as_in_a_run(options):
                timed = step.trainer_timed(options, "at", "adaptive")
                for _ in range(2):
                    timed.step()
                return {"peak_mb": step.peak_mb(timed, options.device)}

        tell(compiled, peak)
    small = "--pair resnet8,resnet8 --batch 4 --samples 18 --rounds 1 --steps 1 --warm-up 0 --distillers at"
    for part in ("steps", "epochs", "cohorts"):

        def measured(part: str = part) -> dict[str, list[dict[str, str]]]:
            options = gpu.parse([*small.split(), "--device", device, "--output", place])
            gpu.run_part(part, options)
            with (options.output / f"{part}.csv").open() as file:
                return {"rows": list(csv.DictReader(file))}

        tell(part, measured)


# ---- a whole run


def run(device: str, compiled: str, runs: str) -> None:
    """A run with a teacher and a pretraining before it, interrupted after its first epoch, then resumed."""
    config = configured(
        device, compiled, "ft", "adaptive", "epochs=3", "dataset.test_samples=32", f"runs={runs}"
    )
    kept = UnderWay.keep

    def keep_and_be_interrupted(self: UnderWay, measured: dict[str, float]) -> object:
        told = kept(self, measured)
        if self.run.name == Run(config).name:
            raise KeyboardInterrupt
        return told

    def interrupted() -> dict[str, Any]:
        UnderWay.keep = keep_and_be_interrupted
        try:
            job.execute(config)
        except KeyboardInterrupt:
            return {"epochs": [line["epoch"] for line in Run(config).metrics()], "files": files()}
        finally:
            UnderWay.keep = kept
        return {}

    def resumed() -> dict[str, Any]:
        with stub.watched() as seen:
            result = job.execute(config)
        return {
            "epochs": [line["epoch"] for line in Run(config).metrics()],
            "files": files(),
            "result": result,
            **seen,
        }

    def files() -> list[str]:
        return sorted(path.name for path in Run(config).folder.iterdir())

    tell("interrupted", interrupted)
    tell("resumed", resumed)
    tell("finished", lambda: {"result": job.execute(config)})


PARTS = {
    "steps": steps,
    "pair": pair,
    "wrongs": wrongs,
    "epochs": epochs,
    "benchmarked": benchmarked,
    "run": run,
}


def main(part: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
    excuse_numbers()
    PARTS[part](*arguments)
    sys.stdout.flush()
    os._exit(0)  # the autograd threads of a device that is not there cannot be joined


if __name__ == "__main__":
    main(*sys.argv[1:])
