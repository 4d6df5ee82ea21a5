"""The authors' training and ours, step by step: ``python -m benchmarks.agree --code FOLDER``.

FOLDER holds https://github.com/zju-vipa/spot-adaptive-pytorch. Both sides train in float64 from the same
weights, on the same batches, with the same noise and negatives, each by its own code and its own recipe
(theirs from their YAML, ours from ``conf/``). After each step losses and weights are compared. Where they
differ, ``KNOWN`` says why, and with that one thing changed they must agree.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import parts
from benchmarks.authors import CONFIGS, DISTILLERS, SCRIPTS, Idle, authors_scripts, handed_over
from benchmarks.step import print_table, write_csv
from sakd.configuration import Config
from sakd.configuration.compose import compose_one
from sakd.data import Batch
from sakd.networks.checkpoints import shared_weights
from sakd.streams import stream, stream_seed
from sakd.training import Cohort

ALL_SCRIPTS = {"fixed": SCRIPTS["fixed"], "adaptive": SCRIPTS["adaptive"], "anti": "train_reverse"}
# Their config and our experiment, by the published pair, with small networks in the place of its own. One
# pair is of two families, so that each sample is kept somewhere; one of a single, where nearly all rows are
# kept at first, or in anti none.
PAIRS = {"resnet32x4-resnet32": ("resnet8x4", "resnet8"), "resnet56-resnet20": ("resnet14", "resnet8")}
IMAGE_SIZE, NEGATIVES = 16, 1024  # a part of the published 32 and 16384: sums over less of the same kind
AGREED = 1e-9  # the largest relative difference that counts as rounding
CPU = torch.device("cpu")
PARTS = ("losses", "student", "statistics", "policy", "adapters", "layers")

# Where a distiller's own layers and banks lie: beginnings of names of theirs and of ours, tensors in order.
LAYERS = {
    "fitnet": [("loss_hint", "regressors")],
    "cc": [("cc_embed_s", "embed_student"), ("cc_embed_t", "embed_teacher")],
    "vid": [("kd", "bounds")],
    "ft": [("translator", "translators"), ("paraphraser", "paraphrasers")],
    "crd": [
        ("crd_embed_s", "embed_student"),
        ("crd_embed_t", "embed_teacher"),
        ("kd.contrast.memory_v1", "student_banks"),
        ("kd.contrast.memory_v2", "teacher_banks"),
    ],
}


class Inputs(NamedTuple):
    """What one step gets."""

    batch: Batch
    negatives: Tensor  # int64 [B, NEGATIVES], CRD's


@dataclass
class Side:
    """One training.

    ``step`` takes a step and gives its losses as they count; ``state`` are the tensors that training changes,
    by part, in an order that both sides have, in the training's own memory; ``kept`` the share of decisions
    to distil, of each step.
    """

    step: Callable[[Inputs], Mapping[str, float]]
    state: Mapping[str, Sequence[Tensor]]
    kept: list[float] = field(default_factory=list)


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what is made or cast as float is float64, on both sides."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(Tensor, "float", Tensor.double), patch.object(torch, "float", torch.float64):
            yield
    finally:
        torch.set_default_dtype(before)


# ---- two sides


def our_side(config: Config, samples: int) -> Side:
    """The training of ``config``, over ``samples`` images that are made up."""
    teacher, made = parts.trainers({"ours": config}, samples, CPU)
    calibrate(teacher.network, inputs(0, 64, samples).batch.images)
    teacher.refold()
    cohort, trainer = Cohort(teacher, made), made["ours"]
    members = list(cohort.members.values())
    members[0].begin_epoch()
    kept: list[float] = []

    def step(given: Inputs) -> Mapping[str, float]:
        if "crd" in trainer.distillers:
            trainer.distillers["crd"].draw_negatives = lambda _: given.negatives
        taken = cohort.take_step(members, given.batch)["ours"]
        kept.append(float(taken.kept.double().mean()))
        losses = {name: float(loss) for name, loss in taken.losses.items()}
        routed = {} if trainer.policy_optimizer is None else {"router": float(taken.measured[-1])}
        return {**losses, "total": sum(losses.values()), **routed}

    state = of_networks(shared_weights(teacher.network), shared_weights(trainer.student))
    if trainer.policy_optimizer is not None:
        mode = trainer.spot_mode
        state["policy"] = tensors(mode.policy)
        state["adapters"] = tensors(*mode.grafts.to_teacher, *mode.grafts.to_student)
    layers = trainer.distillers.state_dict()
    names = [f"{name}.{own}" for name in trainer.distillers for _, own in LAYERS.get(name, ())]
    return Side(step, {**state, "layers": beginning(layers, names)}, kept)


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor) -> None:
    """Take over the images' statistics.

    Without, an untrained teacher's features grow from stage to stage, until losses break.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(images)
    network.eval()


