"""What the files under conf/ compose to, what can be built from it, and what a run's identity depends on."""

import re
import subprocess
import sys
from copy import deepcopy
from functools import cache, reduce
from importlib import import_module
from pkgutil import resolve_name

import pytest
import torch

from sakd.configuration import (
    NEUTRAL,
    NOT_IDENTITY,
    TEACHER_KEYS,
    Prerequisites,
    build,
    check,
    digest,
    flatten,
    prerequisites,
    without_effect,
)
from sakd.configuration.compose import sweep
from sakd.configuration.groups import folder_of
from sakd.configuration.prerequisites import _shared_stages
from sakd.configuration.schema import Whole
from sakd.errors import CheckpointError, ConfigError, DataError, did_you_mean
from sakd.sweeps import launcher_of
from tests.conftest import ROOT, compose_config, skip_without_package_of

CONF = ROOT / "conf"
CPU = torch.device("cpu")


GLOBAL_GROUPS = ("experiment", "recipe", "sweeps")  # their files set keys of other groups
NAMELESS = ("optimizer", "schedule")


def names(group: str) -> list[str]:
    folder = folder_of(group)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def every_choice() -> list[tuple[str, str]]:
    """Group and file, but for the networks."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"network", "hydra"} | {"sweeps"}
    return [(group, name) for group in sorted(groups) for name in names(group)]


def build_all(*overrides: str) -> build.Parts:
    config = compose_config(*overrides)
    parts = build.parts(config)
    build.trainer(config, parts, CPU)
    build.check_parts(config)  # a schedule is built once there are data
    return parts


# Composing and building


def assert_resolved(config: dict):
    assert [leaf for _, leaf in flatten(config) if "${" in str(leaf)] == []


@pytest.mark.parametrize(("group", "name"), every_choice())
def test_every_file_composes(group, name):
    config = compose_config(f"{group}={name}" if group != "recipe" else f"+recipe={name}")
    assert group in (*GLOBAL_GROUPS, *NAMELESS) or config[group]["name"] in (name, f"{name}_folder")
    assert_resolved(config)


@pytest.mark.parametrize("launcher", [path.stem for path in (CONF / "hydra/launcher").glob("*.yaml")])
def test_every_launcher_composes_and_is_one_that_takes_sweeps(launcher):
    launcher_of(sweep([f"hydra/launcher={launcher}", "seed=0,1"]).launcher)


TARGETS = sorted(
    {
        (path.relative_to(ROOT).as_posix(), target)
        for folder in (CONF, ROOT / "sweeps")
        for path in folder.rglob("*.yaml")
        for target in re.findall(r"_target_: (sakd\.[\w.]+)", path.read_text())
    }
)


@pytest.mark.parametrize(("path", "target"), TARGETS)
def test_what_is_built_is_named_by_the_face_of_its_package(path, target):
    """So that a file can move without a change of any run's identity."""
    package, _, name = target.rpartition(".")
    assert re.fullmatch(r"sakd\.\w+", package), path
    assert name in import_module(package).__all__, path
    assert callable(resolve_name(target))


def test_no_module_of_a_package_has_the_name_of_what_its_face_shows():
    """It would be found in the other's place."""
    for package in {target.rpartition(".")[0] for _, target in TARGETS}:
        modules = {path.stem for path in (ROOT / package.replace(".", "/")).glob("*.py")}
        shown = {target.rpartition(".")[2] for _, target in TARGETS if target.startswith(f"{package}.")}
        assert modules.isdisjoint(shown)


@pytest.mark.slow
def test_the_digits_are_read_without_torchvision():
    script = "import sys\nfrom sakd.data import digits\ndigits()\nassert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=100)


@pytest.mark.parametrize(
    "name",
    # Those of other packages take a second each.
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(("timm_", "torchvision_")) else ())
        for name in names("network")
    ],
)
def test_every_network_builds_as_student_and_as_teacher(name):
    skip_without_package_of(name)
    config = compose_config("dataset=cifar10", f"student={name}", f"teacher={name}", "distiller=none")
    assert config["student"]["name"] == config["teacher"]["name"] == name
    assert_resolved(config)
    of_student, of_teacher = (
        {key: value for key, value in config[node].items() if key not in TEACHER_KEYS}
        for node in ("student", "teacher")
    )
    assert of_student == of_teacher
    with torch.device("meta"):
        student = build.parts(config).student
    assert (student.input_shape, student.classes) == ((3, 32, 32), 10)


