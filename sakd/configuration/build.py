"""Parts built from a resolved configuration.

Each ``_target_`` is called with its keys, once they fit its signature. Needs torch alone.
"""

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, MaxLen, MinLen
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sakd.configuration.fits import NAMED, check_node, target_of
from sakd.configuration.prerequisites import TEACHER_KEYS, Config, needs_teacher, product_node
from sakd.data import (
    OPTIONAL_IN_MEMORY,
    PROMISES,
    PROMISES_IN_MEMORY,
    Dataset,
    View,
    assemble,
    check_promises,
    check_reader,
)
from sakd.data.randaugment import check_channels
from sakd.distillers import Distiller
from sakd.errors import ConfigError, SakdError, did_you_mean
from sakd.names import START_KEYS
from sakd.networks import StagedNet
from sakd.networks.checkpoints import load_weights, read_weights
from sakd.networks.pretrained import published
from sakd.ranges import (
    LARGEST_RATE,
    BelowOne,
    Count,
    Natural,
    NotNegative,
    Positive,
    Rate,
    Share,
    in_order,
)
from sakd.spots import SpotMode
from sakd.streams import initialising
from sakd.training import Execution, Pretraining, Schedule, Task, Teacher, Trainer, spots_of
from sakd.training.schedules import Rates

# What nodes have beside their constructors' keys.
OF_STUDENTS = (*NAMED, *START_KEYS)
OF_TEACHERS = (*NAMED, *TEACHER_KEYS)
OF_SPOT_MODES = (*NAMED, "optimizer")
OF_SCHEDULES = ("by", "warmup_epochs", "warmup_start")
# What a schedule takes that is so many of its steps: written in epochs, whatever it goes on by.
LENGTHS = (
    *("milestones", "step_size", "step_size_up", "step_size_down"),
    *("T_max", "T_0", "total_iters", "total_steps"),
)


def make(
    node: Config, key: str, *arguments: object, leave: tuple[str, ...] = NAMED, kind: type = object
) -> Any:
    """Call ``node``'s ``_target_`` with ``arguments`` and its keys, but for those to ``leave``.

    Nodes with a ``_target_`` among their values are built first; lists and dictionaries are copies.

    Raises ConfigError naming ``key`` if there is no such target, it does not take the keys or their values,
    or what it makes is not of the ``kind``.
    """
    check_node(node, key, len(arguments), leave)
    made = _called(node, key, arguments, leave)
    if not isinstance(made, kind):
        raise ConfigError(
            f"{key}._target_: found {node['_target_']}, which makes a {type(made).__name__}, expected a "
            f"{kind.__name__}"
        )
    return made


def _called(node: Config, key: str, arguments: tuple[object, ...], left: tuple[str, ...]) -> Any:
    keys = {
        name: _built(value, f"{key}.{name}")
        for name, value in node.items()
        if name != "_target_" and name not in left
    }
    try:
        return target_of(node, key)(*arguments, **keys)
    except ConfigError as error:
        if key in str(error):
            raise
        raise ConfigError(f"{key}{_joint(str(error), node)}{error}") from error
    except SakdError:
        raise
    except Exception as error:  # any class may be configured
        raise ConfigError(_refused(node, key, keys, error)) from error


def _joint(message: str, node: Config) -> str:
    """A dot where a message begins with one of the node's own keys, so that its dotted name stands there."""
    first = re.match(r"\w*", message)[0]
    return "." if first in node else ": "


def _refused(node: Config, key: str, keys: Mapping[str, Any], error: Exception) -> str:
    """What a constructor's own error says, in one line, with the key that it speaks of, or else with all."""
    text = " ".join(str(error).split())
    named = [name for name in keys if re.search(rf"\b{re.escape(name)}\b", text)]
    if len(named) == 1:
        (name,) = named
        found = f"{key}.{name}: found {node[name]!r}"
    else:
        values = ", ".join(f"{key}.{name}={node[name]!r}" for name in keys)
        found = f"{key}: found {values or node['_target_']}"
    return f"{found}, which {node['_target_']} refuses ({type(error).__name__}: {text})"


