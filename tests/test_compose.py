"""A sweep's cells are composed together, and each is what Hydra composes for it alone; and what each of them
needs first."""

import itertools

import pytest
import torch
import yaml
from click.testing import CliRunner

from sakd.cli import main as cli
from sakd.configuration import build, compose, flatten, short_names
from sakd.configuration.groups import folder_of
from sakd.errors import ConfigError
from sakd.sweeps import Plan, plan
from tests.conftest import ROOT, compose_config
from tests.test_launch import files

SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))


def cells_of(*overrides: str) -> list[tuple[compose.Overrides, dict]]:
    return compose.sweep(overrides).cells


def planned(*overrides: str) -> Plan:
    return plan(compose.sweep(overrides))


def names(jobs) -> list[str]:
    return [job.name for job in jobs]


# Cells that are composed together

TOGETHER = {  # overrides, and how many cells they have
    "seeds that a pretraining copies": (("distiller=fsp_init,at", "seed=0,1"), 4),
    "a rate that the policy's is computed from": (("optimizer.lr=0.1,3e-3", "spot_mode=adaptive,fixed"), 4),
    "epochs that milestones are computed from": (("epochs=8,16", "teacher.training.epochs=4,40"), 4),
    "a recipe that others read": (("dataset.recipe.batch_size=32,64", "distiller=ft,kd"), 4),
    "numbers": (("distiller=at", "distiller.beta=1,2.5", "spot_mode.gamma=1,1e3"), 4),
    "nothing or a number": (("dataset.train_samples=null,100", "schedule.gamma=0.1,0.2"), 4),
    "truth": (("dataset.flip=true,false",), 2),
    "lists": (("schedule.milestones=[1,2],[],[3,${epochs}]",), 3),
    "dictionaries in a number's place": (
        ("spot_mode=random", "spot_mode.p=0.5,{stage1:0.9},{stage1:${seed},logits:0.1}"),
        3,
    ),
    "text": (("precision=fp32,bf16", "student.name='two, or 3'"), 2),
    "text that is an interpolation": (("spot_mode.temperature=4,${seed}", "seed=1,2"), 4),
    "a network's sizes": (("dataset.classes=10,7", "dataset.image_size=16"), 2),
    "groups": (("dataset=digits,cifar10", "spot_mode=adaptive,anti"), 4),
    "an experiment": (("experiment=cifar100/vgg13_MobileNetV2,cifar100/vgg13_vgg8", "seed=0,1"), 4),
    "an experiment's rate": (
        ("experiment=cifar100/vgg13_MobileNetV2", "optimizer.lr=0.1,0.2", "seed=0,1"),
        4,
    ),
    "experiments as a list": (("experiment=[cifar100/vgg13_vgg8,debug],debug", "seed=0,1"), 4),
    "an added key": (("+optimizer.nesterov=true,false", "seed=0,1"), 4),
    "a removed key": (("~optimizer.momentum", "optimizer.lr=0.1,0.2", "seed=0,1"), 4),
    "overlapping keys": (("optimizer.lr=0.1,0.2", "optimizer={lr:7}"), 1),
    "overlapping keys, the other way round": (("optimizer={momentum:0.8},{lr:7}", "optimizer.lr=0.1,0.2"), 4),
    "a key of a group's file beside the group": (("distiller=at,sp", "distiller.beta=5,6"), 4),
    "a range": (("seed=range(3,6)", "epochs=choice(1,2)"), 6),
    "a sweep file": (("sweeps=digits", "distiller=ft", "spot_mode=anti", "seed=3,4"), 2),
}


@pytest.fixture(params=["here", "in a pool"])
def place(request, monkeypatch):
    """Where cells are composed; cores and pools as they are elsewhere."""
    pools = []

    class Counted(compose.ProcessPoolExecutor):
        def __init__(self, *arguments):
            pools.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(compose, "ProcessPoolExecutor", Counted)
    monkeypatch.setattr(compose, "CELLS_WORTH_A_POOL", 1_000_000 if request.param == "here" else 0)
    monkeypatch.setattr(compose.os, "cpu_count", lambda: 2)
    return pools


@pytest.mark.parametrize("sweep", TOGETHER)
def test_cells_composed_together_are_what_each_is_alone(sweep):
    overrides, number = TOGETHER[sweep]
    cells = cells_of(*overrides)
    assert len(cells) == number
    for line, config in cells:
        assert repr(config) == repr(compose.compose_one(line)), line  # types, too, and the order of keys