def test_a_student_alone_builds_with_every_spot_mode():
    for spot_mode in names("spot_mode"):
        config = compose_config("distiller=none", f"spot_mode={spot_mode}")
        parts = build.parts(config)
        assert parts.teacher is parts.spot_mode is None
        assert build.trainer(config, parts, CPU).spots == []


def test_a_student_starts_from_the_weights_of_its_seed_whatever_it_is_distilled_by():
    distilled, alone, of_another_seed = (
        torch.cat(
            [weight.flatten() for weight in build_all("teacher=resnet8", *overrides).student.parameters()]
        )
        for overrides in (
            ["distiller=at", "spot_mode=anti"],
            ["distiller=none"],
            ["distiller=none", "seed=1"],
        )
    )
    assert torch.equal(distilled, alone)
    assert not torch.equal(distilled, of_another_seed)


def test_student_and_teacher_of_one_design_start_from_different_weights():
    parts = build_all("teacher=resnet8", "student=resnet8")
    assert not torch.equal(parts.student.stem[0].weight, parts.teacher.stem[0].weight)


def test_the_networks_follow_the_data_set():
    parts = build_all("dataset=fashion_mnist")
    assert parts.student.input_shape == parts.teacher.input_shape == (1, 28, 28)


# Values computed from others


def test_the_learning_rate_falls_as_published():
    config = compose_config("dataset=cifar100")
    assert config["epochs"] == 240
    assert config["schedule"]["milestones"] == [150, 180, 210]
    assert config["teacher"]["training"]["schedule"]["milestones"] == [150, 180, 210]


def test_the_teacher_s_milestones_follow_its_own_epochs():
    config = compose_config("epochs=240", "teacher.training.epochs=80")
    assert config["schedule"]["milestones"] == [150, 180, 210]
    assert config["teacher"]["training"]["schedule"]["milestones"] == [50, 60, 70]


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_policy_learns_at_half_the_student_s_rate(rate):
    config = compose_config(f"optimizer.lr={rate}")
    trainer = build.trainer(config, build.parts(config), CPU)
    assert trainer.learning_rates() == {"student": rate, "policy": rate / 2}


# A run's identity

BASE = ("dataset=cifar10", "student=resnet8", "teacher=resnet20", "distiller=kd")


@cache
def digest_of(*overrides: str) -> str:
    return digest(compose_config(*BASE, *overrides))


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "threads=2",
        "cohort=1",
        "runs=/elsewhere",
        "tracking=none",
        "tracking.uri=http://elsewhere",
        "dataset.root=/elsewhere",
        "dataset.download=true",
        "dataset.recipe.epochs=3 epochs=240 teacher.training.epochs=240",
        "teacher.min_accuracy=70",
    ],
)
def test_what_leaves_a_result_alone_leaves_the_digest_alone(override):
    assert digest_of(*override.split()) == digest_of()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "epochs=5",
        "batch_size=32",
        "optimizer.lr=0.1",
        "schedule.gamma=0.2",
        "dataset=cifar100",
        "dataset.val_fraction=0.1",
        "dataset.train_samples=1000",
        "student=resnet14",
        "teacher=resnet32",
        "teacher.training.seed=1",
        "teacher.training.optimizer.lr=0.1",
        "distiller=at",
        "distiller.losses.kd.weight=0.5",
        "distiller.losses.kd.temperature=2.0",
        "spot_mode=fixed",
        "spot_mode=anti",
        "spot_mode.gamma=2.0",
    ],
)
def test_what_changes_a_result_changes_the_digest(override):
    assert digest_of(override) != digest_of()


