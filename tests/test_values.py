"""Values that nobody can use, made up for every key of every option.

Each is refused in one line with the key's name, before any data is read.
"""

import math
import pickle
import random
import re
from collections.abc import Iterator
from functools import cache

import pytest
from omegaconf import DictConfig, OmegaConf

from sakd.configuration.compose import resolve, sweep
from sakd.errors import ConfigError, SakdError
from sakd.imports import find
from sakd.runs.job import check_before_work
from sakd.sweeps import here, launcher_of, plan
from sakd.sweeps import launch as launch_sweep
from tests.conftest import compose_lazily
from tests.test_config import names

# Made-up values

BAD = {  # by kind
    "text": "zzz",
    "number": 3,
    "fraction": 0.5,
    "boolean": True,
    "negative": -1,
    "huge": 1e308,
    "huge and whole": 10**30,
    "not a number": math.nan,
    "infinite": math.inf,
    "empty text": "",
    "empty list": [],
    "list": ["zzz"],
    "list of numbers": [0.5, -1],
    "keys": {"zzz": 1},
    "null": None,
    "added": 1,  # inside the key, under a name that nobody takes
    "named": "zzz",  # inside the key, as its name, which networks have
}
INSIDE = {"added": "zzz", "named": "name"}
LEGITIMATE = (  # kinds and keys that pass the checks, and why
    ("null", r"(.*\.)?schedule", "the learning rate stays"),
    ("null", r"threads|teacher\.checkpoint|dataset\.(train|test)_samples|hydra\.launcher\..*", "a default"),
    ("null", r"distiller\.(pretraining|reference)|distiller\.pretraining\.loss", "there is none"),
    ("null", r"dataset\.(mean|std)", "those of the training images"),
    ("boolean", r"dataset\.in_memory", "or auto"),
    ("(empty )?text", r"dataset\.(train|test)\.split", "torchvision knows, once it opens the images"),
    ("number", r"threads|dataset\.(train|test)_samples|hydra\.launcher\.processes", "so many"),
    ("text", r".*\.name|tracking\.experiment|runs|dataset\.(root|train|test)", "a name, or a path"),
    ("text", r"distiller\.reference\..*|.*\.family", "a text"),
    ("empty list", r"(.*\.)?milestones", "the learning rate stays"),
    ("empty list", r".*\.view_temperatures", "views are compared at none"),
    ("empty list", r"hydra\.launcher\.setup|distiller\.reference\.authors|dataset\.reads", "none of them"),
    ("negative", r"spot_mode\.(same|other)_family_bias", "the student has the better start"),
    ("list", r"distiller\.reference\.authors|hydra\.launcher\.setup", "texts"),
    ("number", r"dataset\.evaluation\.resize\.size", "of the shorter side, as a list of one"),
    ("text", r"hydra\.launcher\.(partition|account|qos|constraint|nodelist|exclude)", "SLURM knows"),
    ("keys", r"hydra\.launcher\.additional_parameters", "SLURM knows"),
    ("fraction", r".*\.(ramp|curriculum|warmup)_epochs", "half an epoch"),
    ("fraction|number", r"(.*\.)?clip_gradients", "a norm"),
    ("fraction", "ema", "a decay"),
    ("negative", r".*\.initial_logit", "of a sigmoid"),
    (
        "null|fraction",
        r"dataset\.test(_fraction)?",
        "a test split shows where the images are",
    ),
    ("fraction", r"hydra\.launcher\.mem_gb", "half a gigabyte"),
)

SMALL = {"teacher": "resnet8", "student": "resnet8"}
SCHEDULE = "torch.optim.lr_scheduler"
TRAININGS = {
    "one cycle": ("optimizer=adamw", "schedule=onecycle"),
    "SGD": ("+optimizer.nesterov=true", "+optimizer.dampening=0"),
    "AdamW": (
        "optimizer._target_=torch.optim.AdamW",
        "~optimizer.momentum",
        *("+optimizer.betas=[0.9,0.999]", "+optimizer.eps=1e-8"),
    ),
    "StepLR": (
        f"schedule._target_={SCHEDULE}.StepLR",
        *("~schedule.milestones", "+schedule.step_size=5"),
    ),
    "CosineAnnealingLR": (
        f"schedule._target_={SCHEDULE}.CosineAnnealingLR",
        *("~schedule.milestones", "~schedule.gamma", "+schedule.T_max=20", "+schedule.eta_min=0.001"),
    ),
}


