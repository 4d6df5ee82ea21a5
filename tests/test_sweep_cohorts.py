"""Who trains together in a sweep, and what a sweep in this process shows of it."""

import re
import shutil
import time
from collections import Counter

import pytest
import torch
from rich.cells import cell_len

from sakd.configuration.compose import sweep
from sakd.errors import ConfigError
from sakd.networks import resnet8
from sakd.runs import Run
from sakd.sweeps import PlannedRun, cohorts, launcher_of, plan
from sakd.sweeps.launching import _arrays
from sakd.sweeps.submissions import needs_of
from tests.conftest import TINY, compose_config, last_of_each

UNTRACKED = (*TINY, "tracking=none", "threads=1")


def runs_of(*overrides: str) -> list[PlannedRun]:
    return plan(sweep(overrides)).cells


def told(group: list[PlannedRun]) -> list[tuple[str, str, int]]:
    """Distiller, mode and seed of each."""
    configs = [run.run.config for run in group]
    return [(each["distiller"]["name"], each["spot_mode"]["name"], each["seed"]) for each in configs]


TOGETHER = {
    "distillers": ("distiller=kd,at,sp",),
    "spot modes": ("spot_mode=fixed,adaptive,anti,random",),
    "students": ("student=resnet8,vgg8,resnet14",),
    "optimizers": ("optimizer.lr=0.05,0.1",),
    "schedules": ("schedule=null,{_target_: torch.optim.lr_scheduler.ExponentialLR, gamma: 0.9}",),
    "epochs": ("epochs=2,3", "teacher.training.epochs=2"),
    "runs without a teacher": ("distiller=none", "student=resnet8,vgg8"),
    "expectations of the teacher": ("teacher.min_accuracy=0,50", "distiller=kd,at"),
}
APART = {
    "seed": ("seed=0,1",),
    "batch size": ("batch_size=32,64",),
    "precision": ("precision=fp32,bf16",),
    "teacher": ("teacher=resnet8,wrn_16_1",),
    "a teacher trained otherwise": ("teacher.training.optimizer.lr=0.1,0.2",),
    "a teacher at all": ("distiller=none,kd", "teacher=wrn_16_1"),
    "data set": ("dataset.train_samples=100,200",),
}
NO_IDENTITY = {  # what of it two runs may not differ in, and what they may
    "+dataset.workers=1,2": False,
    "device=cpu,auto": False,
    "threads=1,2": False,
    "memory_format=contiguous,channels_last": False,
    "compile=none,default": False,
    "fold_batch_norm=true,false": False,
    "runs=here,there": False,
    "tracking=none,mlflow": True,
}


@pytest.mark.parametrize("what", TOGETHER)
def test_runs_go_together_whatever_their(what):
    found = runs_of(*last_of_each("distiller=kd", *TOGETHER[what]))
    assert len(found) > 1
    assert cohorts(found) == [found]


@pytest.mark.parametrize("what", APART)
def test_runs_do_not_go_together_that_differ_in(what):
    found = runs_of(*last_of_each("distiller=kd", *APART[what]))
    assert cohorts(found) == [[run] for run in found]


@pytest.mark.parametrize("override", NO_IDENTITY)
def test_how_a_step_is_carried_out_must_be_the_same_and_where_it_is_tracked_need_not(override):
    key, _, values = override.partition("=")
    found = [
        PlannedRun(Run(compose_config("distiller=kd", f"spot_mode={mode}", f"{key}={value}")))
        for mode, value in zip(("fixed", "anti"), values.split(","), strict=True)
    ]
    assert (len(cohorts(found)) == 1) == NO_IDENTITY[override]


def test_a_teachers_file_is_known_by_what_it_holds(tmp_path):
    torch.save(resnet8(10, 1, 8).state_dict(), tmp_path / "one.pt")
    torch.save(resnet8(10, 1, 8).state_dict(), tmp_path / "other.pt")
    shutil.copy(tmp_path / "one.pt", tmp_path / "same.pt")
    found = [
        PlannedRun(
            Run(compose_config(*TINY, f"distiller={distiller}", f"teacher.checkpoint={tmp_path}/{name}.pt"))
        )
        for name, distiller in (("one", "kd"), ("same", "at"), ("other", "sp"))
    ]
    assert [len(cohort) for cohort in cohorts(found)] == [2, 1]


@pytest.mark.parametrize(
    ("number", "most", "sizes"), [(10, 10, [10]), (11, 10, [5, 6]), (23, 8, [7, 8, 8]), (3, 1, [1, 1, 1])]
)
def test_cohorts_are_as_few_as_may_be_of_even_size_and_keep_the_order(number, most, sizes):
    lines = ",".join(str(0.01 * (i + 1)) for i in range(number))
    found = runs_of("distiller=none", f"optimizer.lr={lines}", f"cohort={most}")
    groups = cohorts(found)
    assert [len(group) for group in groups] == sizes
    assert [run for group in groups for run in group] == found


def test_seeds_alternate_and_are_each_a_cohort():
    found = runs_of("distiller=kd,at", "spot_mode=fixed,anti", "seed=0,1")
    kinds = [(distiller, mode) for distiller in ("kd", "at") for mode in ("fixed", "anti")]
    assert [told(cohort) for cohort in cohorts(found)] == [
        [(*kind, seed) for kind in kinds] for seed in (0, 1)
    ]