# If one of these changes, all runs that users have would be trained again. A new key gets an entry in NEUTRAL
# instead; where results do change, new digests are right, and LOG.md says so.
PINNED = {
    (): "c78928c358",
    ("dataset=digits", "teacher=wrn_16_2"): "bb76a7ca61",
    ("dataset=digits", "distiller=none", "student=wrn_16_2"): "ee13be40b0",
    ("experiment=cifar100/vgg13_MobileNetV2", "distiller=ft", "spot_mode=anti", "seed=3"): "18eed9b03c",
}


@pytest.mark.parametrize("overrides", PINNED, ids=" ".join)
def test_digests_stay(overrides):
    assert digest(compose_config(*overrides)) == PINNED[overrides]


def test_the_table_of_what_is_no_part_of_an_identity_has_keys_that_there_are():
    there = {
        path
        for name in names("dataset")
        for experiment in ([], ["experiment=debug"], ["distiller=at+ft"])
        for path, _ in flatten(compose_config(f"dataset={name}", *experiment))
    }
    for key in NOT_IDENTITY:
        assert any(f"{path}.".startswith(f"{key}.") for path in there), key


def place_of(config: dict, path: str) -> tuple[dict, str]:
    *parents, key = path.split(".")
    return reduce(lambda node, parent: node[parent], parents, config), key


@pytest.mark.parametrize("path", NEUTRAL)
def test_an_absent_key_is_one_at_its_neutral_value(path):
    of_a_loss = re.match(r"distiller\.losses\.(\w+)", path)
    distiller = of_a_loss[1] if of_a_loss else "fsp_init"
    with_it, without_it = (compose_config(f"distiller={distiller}") for _ in range(2))
    if path.startswith("distiller.pretraining.schedule."):
        for config in (with_it, without_it):
            config["distiller"]["pretraining"]["schedule"] = {"_target_": "a.Schedule"}
    node, key = place_of(with_it, path)
    node[key] = NEUTRAL[path]
    node, key = place_of(without_it, path)
    node.pop(key, None)
    assert digest(with_it) == digest(without_it)
    node, key = place_of(with_it, path)
    node[key] = "something else"
    assert digest(with_it) != digest(without_it)


def test_neutral_values_are_told_apart_by_their_type():
    configs = compose_config(), compose_config()
    for config, value in zip(configs, (0, False), strict=True):
        config["dataset"]["crop_padding"] = value
    assert digest(configs[0]) != digest(configs[1])


def test_a_number_counts_by_its_value():
    assert digest_of("optimizer.lr=1") == digest_of("optimizer.lr=1.0") != digest_of("optimizer.lr=1.5")


def test_a_target_counts_as_its_text():
    config = compose_config(*BASE)
    config["student"]["_target_"] = "not.there"
    assert digest(config) != digest_of()


@pytest.mark.parametrize(
    "override", ["teacher=vgg8", "teacher.training.seed=1", "spot_mode=fixed", "spot_mode.gamma=2.0"]
)
def test_without_distillers_neither_teacher_nor_spot_mode_counts(override):
    assert digest_of("distiller=none", override) == digest_of("distiller=none")
    assert digest_of("distiller=none", "student=resnet14") != digest_of("distiller=none")


def test_what_has_no_effect_without_distillers_is_told():
    lines = ["distiller=none", "spot_mode=adaptive", "teacher=wrn_16_2", "teacher.training.seed=1", "seed=1"]
    assert without_effect(compose_config(*lines), lines) == lines[1:4]
    assert without_effect(compose_config(*lines[1:]), lines[1:]) == []


def test_digest_leaves_the_configuration_as_it_was():
    config = compose_config(*BASE)
    before = deepcopy(config)
    digest(config)
    list(prerequisites(config))
    assert config == before


