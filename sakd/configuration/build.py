"""Parts built from a resolved configuration.

Each ``_target_`` is called with its keys, once they fit its signature. Needs torch alone.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch

from sakd.configuration.prerequisites import TEACHER_KEYS, Config, needs_teacher
from sakd.data import PROMISES, PROMISES_IN_MEMORY, Dataset, assemble, check_promises, check_reader
from sakd.distillers import Distiller
from sakd.errors import ConfigError, SakdError, did_you_mean
from sakd.networks import StagedNet
from sakd.spots import SpotMode
from sakd.streams import initialising
from sakd.training import Execution, Pretraining, Teacher, Trainer, spots_of


def make(node: Config, key: str, *arguments: object, leave: tuple[str, ...] = ()) -> Any:
    """Call ``node``'s ``_target_`` with ``arguments`` and its keys.

    Left out are ``name`` and the keys to ``leave``. Nodes with a ``_target_`` among their values are built
    first; lists and dictionaries are copies.

    Raises ConfigError naming ``key`` if there is no such target, or it does not take the keys or their
    values.
    """
    check_node(node, key, len(arguments), leave)
    return _called(node, key, arguments, ("name", *leave))


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
        raise ConfigError(f"{key}: {error}") from error
    except SakdError:
        raise
    except Exception as error:  # any class may be configured
        raise ConfigError(f"{key}: {error}") from error


def _built(value: Any, key: str) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return _called(value, key, (), ())
    if isinstance(value, dict):
        return {name: _built(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_built(inner, f"{key}.{place}") for place, inner in enumerate(value)]
    return value


def check_node(node: Config, key: str, positional: int = 0, leave: tuple[str, ...] = ()) -> None:
    """Raise ConfigError, as ``make`` does, for what can be wrong before anything is built.

    That is a target, or a key that it does not take. ``positional``: so many arguments stand before the keys.
    """
    _check_call(node, key, positional, ("name", *leave))


def _check_call(node: Config, key: str, positional: int, left: tuple[str, ...]) -> None:
    target = target_of(node, key)
    own = {name: value for name, value in node.items() if name not in left}
    for name in own:
        if name.startswith("_") and name != "_target_":
            raise ConfigError(
                f"{key}.{name}: found a key of Hydra's instantiation, expected _target_ and what it takes"
            )
    _check_keys(target, own, key, positional, besides=[name for name in left if name != "name"])
    for name, value in own.items():
        _check_inner(value, f"{key}.{name}")


def _check_inner(value: Any, key: str) -> None:
    if isinstance(value, dict) and "_target_" in value:
        _check_call(value, key, 0, ())
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_inner(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _check_inner(inner, f"{key}.{place}")


def target_of(node: Config, key: str) -> Callable[..., Any]:
    """The callable that a node's ``_target_`` names.

    Raises ConfigError if that is nothing, or nothing to call.
    """
    if not isinstance(node, dict):
        raise ConfigError(f"{key}: found {node!r}, expected keys and values")
    path = node.get("_target_")
    if not isinstance(path, str):
        raise ConfigError(f"{key}._target_: found {path!r}, expected the import path of what to build")
    try:
        target = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_: cannot import {path}.{nearest_target(path)}") from error
    if not callable(target):
        raise ConfigError(
            f"{key}._target_: found {path}, a {type(target).__name__}, expected what can be called"
        )
    return target


def nearest_target(path: str) -> str:
    """A hint for a path that cannot be imported: ``" Did you mean 'resnet8'?"``, or the empty string."""
    module, _, name = path.rpartition(".")
    try:
        return did_you_mean(name, dir(resolve_name(module)))
    except (ImportError, AttributeError, ValueError):  # the module itself cannot be imported
        return ""


def _check_keys(
    target: Callable[..., Any], node: Config, key: str, positional: int, besides: Sequence[str]
) -> None:
    try:
        parameters = list(inspect.signature(target).parameters.values())[positional:]
    except ValueError:  # some built-in callables do not tell
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = [*(parameter.name for parameter in parameters), *besides]
    for name in node:
        if name != "_target_" and name not in names:
            near = did_you_mean(name, names)
            raise ConfigError(
                f"{key}.{name}: no such key; expected {', '.join(names)}.{near} (~{key}.{name} removes it)"
            )
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in node:
            raise ConfigError(f"{key}.{parameter.name}: found nothing, {node['_target_']} needs it")


@dataclass(frozen=True)
class Parts:
    """Networks, distillers and spot mode that a trainer is made of."""

    student: StagedNet
    teacher: StagedNet | None
    distillers: dict[str, Distiller]
    spot_mode: SpotMode | None
    pretraining: Distiller | None = None  # has a training of its own before the student's


def parts(config: Config, teacher: StagedNet | None = None) -> Parts:
    """Networks, distillers and spot mode, with weights drawn from the streams of ``seed``.

    The teacher is not yet loaded; several students of one may be built for the same ``teacher``. Raises
    ConfigError as ``make`` does.
    """
    seed = config["seed"]
    with initialising(seed, "student"):
        student = make(config["student"], "student")
    if not needs_teacher(config):
        return Parts(student, None, {}, None)
    if teacher is None:
        with initialising(seed, "teacher"):
            teacher = make(config["teacher"], "teacher", leave=TEACHER_KEYS)
    distillers = {}
    for name, node in config["distiller"]["losses"].items():
        with initialising(seed, f"distiller/{name}"):
            distillers[name] = make(node, f"distiller.losses.{name}", student, teacher)
    with initialising(seed, "spot_mode"):
        spots = spots_of(student, teacher, distillers.values())
        spot_mode = make(config["spot_mode"], "spot_mode", spots, student, teacher, leave=("optimizer",))
    return Parts(student, teacher, distillers, spot_mode, _pretraining(config, student, teacher, distillers))


def _pretraining(
    config: Config, student: StagedNet, teacher: StagedNet, distillers: dict[str, Distiller]
) -> Distiller | None:
    node = config["distiller"].get("pretraining")
    if node is None or node.get("loss") is None:
        return None if node is None else distillers[node["name"]]
    return make(node["loss"], "distiller.pretraining.loss", student, teacher)


def shared_stages(student: Config, teacher: Config, loss: Config, key: str) -> list[str] | None:
    """The teacher's stages at which a loss is pretrained, if one pretraining serves all students; else None.

    All are given as nodes; ``key`` is the loss's.
    """
    with initialising(0, "shared_stages"):
        networks = make(student, "student"), make(teacher, "teacher")
        built = make(loss, key, *networks)
    return [spot.teacher for spot in built.spots] if built.pretraining_shared else None


def execution(config: Config) -> Execution:
    return Execution(*(config[key] for key in ("precision", "memory_format", "compile", "fold_batch_norm")))


def trainer(config: Config, built: Parts, device: torch.device, teacher: Teacher | None = None) -> Trainer:
    """A trainer of what was built.

    ``teacher`` is ``built.teacher`` made ready; by default it is made here. Raises ConfigError for an
    optimizer or a schedule whose step needs an argument.
    """
    if teacher is None and built.teacher is not None:
        teacher = Teacher(built.teacher, device=device, execution=execution(config))
    policy, schedule = config["spot_mode"].get("optimizer"), config["schedule"]
    keys = {
        "optimizer": partial(make, config["optimizer"], "optimizer"),
        "schedule": None if schedule is None else partial(make, schedule, "schedule"),
        "seed": config["seed"],
        "device": device,
        "execution": execution(config),
    }
    pretrains = config["distiller"].get("pretrains")
    if pretrains is not None:
        built_trainer = Pretraining(built.student, teacher, pretrains, built.distillers[pretrains], **keys)
    else:
        policy_optimizer = None if policy is None else partial(make, policy, "spot_mode.optimizer")
        built_trainer = Trainer(
            built.student,
            teacher,
            built.distillers,
            built.spot_mode,
            policy_optimizer=policy_optimizer,
            **keys,
        )
    steps = {"optimizer": built_trainer.optimizer, "schedule": built_trainer.schedules.get("student")}
    for key, part in steps.items():
        takes = [] if part is None else list(inspect.signature(type(part).step).parameters.values())[1:]
        if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in takes):
            raise ConfigError(
                f"{key}._target_: found {type(part).__name__}, expected one whose step() needs no argument"
            )
    return built_trainer


# Keys of a data set's node that are neither for its reader nor promises.
ABOUT_DATA = ("_target_", "reads", "ignore_others", "recipe")


def promises(config: Config) -> dict[str, Any]:
    """Keys and values in which the data set's node says what its images are.

    Raises ConfigError if a key is missing, or nobody's, or no images, or not the reader's, could satisfy it.
    """
    node = config["dataset"]
    reads = _read_keys(node)
    promised = PROMISES if "augmentation" in reads else (*PROMISES, *PROMISES_IN_MEMORY)
    for key in promised:
        if key not in node:
            raise ConfigError(
                f"dataset.{key}: found nothing, every data set needs it.{did_you_mean(key, node)}"
            )
    known = (*promised, *reads, *ABOUT_DATA)
    for key in node:
        if key not in known and not node.get("ignore_others"):
            raise ConfigError(
                f"dataset.{key}: no such key; expected a promise ({', '.join(promised)}) or one that "
                f"dataset.reads names ({', '.join(reads) or 'none'}).{did_you_mean(key, known)}"
                f" (~dataset.{key} removes it)"
            )
    own = {key: node[key] for key in promised}
    check_promises(**own)
    check_node(_reader(node), "dataset")
    check_reader(target_of(node, "dataset"), own)
    return own


def dataset(config: Config) -> Dataset:
    """Read the images with the node's ``_target_``, which gets the keys that ``reads`` names.

    Raises ConfigError or DataError unless all promises are kept.
    """
    promised = promises(config)
    train, test = make(_reader(config["dataset"]), "dataset")
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