@pytest.mark.parametrize(
    "line",
    [
        (),
        ("experiment=cifar100/vgg13_vgg8", "distiller=ft", "seed=3"),
        ("+optimizer.nesterov=true", "~schedule.gamma", "dataset.mean=[0.5]"),
    ],
    ids=" ".join,
)
def test_one_is_composed_as_hydra_does_it(line):
    assert repr(compose.compose_one(line)) == repr(compose_config(*line))


def test_a_mistake_in_one_is_told_as_launch_py_tells_it():
    with pytest.raises(ConfigError, match=r"^no key 'epohcs'; expected one of seed, .*Did you mean 'epochs'"):
        compose.compose_one(["epohcs=3"])
    with pytest.raises(ConfigError, match=r"^epochs: found 0, expected"):
        compose.compose_one(["epochs=0"])
    with pytest.raises(ConfigError, match=r"^optimizer: found nothing, a run needs it$"):
        compose.compose_one(["~optimizer"])
    with pytest.raises(ConfigError, match=r"^hydra\.job\.chdir: Value 'maybe' is not a valid bool"):
        compose.compose_one(["hydra.job.chdir=maybe"])


def test_lines_of_different_keys_do_not_take_each_others_values():
    lines = [("seed=1",), ("seed=2",), ("epochs=3",), ("epochs=4",), ("seed=5", "epochs=6")]
    lines = [("dataset=digits", *line) for line in lines]
    with compose._hydra():
        cells = compose.compose_cells(lines, [])
    assert [(config["seed"], config["epochs"]) for _, config in cells] == [
        (1, 20),
        (2, 20),
        (0, 3),
        (0, 4),
        (5, 6),
    ]


def test_cells_do_not_share_what_one_of_them_may_change():
    (_, first), (_, second) = cells_of("seed=0,1")
    first["optimizer"]["lr"] = first["dataset"]["mean"][0] = 7
    assert second["optimizer"]["lr"] != 7
    assert second["dataset"]["mean"] != [7]


def test_cells_are_the_same_and_in_the_same_order_in_a_pool(place):
    overrides = ("seed=1,0", "distiller=fsp_init,none", "optimizer.lr=0.1,0.2")
    cells = cells_of(*overrides)
    assert [(c["seed"], c["distiller"]["name"], c["optimizer"]["lr"]) for _, c in cells] == list(
        itertools.product((1, 0), ("fsp_init", "none"), (0.1, 0.2))
    )
    assert all(repr(config) == repr(compose.compose_one(line)) for line, config in cells)
    assert len(place) == (compose.CELLS_WORTH_A_POOL == 0)


def test_a_key_of_the_command_line_replaces_the_sweep_files():
    seven = [config for _, config in cells_of("sweeps=digits", "seed=7")]
    assert len(seven) == 30
    assert {config["seed"] for config in seven} == {7}
    attention = [config for _, config in cells_of("sweeps=digits", "distiller=at")]
    assert [(c["distiller"]["name"], c["spot_mode"]["name"], c["seed"]) for c in attention] == list(
        itertools.product(["at"], ["fixed", "adaptive", "anti"], range(5))
    )


def test_cells_that_are_the_same_run_come_once_by_the_first_of_their_names():
    cells = cells_of("distiller=none,kd", "spot_mode=fixed,adaptive", "seed=0,1")
    assert len(cells) == 2 + 4
    alone = [line for line, config in cells if config["distiller"]["name"] == "none"]
    assert alone == [("distiller=none", "spot_mode=fixed", f"seed={seed}") for seed in (0, 1)]
    assert len(cells_of("optimizer.lr=1,1.0,0.5")) == 2
    assert len(cells_of("device=cpu,auto", "threads=1,2")) == 1


# Mistakes

NAMED = {  # what is told of the cell, and of the mistake
    ("seed=0,1,-1", "distiller=at,kd"): (
        "cell seed=-1 distiller=at",
        "seed: found -1, expected a whole number of at least 0",
    ),
    ("distiller=fitnet,none", "distiller.beta=1,2"): (
        "cell distiller=none distiller.beta=1",
        "no key 'distiller.beta'",
    ),
    ("optimizer.lrr=1,2", "seed=0,1"): ("cell optimizer.lrr=1 seed=0", "Did you mean 'lr'?"),
    ("spot_mode=fixed,adaptve", "seed=0,1"): ("cell spot_mode=adaptve seed=0", "Did you mean 'adaptive'?"),
    ("student=resnet8", "optimizer.lr=0.1,abc"): (
        "cell student=resnet8 optimizer.lr=abc",
        "lr: found 'abc', expected a number of at least 0",
    ),
    ("teacher.min_accuracy=50,101",): (
        "cell teacher.min_accuracy=101",
        "teacher.min_accuracy: found 101, expected percent",
    ),
    ("dataset.classes=10,7", "student.num_classes=10"): (
        "cell dataset.classes=7",
        "student.num_classes: found 10, expected",
    ),
    ("teacher.checkpoint=null,gone.pt", "seed=0"): (
        "cell teacher.checkpoint=gone.pt",
        "teacher.checkpoint: no file gone.pt",
    ),
    ("sweeps=digits", "distiller=at", "seed=0", "epochs=3,0"): (
        "epochs=0)",
        "epochs: found 0, expected a whole number of at least 1",
    ),
    ("sweeps=digits", "epohcs=3"): ("", "Did you mean 'epochs'?"),
}