def test_a_teacher_s_own_run_is_the_one_that_trains_it_alone():
    config = compose_config(
        *BASE, "seed=3", "optimizer.lr=0.1", "batch_size=32", "spot_mode=anti", "teacher.min_accuracy=70"
    )
    alone = compose_config("dataset=cifar10", "distiller=none", "student=resnet20")
    assert digest(prerequisites(config).teacher) == digest(alone)


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        (("epochs=7",), 2),
        (("dataset.recipe.teacher_epochs=3",), 3),
        (("teacher.training.epochs=5",), 5),
        (("dataset=digits", "epochs=7"), 7),
    ],
)
def test_a_teacher_learns_as_long_as_its_student_unless_the_recipe_or_the_user_says_otherwise(
    overrides, epochs
):
    config = compose_config(*overrides)
    assert prerequisites(config).teacher["epochs"] == config["teacher"]["training"]["epochs"] == epochs


def test_a_teacher_s_own_run_follows_its_own_recipe():
    config = compose_config(
        *BASE, "teacher.training.seed=3", "teacher.training.epochs=80", "teacher.training.optimizer.lr=0.1"
    )
    alone = compose_config(
        "dataset=cifar10", "distiller=none", "student=resnet20", "seed=3", "epochs=80", "optimizer.lr=0.1"
    )
    assert digest(prerequisites(config).teacher) == digest(alone)


SET_BY_THE_RECIPE = ("seed", "epochs", "batch_size", "optimizer", "schedule")


def test_what_a_run_needs_first_are_whole_runs_in_the_order_in_which_they_are_trained():
    config = compose_config(*BASE, "distiller=ft", "precision=bf16", "device=cpu", "threads=3", "cohort=4")
    needed = prerequisites(config)
    assert list(needed) == [needed.teacher, needed.pretraining]
    for own, recipe in (
        (needed.teacher, config["teacher"]["training"]),
        (needed.pretraining, config["distiller"]["pretraining"]),
    ):
        assert set(own) == {*Whole.__annotations__}
        check(own)
        assert {key: own[key] for key in SET_BY_THE_RECIPE} == {key: recipe[key] for key in SET_BY_THE_RECIPE}
        for key in {*Whole.__annotations__} - {
            *SET_BY_THE_RECIPE,
            "student",
            "distiller",
            "spot_mode",
            "tracking",
            "precision",
        }:
            assert own[key] == config[key], key
    assert (needed.teacher["precision"], needed.pretraining["precision"]) == ("fp32", "bf16")
    assert prerequisites(needed.teacher) == Prerequisites(None, None)
    (teacher,) = prerequisites(needed.pretraining)
    assert digest(teacher) == digest(needed.teacher)


def test_a_teacher_is_needed_first_unless_there_is_none_or_its_weights_are_there(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"weights")
    assert list(prerequisites(compose_config("distiller=none"))) == []
    assert list(prerequisites(compose_config(f"teacher.checkpoint={tmp_path}/weights.pt"))) == []
    teacher, pretraining = prerequisites(compose_config("distiller=fsp_init", "teacher=wrn_16_1"))
    assert (teacher["student"]["name"], pretraining["student"]["name"]) == ("wrn_16_1", "resnet8")


def test_networks_are_built_once_for_all_seeds_and_modes_that_share_a_pretraining():
    _shared_stages.cache_clear()
    configs = [
        compose_config("distiller=ft", f"seed={seed}", f"spot_mode={mode}")
        for seed in (0, 1)
        for mode in ("fixed", "anti")
    ]
    assert len({digest(prerequisites(config).pretraining) for config in configs}) == 1
    assert _shared_stages.cache_info().misses == 1


@pytest.mark.parametrize("override", ["+teacher.training.sed=1", "~teacher.training.batch_size"])
def test_a_teacher_s_training_has_the_keys_of_a_recipe_and_no_others(override):
    key = override.strip("+~").partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: "):
        compose_config(override)