def their_side(script: ModuleType, distiller: str, epoch: dict[str, Any], seed: int) -> Side:
    """The training whose ``train_epoch`` takes ``epoch``. Its noise is that of our policy of this seed."""
    noise = torch.Generator().manual_seed(stream_seed(seed, "policy", epoch=1))
    import_module("models.gs").sample_gumbel = lambda shape: (
        -torch.empty(shape).exponential_(generator=noise).log()
    )
    weight = epoch["cfg"]["kd"]["loss_weights"]["other_kd"]
    if distiller == "crd":
        epoch["criterion_dict"]["kd"].contrast.params[0] = NEGATIVES
    told, backward = Told(), Tensor.backward

    def step(given: Inputs) -> Mapping[str, float]:
        images, labels, indices = given.batch
        contrasted = torch.cat([indices[:, None], given.negatives], dim=1)
        loader = [[images, labels, indices, contrasted] if distiller == "crd" else [images, labels]]
        differentiated: list[float] = []  # the router's loss, where there is one, and the student's

        def noting(loss: Tensor, **options: bool) -> None:
            differentiated.append(loss.item())
            backward(loss, **options)

        with patch.object(Tensor, "backward", noting):
            script.train_epoch(epoch=1, **{**epoch, "train_loader": loader, "tb_writer": told})
        losses = {
            "task": told.losses["cls"],
            "kd": told.losses["div"],
            distiller: weight * told.losses["kd"],
            "total": differentiated[-1],
        }
        return losses | ({"router": differentiated[0]} if "policy" in epoch["module_dict"] else {})

    modules = epoch["module_dict"]
    state = of_networks(*(modules[name].state_dict() for name in ("teacher", "student")))
    if "policy" in modules:
        state["policy"] = tensors(modules["policy"])
        adapters = ("hint", "anti_hint")
        state["adapters"] = tensors(
            *(modules[name] for kind in adapters for name in modules if name.startswith(kind))
        )
    layers = modules.state_dict() | {
        f"kd.{name}": tensor for name, tensor in epoch["criterion_dict"]["kd"].state_dict().items()
    }
    state["layers"] = beginning(layers, [name for name, _ in LAYERS.get(distiller, ())])
    return Side(step, state)


class Told(Idle):
    """Stands for the authors' TensorBoard, and keeps the last losses that it was told."""

    def __init__(self):
        super().__init__("told")

    def add_scalars(self, main_tag: str, tag_scalar_dict: dict[str, float], global_step: int) -> None:
        if main_tag == "train/loss":
            self.losses = tag_scalar_dict