def test_a_run_that_is_profiled_trains_alone():
    assert [len(cohort) for cohort in cohorts(runs_of("distiller=kd,at", "profile=true"))] == [1, 1]


def test_a_cell_that_others_need_trains_alone_and_before(here):
    """Its failure must not be another's, nor another's its."""
    from sakd.sweeps.launching import _jobs

    planned = plan(sweep(("dataset=digits", "teacher=resnet8", "student=resnet8,vgg8", "distiller=kd,none")))
    jobs = _jobs(planned, planned.cells)
    names = {
        cell.name: (cell.run.config["student"]["name"], cell.run.config["distiller"]["name"])
        for cell in planned.cells
    }
    kinds = sorted(tuple(names[run] for run in job) for job in jobs)
    assert kinds == [
        (("resnet8", "kd"), ("vgg8", "kd")),
        (("resnet8", "none"),),
        (("vgg8", "none"),),
    ]
    needs = {cell.name: list(cell.needs) for cell in planned.cells if cell.needs}
    arrays = _arrays(jobs, needs, None)
    assert len(arrays) == 2
    assert [len(array) for array in arrays] == [2, 1]


def test_a_job_waits_for_what_all_of_it_needs_and_for_what_some_do():
    needs = {"a": ["teacher"], "b": ["teacher", "pretraining"]}
    assert needs_of(["a"], needs) == (["teacher"], [])
    assert needs_of(["a", "b"], needs) == (["teacher"], ["pretraining"])
    assert needs_of(["a", "b", "c"], needs) == ([], ["teacher", "pretraining"])
    needs["pretraining"] = ["teacher"]
    arrays = _arrays([["b"], ["pretraining"], ["teacher"], ["a"]], needs, None)
    assert arrays == [[["teacher"]], [["pretraining"], ["a"]], [["b"]]]


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_a_launchers_key_that_is_not_there_is_refused_by_name(launcher):
    keys = sweep((f"hydra/launcher={launcher}", "+hydra.launcher.procesess=3")).launcher
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.procesess: no such key; expected one of "):
        launcher_of(keys)
    with pytest.raises(ConfigError, match=r"^hydra/launcher: found sakd\.data\.digits, expected slurm"):
        launcher_of({"_target_": "sakd.data.digits"})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_sweep_in_this_process_trains_each_teacher_once_and_ends_with_one_table(launch, tmp_path):
    overrides = (*UNTRACKED, "distiller=kd,at", "spot_mode=fixed,adaptive", "seed=0,1")
    output = launch("-m", *overrides).stdout
    assert output.count("training the teacher") == 1
    lines = output[output.index("distiller   spot_mode   seed") :].splitlines()
    rows = [line for line in lines if "finished" in line]
    assert len(rows) == 8
    assert [row.split()[2:4] for row in rows] == [["0", "finished"], ["1", "finished"]] * 4
    assert all(re.search(r"2/2 +\d+\.\d\d +\d+\.\d\d +\d+\.\d$", row) for row in rows)
    assert all(cell_len(row) <= 80 for row in rows)
    assert lines[-1].startswith(
        "compare: sakd compare dataset=digits teacher=resnet8 student=resnet8 distiller=kd,at "
    )
    results = {path: path.read_bytes() for path in tmp_path.glob("runs/*/result.json")}
    assert len(results) == 9
    assert Counter(b'"cohort": 4' in content for content in results.values()) == {True: 8, False: 1}

    begun = time.monotonic()
    again = launch("-m", *overrides).stdout
    assert time.monotonic() - begun < 10
    assert again == "\n".join(lines) + "\n", "that table once, and nothing else"
    assert results == {path: path.read_bytes() for path in tmp_path.glob("runs/*/result.json")}

    compared = launch(*lines[-1].split()[3:], script=("-m", "sakd.cli", "compare")).stdout
    assert "at" in compared
    assert "(2)" in compared


@pytest.mark.slow
def test_cells_that_fail_are_told_with_their_overrides_and_the_others_finish(launch, tmp_path):
    overrides = (*UNTRACKED, "distiller=kd,fsp", "student=resnet8,vgg8", "optimizer.lr=0.05,1000000")
    done = launch("-m", *overrides, expect=1)
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 3 + 1
    errors = done.stderr.splitlines()
    assert len(errors) == 5, done.stderr
    assert all(line.startswith("error: ") for line in errors)
    assert any("distiller=fsp" in line and "channel with channel" in line for line in errors)
    assert sum("optimizer.lr=1000000" in line and "became NaN" in line for line in errors) >= 3
    assert done.stdout.count(" failed: ") == 5, "as soon as it happens"
    table = done.stdout[done.stdout.index("student   distiller") :]
    rows = [line.split() for line in table.splitlines() if re.search(r" \d/2 ", line)]
    words = Counter(word for row in rows for word in row)
    assert (words["finished"], words["failed"]) == (3, 5)
    assert len({tuple(row[:3]) for row in rows}) == 8, "a column for what tells cells apart"
    shown = launch(*overrides, script=("-m", "sakd.cli", "status")).stdout
    assert "8 cells: 3 finished, 5 failed" in shown