def test_a_teacher_s_checkpoint_counts_by_its_content(tmp_path):
    for name, content in (("a.pt", b"weights"), ("b.pt", b"weights"), ("c.pt", b"others")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (digest_of(f"teacher.checkpoint={tmp_path}/{name}.pt") for name in "abc")
    assert a == b
    assert len({a, c, digest_of()}) == 3
    assert digest_of(f"teacher.checkpoint={tmp_path}/a.pt", "teacher.training.seed=1") == a
    assert digest_of(f"teacher.checkpoint={tmp_path}/a.pt", "teacher=resnet32") != a


def test_a_teacher_s_checkpoint_must_exist(tmp_path):
    override = f"teacher.checkpoint={tmp_path}/none.pt"
    with pytest.raises(CheckpointError, match=rf"teacher\.checkpoint: no file {tmp_path}/none\.pt"):
        compose_config(override)
    compose_config(override, "distiller=none")  # nobody asks for it


# Mistakes


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("+optimizer.lrr=1", "optimizer.lrr", "lr"),
        ("+schedule.milestone=[3]", "schedule.milestone", "milestones"),
        ("+student.num_clases=10", "student.num_clases", "num_classes"),
        ("+teacher.image_sise=8", "teacher.image_sise", "image_size"),
        ("+distiller.losses.kd.temprature=3", "distiller.losses.kd.temprature", "temperature"),
        ("+spot_mode.gama=1", "spot_mode.gama", "gamma"),
        ("+spot_mode.optimizer.momentun=0.5", "spot_mode.optimizer.momentun", "momentum"),
    ],
)
def test_a_misspelled_key_is_refused_with_the_near_name(override, key, near):
    with pytest.raises(ConfigError, match=rf"^{key}: .*Did you mean '{near}'"):
        build_all(override)


@pytest.mark.parametrize(
    ("dataset", "override", "near"),
    [("digits", "+dataset.crop_pading=3", "crop_padding"), ("cifar10", "+dataset.dowload=true", "download")],
)
def test_a_misspelled_key_of_the_data_set_is_refused_with_the_near_name(dataset, override, near):
    key = override.strip("+").partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}: .*Did you mean '{near}'"):
        build.dataset(compose_config(f"dataset={dataset}", override))


@pytest.mark.parametrize("key", ["classes", "crop_padding"])
def test_a_missing_key_of_the_data_set_is_named(key):
    config = compose_config()
    del config["dataset"][key]
    with pytest.raises(ConfigError, match=rf"^dataset\.{key}: "):
        build.dataset(config)


def test_the_reader_gets_what_reads_names_and_nothing_else():
    config = compose_config("dataset=cifar10", "dataset.root=/nowhere")
    with pytest.raises(DataError, match=r"dataset\.root=/nowhere: no file"):
        build.dataset(config)
    config["dataset"]["reads"].remove("root")
    with pytest.raises(ConfigError, match=r"^dataset\.root: no such key; .*names \(download\)"):
        build.promises(config)
    del config["dataset"]["root"]
    with pytest.raises(ConfigError, match=r"^dataset\.root: found nothing, sakd\.data\.cifar10 needs it"):
        build.promises(config)


def test_reads_may_name_only_what_is_there_and_what_the_reader_takes():
    config = compose_config("dataset=cifar10", "dataset.reads=[root,dowload]")
    with pytest.raises(ConfigError, match=r"^dataset\.dowload: found nothing, .*Did you mean 'download'"):
        build.promises(config)
    config["dataset"]["reads"] = ["root", "download", "flip"]
    with pytest.raises(ConfigError, match=r"^dataset\.flip: no such key; expected root, download"):
        build.promises(config)
    config["dataset"]["reads"] = "root"
    with pytest.raises(ConfigError, match=r"^dataset\.reads: found 'root', expected a list"):
        build.promises(config)


def test_without_reads_a_reader_takes_nothing():
    assert "reads" not in compose_config("dataset=digits")["dataset"]


def test_keys_that_nobody_asks_for_may_stay_where_the_digits_stand_in():
    for name in names("dataset"):
        config = compose_config(f"dataset={name}", "experiment=debug")
        assert build.dataset(config).classes == config["dataset"]["classes"]
    config["dataset"]["ignore_others"] = False
    with pytest.raises(ConfigError, match=r"^dataset\.root: no such key"):
        build.dataset(config)