@pytest.mark.parametrize("mistake", NAMED, ids=" ".join)
def test_a_mistake_in_one_cell_is_named_with_the_cell_and_nothing_is_written(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell, told = NAMED[mistake]
    done = CliRunner().invoke(cli, ["status", *mistake])
    assert done.exit_code == 1
    assert told in done.output
    assert cell in done.output
    assert isinstance(done.exception, SystemExit)
    assert files(tmp_path) == []


def test_a_mistake_is_named_with_the_cell_wherever_it_is_composed(place):
    with pytest.raises(ConfigError, match=r"found 0, expected .*\(cell distiller=at epochs=0\)"):
        cells_of("distiller=at,kd", "epochs=1,0")
    with pytest.raises(ConfigError, match=r"Did you mean 'fitnet'\? \(cell distiller=fitnett seed=0\)"):
        cells_of("distiller=kd,fitnett", "seed=0,1")


@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=local",)], ids=["in one process", "local"])
def test_a_mistake_in_one_cell_stops_the_launch_before_anything_is_written(launcher, launch, tmp_path):
    done = launch("-m", *launcher, "distiller=none,kd", "epochs=1,0", expect=1)
    assert (
        "epochs: found 0, expected a whole number of at least 1 (cell distiller=none epochs=0)" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert files(tmp_path) == []


def test_an_unknown_sweep_is_told_with_those_there_are(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(cli, ["status", "sweeps=digit"])
    assert told.exit_code == 1
    launched = launch("seed=0", "--multirun", "sweeps=digit", expect=1)  # a flag may stand anywhere
    for output in (told.output, launched.stderr):
        assert f"expected one of {', '.join(SWEEPS)}. Did you mean 'digits'?" in output
    assert files(tmp_path) == []


# The files under sweeps/


def combinations(sweep: str, **replaced: str) -> list[dict[str, str]]:
    """What a sweep's file asks for, read as plain YAML."""
    params = (
        yaml.safe_load((ROOT / "sweeps" / f"{sweep}.yaml").read_text())["hydra"]["sweeper"]["params"]
        | replaced
    )
    lists = {key: str(values).split(",") for key, values in params.items()}
    return [dict(zip(lists, choice, strict=True)) for choice in itertools.product(*lists.values())]


def assert_composes(sweep: str, **replaced: str) -> None:
    expected = combinations(sweep, **replaced)
    cells = cells_of(f"sweeps={sweep}", *(f"{key}={value}" for key, value in replaced.items()))
    assert len(cells) == len(expected)
    for (line, config), choice in zip(cells, expected, strict=True):
        assert [leaf for _, leaf in flatten(config) if "${" in str(leaf)] == []
        assert {f"{key}={value}" for key, value in choice.items()} <= set(line)
        found = short_names(config)
        if (experiment := choice.pop("experiment", None)) is not None:
            assert experiment == f"{found['dataset']}/{found['teacher']}_{found['student']}"
        assert choice.items() <= found.items()


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_composes_to_what_its_file_lists(sweep):
    for choice in combinations(sweep, seed="0"):
        assert all(
            key == "seed" or (folder_of(key) / f"{value}.yaml").exists() for key, value in choice.items()
        ), choice
    assert_composes(sweep, seed="0", **({} if sweep == "teachers" else {"distiller": "at"}))


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_cell_of_every_sweep_composes(sweep):
    assert_composes(sweep)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_combination_of_every_sweep_builds(sweep):
    cells = cells_of(f"sweeps={sweep}", "seed=0")
    for _, config in cells:
        parts = build.parts(config)
        build.trainer(config, parts, torch.device("cpu"))
    assert len(cells) == len(combinations(sweep, seed="0"))


# What cells need first

CIFAR = ("cifar100_same_family", "cifar100_different_family")


def assert_teachers_are_those_of(*narrowed: str) -> None:
    needed = set()
    for sweep in CIFAR:
        found = planned(f"sweeps={sweep}", *narrowed)
        of_cells = {name for job in found.cells for name in job.needs}
        assert of_cells == set(names(found.first))
        needed |= {job.name for job in found.first if not job.needs}
    assert set(names(planned("sweeps=teachers").cells)) == needed


def test_the_teachers_sweep_is_exactly_the_teachers_of_the_cifar_sweeps():
    assert_teachers_are_those_of("distiller=kd", "spot_mode=fixed", "seed=0,2")


@pytest.mark.slow
def test_the_teachers_sweep_is_exactly_the_teachers_of_all_cells_of_the_cifar_sweeps():
    assert_teachers_are_those_of()


def test_a_paraphraser_is_one_job_that_needs_the_teacher_and_that_all_its_cells_need():
    found = planned("sweeps=digits", "distiller=ft,at", "seed=0,1")
    teacher, paraphraser = found.first
    assert short_names(teacher.run.config)["student"] == "wrn_16_2"
    assert (teacher.needs, paraphraser.needs) == ((), (teacher.name,))
    assert "-ft_pretraining-" in paraphraser.name
    for job in found.cells:
        both = job.run.config["distiller"]["name"] == "ft"
        assert job.needs == ((teacher.name, paraphraser.name) if both else (teacher.name,))
    assert len(found.cells) == 12
    assert names(found.everything) == names(found.first) + names(found.cells)


FSP_INIT = ("distiller=fsp_init", "teacher=wrn_16_1", "student=resnet8", "seed=0,1")


def test_a_pretraining_of_its_own_is_a_job_only_where_several_cells_share_it():
    alone = planned(*FSP_INIT, "spot_mode=fixed")
    (teacher,) = names(alone.first)
    assert [job.needs for job in alone.cells] == [(teacher,)] * 2
    shared = planned(*FSP_INIT, "spot_mode=fixed,adaptive")
    pretrainings = {job.run.config["seed"]: job for job in shared.first[1:]}
    assert names(shared.first)[0] == teacher
    assert set(pretrainings) == {0, 1}
    assert all(job.needs == (teacher,) for job in pretrainings.values())
    assert [job.needs[1:] for job in shared.cells] == [
        (pretrainings[job.run.config["seed"]].name,) for job in shared.cells
    ]


def test_a_teacher_that_is_given_is_no_job(tmp_path):
    (tmp_path / "teacher.pt").write_bytes(b"weights")
    found = planned(
        "teacher=wrn_16_1",
        f"teacher.checkpoint={tmp_path}/teacher.pt",
        "distiller=at,ft",
        "spot_mode=fixed,anti",
    )
    (paraphraser,) = found.first
    assert paraphraser.needs == ()
    assert [job.needs for job in found.cells] == [(), (), (paraphraser.name,), (paraphraser.name,)]


def test_a_teacher_among_the_cells_is_trained_once():
    pair = ("dataset=digits", "teacher=resnet8", "student=resnet8")
    found = planned(*pair, "distiller=kd,none", "spot_mode=fixed,anti")
    (teacher,) = [job for job in found.cells if job.run.config["distiller"]["name"] == "none"]
    assert found.first == []
    assert [job.needs for job in found.cells if job is not teacher] == [(teacher.name,)] * 2


def test_cells_in_several_folders_are_refused():
    with pytest.raises(ConfigError, match="runs: found runs0, runs1, expected one folder"):
        planned("runs=runs${seed}", "seed=0,1")


def test_a_group_may_be_swept_over_all_that_fit_a_pattern():
    """As in any of Hydra's programs."""
    chosen = [config["distiller"]["name"] for _, config in cells_of("distiller=glob(f*)", "spot_mode=fixed")]
    assert chosen == ["fitnet", "fsp", "fsp_init", "ft"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed=range(0,0)", r"seed: found range\(0,0\), which is no value at all"),
        ("student.name=glob(*)", r"student\.name: found glob\(\*\), which is no value at all"),
        ("distiller=glob(z*)", r"distiller: found glob\(z\*\), which is no value at all"),
        (
            "hydra.sweeper.params=3",
            r"hydra\.sweeper\.params: found 3, expected keys and values to sweep over",
        ),
        ("hydra.launcher=null", r"hydra\.launcher: found None, expected keys and values"),
        ("=3", "=3: found no key, expected key=value"),
        ("+@x=3", r"\+@x=3: found no key, expected key=value"),
    ],
)
def test_what_can_be_no_sweep_is_told_by_its_key(line, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        cells_of(line)


def test_a_launch_without_a_launcher_is_refused_by_its_key(launch, tmp_path):
    assert "error: hydra.launcher: found None" in launch("-m", "hydra.launcher=null", expect=1).stderr
    assert files(tmp_path) == []