def line_of(option: str) -> tuple[str, ...]:
    """The command line that has an option, with networks that are soon built."""
    group, _, name = option.partition("=")
    if group == "training":
        return (*(f"{key}={value}" for key, value in SMALL.items()), *TRAININGS[name])
    of_data = {"dataset": "cifar10"} if group == "student" else {}
    return tuple(f"{key}={value}" for key, value in (SMALL | of_data | {group: name}).items())


OPTIONS = (
    *(
        f"{group}={name}"
        for group in ("dataset", "distiller", "spot_mode", "tracking")
        for name in names(group)
    ),
    *(f"student={name}" for name in ("vgg8_imagenet", "torchvision_mobilenet_v2")),
    *(f"training={name}" for name in TRAININGS),
)


@cache
def pickled(option: str) -> bytes:
    return pickle.dumps(compose_lazily(*line_of(option)))


def composed(option: str) -> DictConfig:
    return pickle.loads(pickled(option))


def keys_of(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if prefix:
        yield prefix, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from keys_of(value, f"{prefix}.{key}" if prefix else key)


def own_keys(option: str) -> Iterator[tuple[str, object]]:
    """Keys that the option's group has, with their values; those of all others come with one option."""
    cfg = composed(option)
    group = option.partition("=")[0]
    groups = {"training": ("optimizer", "schedule")}.get(group, (group,))
    for key, written in keys_of(OmegaConf.to_container(cfg, resolve=False)):
        first, good = key.partition(".")[0], OmegaConf.select(cfg, key)
        if isinstance(good, DictConfig) and not isinstance(written, dict):
            continue  # another node's keys, which stand there themselves
        everywhere = option == "dataset=digits" and first not in ("distiller", "spot_mode", "tracking")
        if first in groups or everywhere:
            yield key, good


def is_bad(kind: str, good: object, key: str) -> bool:
    """Tell whether a kind is none that a key with such a value takes."""
    bad = BAD[kind]
    if kind in INSIDE:
        return isinstance(good, DictConfig) and INSIDE[kind] not in good
    if isinstance(good, bool) or good is None:
        return type(bad) is not type(good)
    if isinstance(good, (int, float)):
        return kind != "number" and (kind != "fraction" or isinstance(good, int))
    if isinstance(good, str):
        return kind != "text" or key.endswith(("_target_", "where")) or "." not in key
    return True


def is_legitimate(kind: str, key: str) -> bool:
    return any(re.fullmatch(kinds, kind) and re.fullmatch(keys, key) for kinds, keys, _ in LEGITIMATE)


def cases(options: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Option, key and kind."""
    return [
        (option, f"{key}.{INSIDE[kind]}" if kind in INSIDE else key, kind)
        for option in options
        for key, good in own_keys(option)
        for kind in BAD
        if is_bad(kind, good, key)
    ]


def told(option: str, changes: dict[str, object]) -> str | None:
    """What is said of changed values; None where all checks let them pass."""
    cfg = composed(option)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    try:
        check_before_work(resolve(cfg))
    except SakdError as error:
        return str(error)
    return None


def wrong(option: str, key: str, kind: str) -> str | None:
    """What is wrong with what is said of a bad value; None where nothing is."""
    said = told(option, {key: BAD[kind]})
    if said is None:
        return None if is_legitimate(kind, key) else "passed"
    return None if "\n" not in said and key in said else said


def test_bad_values_are_refused_by_the_key_s_name():
    some = ("dataset=digits", "dataset=imagenet", "distiller=ft", "spot_mode=anti", "tracking=mlflow")
    drawn = random.Random(11).sample(cases(some), 150)
    assert [(case, said) for case in drawn if (said := wrong(*case)) is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_all_bad_values_of_an_option_are_refused_by_the_key_s_name(option):
    """With all options some 9,700 values."""
    assert [(case, said) for case in cases((option,)) if (said := wrong(*case)) is not None] == []


def launchers_cases() -> Iterator[tuple[dict[str, object], str, str]]:
    """Keys of a launcher, one of them, and a kind."""
    for launcher in names("hydra/launcher"):
        keys = sweep([f"hydra/launcher={launcher}", "seed=0,1"]).launcher
        yield keys, "hydra.launcher.zzz", "added"
        for key, good in keys.items():
            name = f"hydra.launcher.{key}"
            yield from ((keys, name, kind) for kind in BAD if kind not in INSIDE and is_bad(kind, good, name))


def told_by_launcher(keys: dict[str, object]) -> str:
    try:
        launcher_of(keys)
    except ConfigError as error:
        return str(error)
    return "passed"


def test_bad_values_of_launchers_are_refused_by_the_key_s_name():
    said = {
        (kind, name): told_by_launcher({**keys, name.rpartition(".")[2]: BAD[kind]})
        for keys, name, kind in launchers_cases()
        if not is_legitimate(kind, name)
    }
    named = r"{}: |hydra/launcher: found .*, expected slurm or local"
    assert [
        (case, text) for case, text in said.items() if not re.match(named.format(re.escape(case[1])), text)
    ] == []


# Mistakes that were made

MISTAKES = [
    ("training=SGD", {"optimizer.nesterov": "maybe"}, "found 'maybe', expected true or false"),
    ("training=SGD", {"optimizer.momentum": 2.5}, "found 2.5, expected a number from 0 to below 1"),
    ("training=SGD", {"optimizer.momentum": True}, "found True, expected a number from 0 to below 1"),
    ("training=SGD", {"optimizer.momentum": "high"}, "found 'high', expected a number from 0 to below 1"),
    ("training=SGD", {"optimizer.lr": 1e308}, r"found 1e\+308, expected a number from 0 to 1e\+06"),
    ("training=SGD", {"optimizer": "adam"}, "found 'adam', .*optimizer\\._target_=torch\\.optim\\.Adam$"),
    ("training=AdamW", {"optimizer.betas": [0.9, 2]}, r"found \[0\.9, 2\], expected a list of 2: "),
    *(
        (
            "dataset=digits",
            {"schedule.milestones": value},
            "found .*, expected a list of whole numbers .*order",
        )
        for value in (["a"], [0.5], [-1], [5, 3], "", 3)
    ),
    ("dataset=digits", {"schedule.gamma": -1}, "found -1, expected a number of at least 0"),
    ("dataset=digits", {"schedule.gamma": None}, "found None, expected a number of at least 0"),
    ("training=StepLR", {"schedule.step_size": 0}, "found 0, expected a whole number of at least 1"),
    ("spot_mode=adaptive", {"spot_mode.optimizer.lr": True}, "found True"),
    ("spot_mode=fixed", {"spot_mode.optimizer": {"_target_": "torch.optim.SGD"}}, "no such key; .*Fixed "),
    ("dataset=digits", {"student.in_channels": True}, "found True, expected a whole number"),
    ("dataset=digits", {"teacher.training.label_smoothing": 0.1}, "no such key; expected one of seed"),
    ("dataset=digits", {"teacher.training.optimizer.momentum": "high"}, "found 'high'"),
    ("distiller=ft", {"distiller.pretraining.optimizer.momentum": "high"}, "found 'high'"),
    ("spot_mode=anti", {"spot_mode.optimizer.momentum": "high"}, "found 'high'"),
    ("distiller=kd", {"distiller.temperature": 2.0}, "no such key"),
    ("tracking=mlflow", {"tracking.tags": {"group": "a"}}, "no such key; expected one of name, uri, exp"),
    ("tracking=mlflow", {"tracking.uri": "ftp://x/y"}, "found 'ftp://x/y', expected a store such as"),
    *(
        ("tracking=mlflow", {"tracking.uri": uri}, f"found '{re.escape(uri)}', expected {place}")
        for place, uris in {
            "a file, as sqlite": ("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///?x=1"),
            "a server, as http": ("http://", "https:///x", "http://a b", "http://host:99999", "http://a:b"),
        }.items()
        for uri in uris
    ),
    (
        "dataset=digits",
        {"dataset.mean": [125.3]},
        r"found \[125\.3\], expected a list of numbers from 0 to 1",
    ),
    ("dataset=digits", {"dataset.std": [63]}, r"found \[63\], expected a list of numbers from 1e-06 to 1"),
    ("dataset=digits", {"dataset.std": [1e-300]}, "found .*, expected a list of numbers from 1e-06 to 1"),
    ("dataset=digits", {"student._target_": 3}, "found 3, expected the import path"),
    ("dataset=digits", {"student._target_": ["a"]}, r"found \['a'\], expected the import path"),
    ("dataset=digits", {"student._target_": "sakd.networks"}, "found sakd.networks, a module"),
    (
        "dataset=digits",
        {"student._target_": "builtins.dict"},
        r"found builtins\.dict, which makes a dict, expected a StagedNet",
    ),
    ("dataset=digits", {"student._partial_": True}, "found a key of Hydra's instantiation"),
    ("dataset=digits", {"threads": 100_000}, "found 100000, expected a whole number from 1 to 1,024 or null"),
    ("student=vgg8_imagenet", {"student.dropout": 2}, "found 2, expected a number from 0 to 1"),
    (
        "student=torchvision_mobilenet_v2",
        {"student.build": "torchvision.models.googlenet.Inception"},
        "cannot import .*there is no 'Inception'",
    ),
]


@pytest.mark.parametrize(("option", "changes", "message"), MISTAKES, ids=lambda part: str(part)[:60])
def test_a_mistake_is_told_by_its_key(option, changes, message):
    (key,) = changes
    assert re.match(rf"{re.escape(key)}: {message}", told(option, changes) or "passed")


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("training=SGD", {"optimizer.lr": 1, "optimizer.weight_decay": 0}),
        ("training=AdamW", {"optimizer.betas": [0.0, 0.9], "optimizer.amsgrad": True}),
        ("dataset=digits", {"schedule": None}),
        ("dataset=digits", {"schedule.milestones": [1, 1, 400]}),
        ("distiller=kd", {"distiller.losses.kd.temperature": 4, "distiller.losses.kd.weight": 0}),
        ("spot_mode=random", {"spot_mode.p": {"stage2": 1, "logits": 0.5}}),
        ("dataset=image_folder", {"dataset.augmentation.crop.size": [224, 224]}),
        ("dataset=image_folder", {"dataset.augmentation.flip": {"_target_": "torch.nn.Identity"}}),
        ("tracking=mlflow", {"tracking.uri": "postgresql+psycopg2://somebody@host/runs"}),
        ("tracking=mlflow", {"tracking.uri": "databricks"}),
        ("tracking=mlflow", {"tracking.uri": "sqlite:////data/mlflow.db"}),
        ("tracking=mlflow", {"tracking.uri": "https://[::1]:65535/mlflow?x=1"}),
        ("dataset=digits", {"dataset.mean": [0], "dataset.std": [1]}),
    ],
    ids=lambda part: str(part)[:60],
)
def test_what_is_legitimate_passes(option, changes):
    assert told(option, changes) is None


def test_what_a_schedule_comes_to_is_looked_at_before_work():
    """Its constructor takes these values, and a step in training would not."""
    for node, message in (
        (
            {"_target_": f"{SCHEDULE}.OneCycleLR", "max_lr": 0.1, "total_steps": 3},
            "schedule: .*Tried to step 4",
        ),
        (
            {"_target_": f"{SCHEDULE}.ExponentialLR", "gamma": 100},
            r"schedule: .*gamma=100, with which optimizer\.lr",
        ),
        ({"_target_": f"{SCHEDULE}.ReduceLROnPlateau"}, r"schedule\._target_: .*step\(\) needs no argument"),
    ):
        assert re.match(message, told("dataset=digits", {"schedule": node}) or "passed")
    said = told("dataset=digits", {"optimizer": {"_target_": "torch.optim.LBFGS", "lr": 0.1}})
    assert re.match(r"optimizer\._target_: .*step\(\) needs no argument", said or "passed")


def test_a_plug_in_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "their_kd.py").write_text("import no_such_package_of_theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = told("dataset=digits", {"student._target_": "their_kd.Network"})
    assert said == (
        "student._target_: cannot import their_kd.Network: ModuleNotFoundError: No module named "
        "'no_such_package_of_theirs'"
    )
    assert find("torchvision.models.googlenet").__name__ == "googlenet"  # the function, not the module


def test_a_sweep_with_a_bad_value_is_not_launched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["hydra/launcher=local", "optimizer.momentum=0.5,true", "tracking=none"]
    message = r"^optimizer\.momentum: found True, expected a number from 0 to below 1 \(cell .*=True tracking"
    with pytest.raises(ConfigError, match=message):
        launch_sweep(plan(sweep(line)))
    with pytest.raises(ConfigError, match=message):
        here.train(sweep(line[1:]))
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_that_is_not_ours_is_held_to_its_keys(launch, tmp_path):
    done = launch("+hydra.launcher.gres=gpu:v100:2", expect=1)
    assert "error: hydra.launcher.gres: no such key" in done.stderr
    assert list(tmp_path.iterdir()) == []