def test_a_missing_key_of_a_constructor_is_named():
    with pytest.raises(ConfigError, match=r"^distiller\.losses\.kd\.temperature: found nothing"):
        build_all("~distiller.losses.kd.temperature")


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_recursive_", "_convert_"])
def test_what_only_hydra_would_make_of_a_node_is_refused_by_key(key):
    for at in ("student", "distiller.losses.kd"):
        with pytest.raises(ConfigError, match=rf"^{at}\.{key}: found a key of Hydra's instantiation"):
            build_all(f"+{at}.{key}=true")


class Holder:
    """Keeps what it was built with."""

    def __init__(self, first=None, **keys):
        self.first, self.keys = first, keys


def holder(**keys) -> dict:
    return {"_target_": "tests.test_config.Holder", **keys}


def test_nodes_among_values_are_built_first_and_lists_and_dictionaries_are_copies():
    inner = {"plain": [1, holder(name="kept", value=2.0)], "deep": {"er": holder()}}
    made = build.make(
        holder(name="left out", of_no_use=0, **inner), "it", "first", leave=("name", "of_no_use")
    )
    assert (made.first, set(made.keys)) == ("first", {"plain", "deep"})
    number, built = made.keys["plain"]
    assert (number, built.keys) == (1, {"name": "kept", "value": 2.0})
    assert isinstance(made.keys["deep"]["er"], Holder)
    made.keys["plain"].append(3)
    assert len(inner["plain"]) == 2


def raising(error: str) -> None:
    raise {"ours": DataError, "config": ConfigError, "named": ConfigError, "other": RuntimeError}[error](
        "part.inner: wrong" if error == "named" else "wrong"
    )


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("ours", DataError, "wrong"),
        ("config", ConfigError, "part.inner: wrong"),
        ("named", ConfigError, "part.inner: wrong"),
        (
            "other",
            ConfigError,
            "part.inner: found part.inner.error='other', which tests.test_config.raising refuses "
            "(RuntimeError: wrong)",
        ),
    ],
)
def test_what_goes_wrong_in_building_names_the_node(error, kind, message):
    node = holder(inner={"_target_": "tests.test_config.raising", "error": error})
    with pytest.raises(kind, match=rf"^{re.escape(message)}$"):
        build.make(node, "part")


def test_a_mistake_in_an_inner_node_is_found_before_anything_is_built():
    node = holder(inner=[{"_target_": "tests.test_config.raising", "eror": "ours"}])
    with pytest.raises(ConfigError, match=r"^part\.inner\.0\.eror: no such key; .*Did you mean 'error'"):
        build.check_node(node, "part")


def test_a_target_must_be_callable():
    with pytest.raises(
        ConfigError, match=r"^student\._target_: found sakd\.networks, a module, expected what"
    ):
        build_all("student._target_=sakd.networks")


def test_a_misspelled_target_is_refused_with_the_near_name():
    with pytest.raises(ConfigError, match=r"^student\._target_: .*Did you mean 'resnet8'"):
        build_all("student._target_=sakd.networks.resnet8y")


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize(
    ("key", "value", "of_data"), [("num_classes", 7, 10), ("in_channels", 3, 1), ("image_size", 32, 8)]
)
def test_a_network_may_not_contradict_its_data_set(network, key, value, of_data):
    with pytest.raises(ConfigError, match=rf"^{network}\.{key}: found {value}, .* {of_data}$"):
        compose_config(f"{network}.{key}={value}")


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "seed=0.5",
        "epochs=0",
        "epochs=many",
        "batch_size=1",
        "threads=0",
        "cohort=0",
        "cohort=all",
        "device=gpu",
        "teacher.min_accuracy=101",
        "teacher.min_accuracy=high",
        "teacher.training.epochs=0",
    ],
)
def test_impossible_values_are_refused_by_key(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}: found "):
        compose_config(override)


@pytest.mark.parametrize(
    ("word", "options", "near"),
    [
        ("resnet21", names("network"), "resnet20"),
        ("wrn16_2", names("network"), "wrn_16_2"),
        ("adaptiv", names("spot_mode"), "adaptive"),
        ("zzz", names("network"), None),
        ("kd", [], None),
    ],
)
def test_did_you_mean(word, options, near):
    assert did_you_mean(word, options) == ("" if near is None else f" Did you mean '{near}'?")