def _built(value: Any, key: str) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return _called(value, key, (), ())
    if isinstance(value, dict):
        return {name: _built(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_built(inner, f"{key}.{place}") for place, inner in enumerate(value)]
    return value


@dataclass(frozen=True)
class Parts:
    """Networks, distillers and spot mode that a trainer is made of."""

    student: StagedNet
    teacher: StagedNet | None
    distillers: dict[str, Distiller]
    spot_mode: SpotMode | None
    pretraining: Distiller | None = None  # has a training of its own before the student's


def parts(config: Config, teacher: StagedNet | None = None, start: str = "student") -> Parts:
    """Networks, distillers and spot mode, with weights drawn from the streams of ``seed``.

    The teacher is not yet loaded; several students of one may be built for the same ``teacher``. ``start``:
    the node in which it is written where the student's weights begin. Raises ConfigError as ``make`` does.
    """
    seed = config["seed"]
    with initialising(seed, "student"):
        student = make(config["student"], "student", leave=OF_STUDENTS, kind=StagedNet)
    _start(student, config["student"], start)
    if not needs_teacher(config):
        return Parts(student, None, {}, None)
    if teacher is None:
        with initialising(seed, "teacher"):
            teacher = make(config["teacher"], "teacher", leave=OF_TEACHERS, kind=StagedNet)
    product = config["distiller"].get("product")
    if product is not None:
        with initialising(seed, "product"):
            head = make(config["teacher"], "teacher", leave=OF_TEACHERS, kind=StagedNet)
            student = make(product, "distiller.product", student, head, leave=(), kind=StagedNet)
    distillers = {}
    for name, node in config["distiller"]["losses"].items():
        with initialising(seed, f"distiller/{name}"):
            key = f"distiller.losses.{name}"
            distillers[name] = make(node, key, student, teacher, leave=(), kind=Distiller)
    with initialising(seed, "spot_mode"):
        spots = spots_of(student, teacher, distillers.values())
        spot_mode = make(
            config["spot_mode"], "spot_mode", spots, student, teacher, leave=OF_SPOT_MODES, kind=SpotMode
        )
    return Parts(student, teacher, distillers, spot_mode, _pretraining(config, student, teacher, distillers))


def student_network(config: Config) -> StagedNet:
    """The network that a run leaves, with weights drawn from the global generator.

    Raises ConfigError as ``make``.
    """
    return make(product_node(config), "student", leave=OF_STUDENTS, kind=StagedNet)


def _start(student: StagedNet, node: Config, key: str) -> None:
    """Give a student the weights that it starts from, where there are any."""
    path = weights_file(node, key)
    if path is not None:
        asked = node.get("checkpoint_part")
        load_weights(student, read_weights(path), node["name"], path, asked, new_head=True)


def weights_file(node: Config, key: str) -> Path | None:
    """The file that a network's weights are from: its checkpoint, or published ones, fetched if need be.

    Raises CheckpointError for published ones that there are not, or that cannot be fetched.
    """
    if node.get("pretrained") is not None:
        build, arguments = node.get("build", node["_target_"]), node.get("arguments", {})
        return published(build, arguments, node["pretrained"], f"{key}.pretrained")
    return None if node.get("checkpoint") is None else Path(node["checkpoint"])


def _pretraining(
    config: Config, student: StagedNet, teacher: StagedNet, distillers: dict[str, Distiller]
) -> Distiller | None:
    node = config["distiller"].get("pretraining")
    if node is None or node.get("loss") is None:
        return None if node is None else distillers[node["name"]]
    return make(node["loss"], "distiller.pretraining.loss", student, teacher, leave=(), kind=Distiller)


def shared_stages(student: Config, teacher: Config, loss: Config, key: str) -> list[str] | None:
    """The teacher's stages at which a loss is pretrained, if one pretraining serves all students; else None.

    All are given as nodes; ``key`` is the loss's.
    """
    with initialising(0, "shared_stages"):
        networks = (
            make(student, "student", leave=OF_STUDENTS, kind=StagedNet),
            make(teacher, "teacher", kind=StagedNet),
        )
        built = make(loss, key, *networks, leave=(), kind=Distiller)
    return [spot.teacher for spot in built.spots] if built.pretraining_shared else None


def task(config: Config) -> Task:
    """What is learned from labels; of a teacher and of a configuration from before, cross-entropy."""
    return Task(**config.get("task", {}))


def execution(config: Config) -> Execution:
    return Execution(*(config[key] for key in ("precision", "memory_format", "compile", "fold_batch_norm")))


def trainer(
    config: Config,
    built: Parts,
    device: torch.device,
    teacher: Teacher | None = None,
    within: str = "",
) -> Trainer:
    """A trainer of what was built.

    ``teacher`` is ``built.teacher`` made ready; by default it is made here. ``within``: the node, with a dot,
    that its optimizer and schedule are written in, where that is not the configuration itself. Raises
    ConfigError for an optimizer or a schedule that cannot be built.
    """
    if teacher is None and built.teacher is not None:
        teacher = Teacher(built.teacher, device=device, execution=execution(config))
    policy, paced = config["spot_mode"].get("optimizer"), config["schedule"]
    keys = {
        "optimizer": partial(make, config["optimizer"], f"{within}optimizer", leave=(), kind=Optimizer),
        "schedule": None if paced is None else schedule(paced, f"{within}schedule"),
        "clip_gradients": config.get("clip_gradients"),
        "accumulate": config.get("accumulate", 1),
        "seed": config["seed"],
        "device": device,
        "execution": execution(config),
    }
    pretrains = config["distiller"].get("pretrains")
    policy_optimizer = None
    if policy is not None:
        policy_optimizer = partial(make, policy, "spot_mode.optimizer", leave=(), kind=Optimizer)
    with _told_within(within):
        if pretrains is not None:
            return Pretraining(built.student, teacher, pretrains, built.distillers[pretrains], **keys)
        return Trainer(
            built.student,
            teacher,
            built.distillers,
            built.spot_mode,
            policy_optimizer=policy_optimizer,
            task=task(config),
            record_spots=config["record_spots"],
            ema=config.get("ema"),
            top5=config.get("top5", False),
            **keys,
        )


@contextmanager
def _told_within(within: str) -> Iterator[None]:
    """Let what a trainer refuses of a recipe's keys be told by where they are written."""
    try:
        yield
    except ConfigError as error:
        if re.match(r"(optimizer|precision|accumulate)\b", str(error)):
            raise ConfigError(f"{within}{error}") from error
        raise


def schedule(node: Config, key: str) -> Schedule:
    """What learning rates are to do by a schedule's node, of which ``key`` is the path."""

    def built(optimizer: Optimizer, moves: int) -> LRScheduler:
        scaled = {name: _times(value, moves) if name in LENGTHS else value for name, value in node.items()}
        return make(scaled, key, optimizer, leave=OF_SCHEDULES, kind=LRScheduler)

    warm_up = {name: node[name] for name in OF_SCHEDULES[1:] if name in node}
    return Schedule(built, node.get("by") == "step", **warm_up)


def _times(length: Any, moves: int) -> Any:
    return [moves * each for each in length] if isinstance(length, list) else length and moves * length


# What constructors of optimizers, schedules and transforms take, whose packages tell no range.
TRAINING_RANGES = {
    "lr": Rate,
    "max_lr": Rate,
    "base_lr": Rate,
    "eta_min": Rate,
    "momentum": BelowOne,
    "max_momentum": BelowOne,
    "base_momentum": BelowOne,
    "weight_decay": NotNegative,
    "dampening": Share,
    "betas": tuple[BelowOne, BelowOne],
    "alpha": Share,
    "rho": Share,
    "eps": float | None | tuple[float | None, float],  # the last: Adafactor's
    "gamma": NotNegative,
    "factor": Share,
    "start_factor": Share,
    "end_factor": Share,
    "pct_start": Share,
    "power": NotNegative,
    "milestones": in_order(Natural),
    "step_size": Count,
    "T_max": Count,
    "T_0": Count,
    "T_mult": Count,
    "total_iters": Natural,
    "total_steps": Count | None,
    "epochs": Count | None,
    "steps_per_epoch": Count | None,
    "last_epoch": Literal[-1],
}
Side = Annotated[int, Ge(1), Le(2**14)]  # of an image, in pixels
TRANSFORM_RANGES = {
    "p": Share,
    "size": Side | Annotated[list[Side], MinLen(1), MaxLen(2)],
    "scale": Annotated[in_order(Positive), MinLen(2), MaxLen(2)],
    "ratio": Annotated[in_order(Positive), MinLen(2), MaxLen(2)],
}
TRIED_EPOCHS = 1000  # no more are walked through
TRIED_STEPS = 3  # an epoch's, where a schedule goes on by step


def check_parts(config: Config) -> None:
    """Raise ConfigError unless every node can be imported and takes its keys and their values.

    Networks are not built, and no data is read. Each node is looked at once, however many cells of a sweep
    have it.
    """
    _check_once(json.dumps(config["student"]), "student", 0, OF_STUDENTS)
    _check_once(json.dumps(config["teacher"]), "teacher", 0, OF_TEACHERS)
    losses = {f"distiller.losses.{name}": node for name, node in config["distiller"]["losses"].items()}
    pretraining = config["distiller"].get("pretraining")
    if pretraining is not None and pretraining.get("loss") is not None:
        losses["distiller.pretraining.loss"] = pretraining["loss"]
    if config["distiller"].get("product") is not None:
        losses["distiller.product"] = config["distiller"]["product"]
    for key, node in losses.items():  # all are called with student and teacher
        _check_once(json.dumps(node), key, 2, ())
    distillers = {
        n: target_of(node, f"distiller.losses.{n}") for n, node in config["distiller"]["losses"].items()
    }
    task(config).check_distillers(distillers)
    _check_views(losses, config["dataset"]["channels"])
    _check_once(json.dumps(config["spot_mode"]), "spot_mode", 3, OF_SPOT_MODES)
    _check_policy(config["spot_mode"])
    _check_data(json.dumps(config["dataset"]))
    _try_training(json.dumps([config["optimizer"], config["schedule"]]), config["epochs"])
    policy = config["spot_mode"].get("optimizer")
    if policy is not None:
        nodes = json.dumps([policy, config["schedule"]])
        _try_training(nodes, config["epochs"], "spot_mode.optimizer")
    recipes = {"teacher.training": config["teacher"]["training"], "distiller.pretraining": pretraining}
    for key, recipe in recipes.items():
        if recipe is not None:
            nodes = json.dumps([recipe["optimizer"], recipe["schedule"]])
            _try_training(nodes, recipe["epochs"], f"{key}.optimizer", f"{key}.schedule")


def check_networks(config: Config) -> None:
    """Raise ConfigError unless the networks can be built, which is tried once for each, without memory."""
    _try_network(json.dumps(config["student"]), "student", OF_STUDENTS)
    if needs_teacher(config):
        _try_network(json.dumps(config["teacher"]), "teacher", OF_TEACHERS)
        if config["distiller"].get("product") is not None:
            _try_network(json.dumps(product_node(config)), "distiller.product", OF_STUDENTS)


@lru_cache(maxsize=4096)
def _check_once(node: str, key: str, positional: int, leave: tuple[str, ...]) -> None:
    check_node(json.loads(node), key, positional, leave)


def _check_views(losses: Mapping[str, Config], channels: int) -> None:
    """Raise ConfigError for further views that losses ask for and images of so many channels cannot have."""
    for key, node in losses.items():
        if getattr(target_of(node, key), "uses_views", False):
            for place, each in enumerate(node.get("views", ())):
                view = make(each, f"{key}.views.{place}", leave=(), kind=View)
                if view.rand_augment is not None:
                    own = asdict(view.rand_augment)
                    check_channels(f"{key}.views.{place}.rand_augment", own, channels)


def _check_policy(spot_mode: Config) -> None:
    """Raise ConfigError unless a spot mode that learns has an optimizer, and one that does not has none."""
    learns = getattr(target_of(spot_mode, "spot_mode"), "learns", None)  # of a function it is not known
    has = spot_mode.get("optimizer") is not None
    if learns is True and not has:
        raise ConfigError(f"spot_mode.optimizer: found nothing, {spot_mode['_target_']} learns and needs it")
    if learns is False and has:
        raise ConfigError(
            f"spot_mode.optimizer: no such key; {spot_mode['_target_']} learns nothing (~spot_mode.optimizer "
            "removes it)"
        )


@lru_cache(maxsize=4096)
def _check_data(node: str) -> None:
    promises({"dataset": json.loads(node)})


@lru_cache(maxsize=4096)
def _try_network(node: str, key: str, leave: tuple[str, ...]) -> None:
    with torch.device("meta"), initialising(0, key):
        make(json.loads(node), key, leave=leave, kind=StagedNet)


@lru_cache(maxsize=4096)
def _try_training(nodes: str, epochs: int, key: str = "optimizer", schedule_key: str = "schedule") -> None:
    """Let an optimizer and its schedule, as JSON, go through the epochs with a weight of their own.

    So what their constructors let pass is found, too: a step that divides by a zero, a learning rate that
    leaves all bounds.
    """
    optimizer_node, schedule_node = json.loads(nodes)
    check_node(optimizer_node, key, 1, (), TRAINING_RANGES)
    if schedule_node is not None:
        check_node(schedule_node, schedule_key, 1, OF_SCHEDULES, TRAINING_RANGES)
        _check_warm_up(schedule_node.get("warmup_epochs", 0), epochs, schedule_key)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    optimizer = make(optimizer_node, key, [weight], leave=(), kind=Optimizer)
    _check_steps_alone(optimizer, key)
    if schedule_node is None:
        _try_step(optimizer, optimizer_node, key)
        return
    rates = Rates(optimizer, schedule(schedule_node, schedule_key), TRIED_STEPS)
    _check_steps_alone(rates.schedule, schedule_key)
    moves = TRIED_STEPS if rates.by_step else 1
    own_keys = {name: value for name, value in schedule_node.items() if name not in OF_SCHEDULES}
    for move in range(1, 1 + min(epochs, TRIED_EPOCHS) * moves):
        _try_step(optimizer, optimizer_node, key)
        _try_step(rates, own_keys, schedule_key)
        epoch, rate = math.ceil(move / moves), optimizer.param_groups[0]["lr"]
        if move < epochs * moves and not 0 <= rate <= LARGEST_RATE:
            values = ", ".join(f"{schedule_key}.{name}={value!r}" for name, value in schedule_node.items())
            raise ConfigError(
                f"{schedule_key}: found {values}, with which {key}.lr is {rate:g} after epoch {epoch}; "
                f"expected at least 0 and at most {LARGEST_RATE:g}"
            )


def _check_warm_up(warmup_epochs: float, epochs: int, key: str) -> None:
    if warmup_epochs > epochs:
        raise ConfigError(
            f"{key}.warmup_epochs: found {warmup_epochs}, more than {key.removesuffix('schedule')}epochs, "
            f"which is {epochs}; expected at most that"
        )


def _check_steps_alone(part: Optimizer | LRScheduler, key: str) -> None:
    takes = list(inspect.signature(type(part).step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in takes):
        raise ConfigError(
            f"{key}._target_: found {type(part).__name__}, expected one whose step() needs no argument"
        )


def _try_step(part: Optimizer | Rates, node: Config, key: str) -> None:
    try:
        part.step()
    except Exception as error:  # any class may be configured
        keys = {name: value for name, value in node.items() if name != "_target_"}
        raise ConfigError(_refused(node, key, keys, error)) from error


# Keys of a data set's node that are neither for its reader nor promises.
ABOUT_DATA = ("_target_", "reads", "ignore_others", "recipe")


def promises(config: Config) -> dict[str, Any]:
    """Keys and values in which the data set's node says what its images are.

    Raises ConfigError if a key is missing, or nobody's, or no images, or not the reader's, could satisfy it.
    """
    node = config["dataset"]
    reads = _read_keys(node)
    in_memory = "augmentation" not in reads
    needed = (*PROMISES, *PROMISES_IN_MEMORY) if in_memory else PROMISES
    promised = (*needed, *OPTIONAL_IN_MEMORY) if in_memory else needed
    for key in needed:
        if key not in node:
            raise ConfigError(
                f"dataset.{key}: found nothing, every data set needs it whose dataset.reads names no "
                f"augmentation.{did_you_mean(key, node)}"
            )
    known = (*promised, *reads, *ABOUT_DATA)
    for key in node:
        if key not in known and not node.get("ignore_others"):
            raise ConfigError(
                f"dataset.{key}: no such key; expected a promise ({', '.join(promised)}) or one that "
                f"dataset.reads names ({', '.join(reads) or 'none'}).{did_you_mean(key, known)}"
                f" (~dataset.{key} removes it)"
            )
    own = {key: node[key] for key in promised if key in node}
    check_promises(**own)
    reader = _reader(node)
    check_node(reader, "dataset", leave=(), ranges=TRANSFORM_RANGES)
    target = target_of(node, "dataset")
    check_reader(target, own)
    if hasattr(target, "calls"):
        for key, called in target.calls(**{key: node[key] for key in reads}).items():
            check_node(called, f"dataset.{key}", positional=1, leave=())
    for key in reads:  # transforms say themselves what they refuse
        _built(node[key], f"dataset.{key}")
    return own


def dataset(config: Config) -> Dataset:
    """Read the images with the node's ``_target_``, which gets the keys that ``reads`` names.

    Raises ConfigError or DataError unless all promises are kept.
    """
    promised = promises(config)
    train, test = make(_reader(config["dataset"]), "dataset", leave=())
    return assemble(train, test, **promised)


def _reader(node: Config) -> Config:
    return {"_target_": node.get("_target_")} | {key: node[key] for key in _read_keys(node)}


def _read_keys(node: Config) -> list[str]:
    """Keys of a data set's node that its reader gets; a promise may be among them."""
    reads = node.get("reads", [])
    if not isinstance(reads, list) or not all(isinstance(key, str) for key in reads):
        raise ConfigError(f"dataset.reads: found {reads!r}, expected a list of keys")
    for key in reads:
        if key not in node:
            near = did_you_mean(key, node)
            raise ConfigError(f"dataset.{key}: found nothing, but dataset.reads names it.{near}")
    return reads


def device(asked: str) -> torch.device:
    """The device of that name, or for ``auto`` the GPU where there is one.

    Raises ConfigError if the machine has no such device.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: found {asked}, but this machine has no CUDA device; expected cpu or auto")
    found = torch.device(asked)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: found {asked}, expected an index below {torch.cuda.device_count()}")
    return found
