"""Our training step beside that of the method's authors: ``python -m benchmarks.authors --code FOLDER``.

FOLDER holds https://github.com/zju-vipa/spot-adaptive-pytorch. Its own ``main`` builds the networks, losses,
policy and optimizers from its own configs, and its own ``train_epoch`` makes the steps: ``train.py`` the
adaptive, ``train_baseline.py`` the fixed ones. Only what does not belong to a step, or fails on today's
PyTorch or on a CPU, is replaced while it runs.
"""

import argparse
import inspect
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from statistics import geometric_mean
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.parts import CLASSES, batch
from benchmarks.step import (
    Timed,
    as_in_a_run,
    checked,
    measure,
    parser_of,
    print_table,
    trainer_timed,
    write_csv,
)

SCRIPTS = {"adaptive": "train", "fixed": "train_baseline"}
DISTILLERS = ["fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ft", "nst", "crd"]
CONFIGS = Path("configs/cifar-100/seed-1029")
NEGATIVES = 16384  # of CRD, fixed in their scripts
LR = 1e-6  # of both optimizers; the cost of a step does not depend on it


# ---- their code, made to run


class Idle(ModuleType):
    """Stands for what the authors' scripts import and a step does not need, and does nothing.

    That is TensorBoard, data sets, bars.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None)  # asked for by who looks whether it is there

    def __getattr__(self, name: str) -> "Idle":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> "Idle":
        return self


@contextmanager
def authors_scripts(
    code: Path, device: torch.device, names: Mapping[str, str] = SCRIPTS
) -> Iterator[dict[str, ModuleType]]:
    """The authors' scripts by spot mode, which inside run on ``device`` and on today's PyTorch."""
    unneeded = ("tqdm", "torch.utils.tensorboard", "dataset", "dataset.cifar", "dataset.tiny_imagenet")
    sys.modules.update({name: Idle(name) for name in unneeded})
    sys.path.insert(0, str(code.resolve()))
    scripts = {mode: import_module(name) for mode, name in names.items()}
    policy = import_module("models.classifier").LinearClassifier
    # It writes into a leaf that takes gradients.
    policy.set_n_to_True = torch.no_grad()(policy.set_n_to_True)
    for script in scripts.values():
        script.__global_values__ = {"it": 0}
        script.accuracy = accuracy
    if device.type == "cuda":
        yield scripts
        return
    with (
        patch.object(torch.cuda, "is_available", lambda: False),
        patch.object(torch.cuda, "FloatTensor", torch.FloatTensor),
        patch.object(torch.Tensor, "cuda", lambda self: self),
    ):
        yield scripts


def accuracy(logits: Tensor, labels: Tensor, topk: Sequence[int]) -> list[Tensor]:
    """Accuracies at each k of ``topk``, as a share, each [1].

    It stands for the authors' own, which asks for a view of a tensor that has none.
    """
    right = logits.detach().topk(max(topk)).indices == labels[:, None]
    return [right[:, :k].sum().reshape(1) / len(labels) for k in topk]


def handed_over(script: ModuleType, config: Path, samples: int, pair: Sequence[str]) -> dict[str, Any]:
    """The arguments of ``script``'s ``train_epoch`` by name, as its ``main`` builds them from ``config``.

    The networks are those of ``pair``; ``main`` runs up to the training, which it hands over.
    """
    found: dict[str, Any] = {}

    def network(name: str) -> Callable[..., torch.nn.Module]:
        return lambda _, classes: script.get_model(model_name=name, num_classes=classes)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.multiple(
            script,
            get_dataloader=lambda _: ([], [], CLASSES),
            get_cifar100_dataloaders_sample=lambda **_: ([], [], samples),
            get_teacher=network(pair[0]),
            get_student=network(pair[1]),
            get_logger=lambda **_: Idle("logger"),
            make_deterministic=torch.manual_seed,
            init_pretrain=lambda *_: None,  # FT's, before the training
            train_kd=found.update,
        ),
    ):
        script.main(str(config), "{}", folder)
    takes = inspect.signature(script.train_epoch).parameters
    return {name: value for name, value in found.items() if name in takes}


def authors_step(
    script: ModuleType, config: Path, inputs: Sequence[Tensor], samples: int, pair: Sequence[str]
) -> Callable[[], object]:
    """A step of ``script`` on one batch."""
    epoch = handed_over(script, config, samples, pair)
    epoch["train_loader"] = [inputs]
    for optimizer in (epoch[name] for name in ("optimizer", "agent_optimizer") if name in epoch):
        for group in optimizer.param_groups:
            group["lr"] = LR  # at theirs, some losses break: the teacher is not trained

    def step() -> None:
        _, loss = script.train_epoch(epoch=1, **epoch)
        if not math.isfinite(loss):  # nothing would be routed to the teacher, nor distilled
            raise FloatingPointError(f"{config}: the authors' loss became {loss}")

    return step


def authors_timed(
    scripts: dict[str, ModuleType], options: argparse.Namespace, distiller: str, mode: str
) -> Timed:
    config = options.code / CONFIGS / distiller / f"{'-'.join(options.pair)}.yml"
    images, labels, indices = batch(options.batch, options.samples, options.device)
    inputs = [images, labels]
    if distiller == "crd":  # their data set draws the negatives, in its workers: here they are given
        negatives = torch.randint(options.samples, (options.batch, NEGATIVES), device=options.device)
        inputs += [indices, torch.cat([indices[:, None], negatives], dim=1)]
    return Timed(distiller, mode, authors_step(scripts[mode], config, inputs, options.samples, options.pair))


# ---- reporting


def row_of(ours: Timed, theirs: Timed, options: argparse.Namespace) -> dict[str, object]:
    return {
        "distiller": ours.distiller,
        "mode": ours.mode,
        "pair": "-".join(options.pair),
        "device": options.device_name,
        "authors_ms": round(theirs.ms, 1),
        "ms": round(ours.ms, 1),
        "throughput_ratio": round(theirs.ratio_to(ours), 3),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(
        "authors", "Our training step beside that of the method's authors.", DISTILLERS, rounds=5
    )
    parser.add_argument("--code", type=Path, required=True, help="a clone of zju-vipa/spot-adaptive-pytorch")
    parser.add_argument("--steps", type=int, default=1, help="steps per timing")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before")
    options = checked(parser, arguments)
    for mode in options.modes:
        if mode not in SCRIPTS:
            parser.error(f"--modes: found {mode}, expected some of {', '.join(SCRIPTS)}")
    for distiller in options.distillers:
        config = options.code / CONFIGS / distiller / f"{'-'.join(options.pair)}.yml"
        if not config.is_file():
            parser.error(f"no {config}: the authors' code has no such pair or distiller, or is not there")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows = []
    # They print shapes.
    printed = redirect_stdout(sys.stderr)
    with as_in_a_run(options), authors_scripts(options.code, options.device) as scripts, printed:
        # One after the other: their banks and negatives take much memory.
        for distiller in options.distillers:
            theirs = [authors_timed(scripts, options, distiller, mode) for mode in options.modes]
            ours = [trainer_timed(options, distiller, mode) for mode in options.modes]
            measure([one for both in zip(theirs, ours, strict=True) for one in both], options)
            rows += [row_of(own, others, options) for own, others in zip(ours, theirs, strict=True)]
    print(
        f"{' to '.join(options.pair)}, batch {options.batch}, {options.device_name}, CPU threads: "
        f"{options.threads}, PyTorch {torch.__version__}; {options.clock_name} time, medians of "
        f"{options.rounds} rounds of {options.steps}"
    )
    print_table(rows, ["distiller", "mode", "authors_ms", "ms", "throughput_ratio"])
    for mode in options.modes:
        ratios = {row["distiller"]: row["throughput_ratio"] for row in rows if row["mode"] == mode}
        print(f"{mode}, geometric mean over {', '.join(ratios)}: {geometric_mean(ratios.values()):.3f}")
    write_csv(rows, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