def of_networks(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Tensors of two networks, given by the names in the field's shared files."""
    numbers = sorted(name for name, tensor in student.items() if tensor.dim() > 0)
    return {
        "teacher": [teacher[name] for name in sorted(teacher) if teacher[name].dim() > 0],
        "student": [student[name] for name in numbers if "running_" not in name],
        "statistics": [student[name] for name in numbers if "running_" in name],
    }


def tensors(*modules: nn.Module) -> list[Tensor]:
    """Weights and statistics in order, without counts."""
    return [tensor for module in modules for tensor in module.state_dict().values() if tensor.dim() > 0]


def beginning(state: Mapping[str, Tensor], beginnings: Iterable[str]) -> list[Tensor]:
    """Tensors of ``state`` whose names begin so, without counts."""
    return [
        tensor
        for start in beginnings
        for name, tensor in state.items()
        if f"{name}.".startswith(f"{start}.") and tensor.dim() > 0
    ]


def inputs(number: int, size: int, samples: int) -> Inputs:
    """The batch of a step: random images, each with its class's own pattern; and negatives."""
    draws = stream(0, "agree", number)
    indices = torch.randperm(samples, generator=draws)[:size]
    labels = indices % parts.CLASSES
    shape = parts.CHANNELS, IMAGE_SIZE, IMAGE_SIZE
    patterns = torch.randn(parts.CLASSES, *shape, generator=stream(0, "agree"))
    images = torch.randn(size, *shape, generator=draws) + patterns[labels]
    return Inputs(Batch(images, labels, indices), torch.randint(samples, (size, NEGATIVES), generator=draws))


# ---- comparing


@dataclass
class Differences:
    """The largest relative difference of each part, and the first step with one above ``AGREED``."""

    largest: dict[str, float] = field(default_factory=dict)
    first: int | None = None

    def note(self, step: int, part: str, found: float) -> None:
        self.largest[part] = max(found, self.largest.get(part, 0.0))
        if found > AGREED and self.first is None:
            self.first = step


def relative_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest number of either; infinite where one is not finite."""
    scale = torch.stack([one, other]).abs().max().item()
    if not math.isfinite(scale):
        return math.inf
    return (one - other).abs().max().item() / scale if scale else 0.0


def pairs(theirs: Side, ours: Side) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Part, their tensor and ours, in the shape of theirs."""
    for part, own_tensors in ours.state.items():
        for other, own in zip(theirs.state[part], own_tensors, strict=True):
            yield part, other, own.reshape(other.shape)


def compared(theirs: Side, ours: Side, steps: Iterable[Inputs]) -> Differences:
    """Let both train from our weights, and compare after each step."""
    for _, other, own in pairs(theirs, ours):
        other.copy_(own)
    differences = Differences()
    for step, given in enumerate(steps, 1):
        their_losses, our_losses = theirs.step(given), ours.step(given)
        # To one another, since some can be nothing but rounding: RKD's of two rows.
        names = sorted(their_losses.keys() | our_losses.keys())
        losses = [torch.tensor([one[name] for name in names]) for one in (their_losses, our_losses)]
        differences.note(step, "losses", relative_difference(*losses))
        for part, other, own in pairs(theirs, ours):
            differences.note(step, part, relative_difference(other, own))
    return differences


# ---- what is known to differ


@dataclass(frozen=True)
class Known:
    """A difference in one line, where it can be, and what removes it: in theirs, or a key of ours."""

    reason: str
    distillers: tuple[str, ...]
    modes: tuple[str, ...]
    in_theirs: Callable[[dict[str, Any]], AbstractContextManager] = lambda epoch: nullcontext()
    overrides: tuple[str, ...] = ()


def without_epsilon(epoch: dict[str, Any]) -> AbstractContextManager:
    return patch.object(import_module("distiller_zoo.crd.criterion"), "eps", 0.0)


def with_zero_gradients(epoch: dict[str, Any]) -> AbstractContextManager:
    """Let their optimizer give its parameters gradients of 0 before each step, not none."""
    modules = epoch["module_dict"]
    frozen = {id(p) for p in modules["cc_embed_t"].parameters()} if "cc_embed_t" in modules else set()
    groups = epoch["optimizer"].param_groups

    def zero_grad() -> None:
        for parameter in (p for group in groups for p in group["params"] if id(p) not in frozen):
            parameter.grad = torch.zeros_like(parameter)

    return patch.object(epoch["optimizer"], "zero_grad", zero_grad)


def without_the_whole_batch(epoch: dict[str, Any]) -> AbstractContextManager:
    """Let their factor loss be 0 but of rows that were picked, whose teacher's side is detached."""
    criterion = epoch["criterion_dict"]["kd"]
    loss = criterion.forward
    return patch.object(criterion, "forward", lambda s, t: loss(s, t) * (0 if t.requires_grad else 1))


def without_single_rows(epoch: dict[str, Any]) -> AbstractContextManager:
    """Let their loss of a single row be 0."""
    criterion = epoch["criterion_dict"]["kd"]
    loss = criterion.forward
    return patch.object(criterion, "forward", lambda s, t: loss(s, t) if len(s) > 1 else 0 * s.sum())


POLICIES = ("adaptive", "anti")
KNOWN = (
    Known(
        "theirs adds 1e-7 to the contrast's denominators",
        ("crd",),
        ("fixed", *POLICIES),
        in_theirs=without_epsilon,
    ),
    Known(
        "theirs leaves the teacher's embedding as drawn, ours learns it unless teacher_embedding=frozen",
        ("cc",),
        POLICIES,
        overrides=("distiller.losses.cc.teacher_embedding=frozen",),
    ),
    Known(
        "with a single row kept the value of theirs is NaN (its gradient is not), ours is 0",
        ("rkd", "cc"),
        POLICIES,
        in_theirs=without_single_rows,
    ),
    Known(
        "with no row kept theirs takes the loss of the whole batch, ours is 0",
        ("ft",),
        POLICIES,
        in_theirs=without_the_whole_batch,
    ),
    Known(
        "with no row kept theirs gives the distiller's layers no gradient: no decay, no momentum; ours one "
        "of 0",
        tuple(LAYERS),
        POLICIES,
        in_theirs=with_zero_gradients,
    ),
)


# ---- cells


def cell(
    options: argparse.Namespace,
    script: ModuleType,
    pair: str,
    distiller: str,
    mode: str,
    changes: Sequence[Known] = (),
) -> tuple[Differences, Side]:
    """Compare one distiller in one mode, with what is known to differ removed as ``changes`` say."""
    teacher, student = PAIRS[pair]
    overrides = [f"experiment=cifar100/{pair.replace('-', '_')}", f"teacher={teacher}", f"student={student}"]
    overrides += [f"distiller={distiller}", f"spot_mode={mode}"]
    overrides += [override for known in changes for override in known.overrides]
    config = compose_one(overrides)
    ours = our_side(config, options.samples)
    file = options.code / CONFIGS / distiller / f"{pair}.yml"
    epoch = handed_over(script, file, options.samples, PAIRS[pair])
    with ExitStack() as changed:
        for known in changes:
            changed.enter_context(known.in_theirs(epoch))
        theirs = their_side(script, distiller, epoch, config["seed"])
        steps = (inputs(number, options.batch, options.samples) for number in range(1, options.steps + 1))
        return compared(theirs, ours, steps), ours


def explained(runs: Callable[..., Differences], reasons: Sequence[Known]) -> list[Known]:
    """Those ``reasons`` that are needed: all, but for those without which both sides agree as well."""
    for known in reasons:
        others = [other for other in reasons if other is not known]
        if runs(*others).first is None:
            reasons = others
    return list(reasons)


def row_of(
    options: argparse.Namespace, script: ModuleType, pair: str, distiller: str, mode: str
) -> dict[str, object]:
    @cache
    def runs(*changes: Known) -> tuple[Differences, Side]:
        return cell(options, script, pair, distiller, mode, changes)

    differences, ours = runs()
    row = {
        "distiller": distiller,
        "mode": mode,
        "pair": "-".join(PAIRS[pair]),
        "kept": f"{100 * sum(ours.kept) / len(ours.kept):.0f}",
        **{part: f"{differences.largest.get(part, 0.0):.0e}" for part in PARTS},
        "first": differences.first or "",
        "without": "",
        "reason": "",
    }
    if differences.first is not None:
        known = [known for known in KNOWN if distiller in known.distillers and mode in known.modes]
        needed = explained(lambda *changes: runs(*changes)[0], known)
        remaining = max(runs(*needed)[0].largest.values())
        row |= {"without": f"{remaining:.0e}", "reason": "; ".join(known.reason for known in needed)}
    return row


def report(rows: Sequence[Mapping[str, object]], options: argparse.Namespace) -> None:
    print(
        f"{options.steps} steps of {options.batch} images, float64, PyTorch {torch.__version__}; largest "
        f"relative differences, and the first step above {AGREED:.0e}"
    )
    for pair in options.pairs:
        networks = "-".join(PAIRS[pair])
        print(f"\n{networks} in the place of {pair}")
        shown = [row for row in rows if row["pair"] == networks]
        print_table(shown, ["distiller", "mode", "kept", *PARTS, "first", "without"])
        for row in shown:
            if row["first"]:
                print(f"{row['distiller']} {row['mode']}: {row['reason']}")


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A reader of lists of known names with commas."""

    def parsed(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"found '{name}', expected some of {', '.join(known)}")
        return names

    return parsed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agree", description="The authors' training and ours, step by step."
    )
    parser.add_argument("--code", type=Path, required=True, help="a clone of zju-vipa/spot-adaptive-pytorch")
    for key, known in (("pairs", PAIRS), ("distillers", DISTILLERS), ("modes", ALL_SCRIPTS)):
        parser.add_argument(f"--{key}", type=some_of(known), default=list(known), help=",".join(known))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2000, help="training samples")
    parser.add_argument("--csv", type=Path, help="write the rows there, too")
    options = parser.parse_args(arguments)
    for file in [options.code / f"{ALL_SCRIPTS[mode]}.py" for mode in options.modes]:
        if not file.is_file():
            parser.error(f"--code: no {file}; expected a clone of zju-vipa/spot-adaptive-pytorch")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    rows = []
    # They print shapes.
    printed = redirect_stdout(sys.stderr)
    with in_float64(), authors_scripts(options.code, CPU, ALL_SCRIPTS) as scripts, printed:
        for pair in options.pairs:
            for distiller in options.distillers:
                for mode in options.modes:
                    rows.append(row_of(options, scripts[mode], pair, distiller, mode))
                    print(rows[-1], file=sys.stderr, flush=True)
    report(rows, options)
    write_csv(rows, options.csv)
    return 0 if all(float(row["without"] or 0) <= AGREED for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
