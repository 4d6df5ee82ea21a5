"""Sweeps on a real SLURM, as `tests/slurm-up` starts one, with a real MLflow server and all that a cluster
does to jobs."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from sakd.configuration import compose
from sakd.runs import Run
from sakd.sweeps import Plan, plan, survey
from tests.conftest import ROOT, last_of_each, tracked_cells
from tests.servers import MlflowServer

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

# Cells of some ten seconds, on images and a teacher that take none.
SMALL = (
    *("teacher=wrn_16_2", "teacher.training.epochs=10", "dataset.train_samples=192", "threads=1"),
    *("hydra/launcher=slurm", "hydra.launcher.mem_gb=2"),
)
WARM_UP = "+dataset.recipe.pretraining_epochs=2"
EPOCH = re.compile(r"(\w+) to \w+, (\w+) (\w+), seed (\d+)  epoch (\d+)/")


@pytest.fixture(scope="module", autouse=True)
def _slurm():
    answers = (
        shutil.which("sinfo")
        and subprocess.run(["sinfo", "--noheader"], capture_output=True, check=False).returncode == 0
    )
    if not answers:
        if os.environ.get("SAKD_REQUIRE_SLURM"):
            pytest.fail(
                "SLURM does not answer, and SAKD_REQUIRE_SLURM is set; expected tests/slurm-up to have "
                "started it"
            )
        pytest.skip("SLURM does not answer; tests/slurm-up starts one")


class Login:
    """What a user does in a folder of a login node."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, *overrides: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "launch.py"), "-m", *last_of_each(*overrides)]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def launch(self, *overrides: str, expect: int = 0) -> str:
        process = self.start(*overrides)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == expect, output
        return output

    def sakd(self, *arguments: str, expect: int = 0) -> str:
        command = [sys.executable, "-m", "sakd.cli", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout if expect == 0 else done.stderr

    def status(self, *overrides: str) -> dict:
        return json.loads(self.sakd("status", *overrides, "--format", "json"))

    def states(self, *overrides: str) -> dict[str, str]:
        return {cell["name"]: cell["state"] for cell in self.status(*overrides)["cells"]}

    def until_done(self, *overrides: str, patience: float = 400.0) -> dict:
        def done() -> dict | None:
            status = self.status(*overrides)
            return None if status["counts"]["running"] or status["counts"]["queued"] else status

        return until(done, patience, every=3.0)

    def results(self, runs: str = "runs") -> dict[str, dict]:
        paths = (self.folder / runs).glob("*/result.json")
        return {path.parent.name: json.loads(path.read_text()) for path in paths}


@pytest.fixture
def login(tmp_path):
    yield Login(tmp_path)
    names = [
        array["name"]
        for path in tmp_path.glob("*/.sweeps/*/submission.json")
        for array in json.loads(path.read_text())["arrays"]
    ]
    for name in names:  # what a failed test has left
        subprocess.run(["scancel", f"--name={name}"], check=False)


def until(condition: Callable, patience: float, every: float = 0.3):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(every)
    raise TimeoutError(f"{condition} within {patience} seconds")


def sacct(name: str) -> dict[str, str]:
    """SLURM's own account of a submission's jobs, by job."""
    command = [
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        "--format=JobID,State",
        f"--name={name}",
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(line.split("|")[:2] for line in told.splitlines())


def arrays(login: Login, runs: str = "runs") -> list[dict]:
    """All that were ever recorded, those of submissions that were withdrawn, too."""
    folder = login.folder / runs / ".sweeps"
    paths = [*folder.glob("*/submission.json"), *folder.glob("*/withdrawn.json")]
    return [array for path in paths for array in json.loads(path.read_text())["arrays"]]


def process_of(job: str) -> int:
    """The Python process of a running job ARRAY_INDEX."""
    array, _, index = job.partition("_")
    for folder in Path("/proc").iterdir():
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ids = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()}
        if ids <= set(environment) and b"submitit.core._submit" in command and b"python" in command[0]:
            return int(folder.name)
    raise ProcessLookupError(job)


def start_now(job: str) -> None:
    """SLURM lets a job that was put back wait for two minutes; these are cut short."""

    def released() -> bool:
        return (
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, check=False
            ).returncode
            == 0
        )

    until(released, 60)


def metrics_in(uri: str, experiment: str, metric: str) -> dict[str, list[int]]:
    """Of each run in the store, by its folder: the steps of one metric, as often as they are there."""
    client, runs = MlflowClient(uri), tracked_cells(uri, experiment)
    assert len({run.data.tags["sakd.folder"] for run in runs}) == len(runs)
    return {
        Path(run.data.tags["sakd.folder"]).name: [
            point.step for point in client.get_metric_history(run.info.run_id, metric)
        ]
        for run in runs
    }


def mlflow_states(uri: str, experiment: str) -> dict[str, str]:
    runs = tracked_cells(uri, experiment)
    return {Path(run.data.tags["sakd.folder"]).name: run.info.status for run in runs}


def test_a_small_digits_sweep_is_handed_over_at_once_and_finishes_and_all_accounts_agree(login):
    """With a teacher, and a paraphraser that needs it, before the students that need them."""
    # FSP fails: its networks have unequal channels.
    sweep = (
        "sweeps=digits",
        "distiller=sp,ft,fsp",
        "spot_mode=fixed,adaptive",
        "seed=0",
        "epochs=3",
        WARM_UP,
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = login.launch(*sweep, "hydra/launcher=slurm")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # At once: before even the teacher of the first array is through, and by work, since others may have the
    # cores.
    assert login.results() == {}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    assert "submitted 3 jobs, which train 8 runs, in 3 arrays" in told
    status = login.until_done(*sweep)
    assert status["counts"] == {
        "finished": 4,
        "running": 0,
        "queued": 0,
        "failed": 2,
        "lost": 0,
        "missing": 0,
    }
    assert {cell["state"] for cell in status["first"]} == {"finished"}
    mlflow = mlflow_states(f"sqlite:///{login.folder}/mlflow.db", "sakd")
    expected = {"finished": "FINISHED", "failed": "FAILED"}
    for cell in status["cells"]:
        assert mlflow[cell["name"]] == expected[cell["state"]]
    teachers, paraphrasers, students = arrays(login)
    assert [len(array["jobs"][0]) for array in (teachers, paraphrasers, students)] == [1, 1, 6]
    # A job has failed if one of its members has.
    expected = {"COMPLETED": (teachers, paraphrasers), "FAILED": (students,)}

    def accounted() -> bool:
        told = {state: [sacct(array["name"]) for array in alike] for state, alike in expected.items()}
        return all({*jobs.values()} == {state} for state, alike in told.items() for jobs in alike)

    until(accounted, 30)  # SLURM's books are a little behind
    failed = [cell for cell in status["cells"] if cell["state"] == "failed"]
    for cell in failed:
        assert cell["distiller"] == "fsp"
        assert "FSP compares channel with channel" in cell["error"]
        assert "Traceback (most recent call last)" in (login.folder / cell["log"]).read_text()
    text = login.sakd("status", *sweep)
    assert f"failed (2): {failed[0]['error']}" in " ".join(text.split())
    assert "4 finished" in text
    for result in login.results().values():
        assert result["code"]["snapshot"] is not None
    again = login.launch(*sweep, "hydra/launcher=slurm", "hydra.launcher.wait=true", expect=1)
    assert "submitted 1 job, which train 2 runs, in 1 array;" in again, "what failed alone"
    assert "4 finished, 2 failed" in again
    assert len(re.findall(" finished +3/3 ", again)) == 4
    assert len(re.findall("^error: .*distiller=fsp.*FSP compares", again, re.MULTILINE)) == 2


def test_a_sweep_to_which_everything_happens_ends_as_one_to_which_nothing_did(login, tmp_path):
    """A job killed, one cancelled, one out of time, one that cannot work, the server away, the login process
    killed."""
    port_and_store = MlflowServer(tmp_path / "server")
    good = ("distiller=fitnet,sp,rkd", "spot_mode=fixed,adaptive", "seed=0,1")
    with_bad = ("distiller=fitnet,sp,rkd,fsp", *good[1:])  # FSP needs equal channels
    common = (*SMALL, "epochs=200", "cohort=3")
    server = port_and_store.start()
    sweep = (*common, *with_bad, f"tracking.uri={port_and_store.uri}", f"runs={tmp_path}/runs")
    planned = plan(compose.sweep(sweep))
    first = login.start(*sweep, "hydra.launcher.wait=true")
    running = until(lambda: at_work(planned, 2), 200)
    standings = survey(planned.cells, planned.runs)
    lost = [cell.run for cell in planned.cells if standings[cell.name].job == running[0]]
    process = process_of(running[0])
    os.kill(process, signal.SIGKILL)
    subprocess.run(["scancel", running[1]], check=True)
    first.kill()
    first.communicate()
    until(lambda: not Path(f"/proc/{process}").exists(), 60)
    under_way = {behind_the_checkpoint(run) for run in lost}
    port_and_store.stop(server)
    out_of_time = until(lambda: at_work(planned, 1, running), 200)[0]
    # Which may find it gone meanwhile.
    subprocess.run(["scancel", "--signal=USR2", "--full", out_of_time], check=False)
    start_now(out_of_time)
    time.sleep(10)  # epochs that the server does not hear of
    server = port_and_store.start()
    try:
        # The same command while the rest still runs, and once more for what may have failed to be sent or has
        # ended since.
        told = login.launch(*sweep)
        assert re.search(r"submitted \d+ jobs", told)
        login.until_done(*sweep)
        login.launch(*sweep)
        status = login.until_done(*sweep)
        assert status["counts"] == {
            "finished": 12,
            "running": 0,
            "queued": 0,
            "failed": 4,
            "lost": 0,
            "missing": 0,
        }

        login.launch(*common, *good, "runs=undisturbed", "tracking=none", "hydra.launcher.wait=true")
        undisturbed = {
            name: result["student_sha256"] for name, result in login.results("undisturbed").items()
        }
        assert {name: result["student_sha256"] for name, result in login.results().items()} == undisturbed

        login.sakd("sync", "runs", "--uri", port_and_store.uri)
        states = mlflow_states(port_and_store.uri, "sakd")
        for cell in status["cells"]:
            assert states[cell["name"]] == cell["state"].upper()
            if cell["state"] == "failed":
                assert "Traceback" in (login.folder / cell["log"]).read_text()
                assert "FSP compares channel with channel" in cell["error"]
        for name, steps in metrics_in(port_and_store.uri, "sakd", "test/accuracy").items():
            assert steps == (list(range(1, 201)) if states[name] == "FINISHED" else []), name

        seen = Counter()
        for path in (tmp_path / "runs/.sweeps").rglob("*_log.out"):
            seen.update(EPOCH.findall(path.read_text(errors="replace")))
        assert len(seen) > 12 * 195
        again = {epoch for epoch, times in seen.items() if times > 1}
        assert again <= under_way, "an epoch that was kept was trained again"
        assert max(seen.values()) <= 2
    finally:
        port_and_store.stop(server)


def behind_the_checkpoint(run: Run) -> tuple[str, ...]:
    """The epoch behind a run's checkpoint, as EPOCH finds it: a kill may have met its write."""
    parts = [run.config[part]["name"] for part in ("teacher", "distiller", "spot_mode")]
    return (*parts, str(run.config["seed"]), str(run._saved()["trainer"]["epoch"] + 1))


def at_work(planned: Plan, number: int, besides: Collection[str] = ()) -> list[str]:
    """So many of the cells' jobs that have done some epochs and are not near their end; none if there are
    fewer."""
    standings = survey(planned.cells, planned.runs).values()
    found = [
        cell.job for cell in standings if cell.state == "running" and cell.job and 2 <= cell.epoch <= 140
    ]
    jobs = [job for job in dict.fromkeys(found) if job not in besides]
    return jobs if len(jobs) >= number else []


def test_what_slurm_preempts_goes_on_later_bit_for_bit(login):
    sweep = (*SMALL, "distiller=sp", "spot_mode=adaptive", "seed=0", "epochs=120", "tracking=none")
    login.launch(*sweep)

    def started() -> str | None:
        (cell,) = login.status(*sweep)["cells"]
        return cell["job"] if (cell["epoch"] or 0) >= 3 else None

    job = until(started, 200)
    cpus = str(os.cpu_count())
    urgent = [
        "sbatch",
        "--parsable",
        "--partition=urgent",
        f"--cpus-per-task={cpus}",
        "--wrap=sleep 3",
        "--output=/dev/null",
    ]
    subprocess.run(urgent, check=True, capture_output=True, cwd=login.folder)

    def preempted() -> bool:
        return login.states(*sweep) == dict.fromkeys(login.states(*sweep), "queued")

    until(preempted, 60)
    start_now(job)
    assert login.until_done(*sweep)["counts"]["finished"] == 1
    said = "".join(path.read_text() for path in (login.folder / "runs/.sweeps").rglob("*_log.out"))
    assert "going on after epoch" in said
    seen = Counter(EPOCH.findall(said))
    assert (len(seen), set(seen.values())) == (120, {1}), "each epoch once"
    login.launch(*sweep, "runs=alone", "hydra.launcher.wait=true")
    assert [r["student_sha256"] for r in login.results().values()] == [
        r["student_sha256"] for r in login.results("alone").values()
    ]


def test_students_of_a_teacher_that_fails_never_start_and_say_why(login):
    sweep = (
        *SMALL,
        "distiller=kd,sp",
        "seed=0,1",
        "epochs=2",
        "teacher.training.optimizer.lr=1000000",
        "tracking=none",
    )
    login.launch(*sweep)
    status = login.until_done(*sweep)
    assert status["counts"]["failed"] == 4
    (teacher,) = status["first"]
    assert teacher["state"] == "failed"
    assert "became NaN" in teacher["error"]
    for cell in status["cells"]:
        assert cell["error"] == f"{teacher['name']}, which it needs, failed: {teacher['error']}"
        assert cell["log"] == teacher["log"]
    first, students = sorted(arrays(login), key=lambda array: array["name"])
    assert [len(job) for job in students["jobs"]] == [2, 2], "a cohort for each seed"
    until(lambda: set(sacct(first["name"]).values()) == {"FAILED"}, 30)  # SLURM's books are a little behind
    assert not list((login.folder / "runs/.sweeps").glob(f"*/logs/{students['name']}/*.out"))


def test_cancel_ends_the_jobs_that_it_is_given_and_retry_takes_them_up(login):
    common = (*SMALL[:-2], "spot_mode=fixed", "epochs=40", "tracking=none")
    wide = (*common, "distiller=kd,sp", "seed=0,1")
    login.launch(*wide, *SMALL[-2:])
    told = login.sakd("cancel", *common, "distiller=sp", "seed=1")
    assert told == "1 cell cancelled\n", "and not the teacher, which others wait for"
    status = login.until_done(*wide)
    assert status["counts"] == {
        "finished": 3,
        "running": 0,
        "queued": 0,
        "failed": 1,
        "lost": 0,
        "missing": 0,
    }
    (cancelled,) = [cell for cell in status["cells"] if cell["state"] == "failed"]
    assert (cancelled["distiller"], cancelled["seed"], cancelled["error"]) == ("sp", "1", "cancelled")
    wider = (*common, "distiller=kd,sp", "seed=0,1,2")
    # By the launcher of the last time; what was never begun is not its business.
    assert "submitted 1 job in 1 array" in login.sakd("retry", *wider, "hydra.launcher.timeout_min=30")
    assert login.until_done(*wider)["counts"] == {
        "finished": 4,
        "running": 0,
        "queued": 0,
        "failed": 0,
        "lost": 0,
        "missing": 2,
    }
    assert "nothing to submit" in login.sakd("retry", *wider)

    longer = (*common[:-2], common[-1], "distiller=sp", "seed=0,1,2", "epochs=400")
    login.launch(*longer, *SMALL[-2:])
    until(lambda: "running" in login.states(*longer).values(), 200)
    assert login.sakd("cancel", *longer) == "3 cells cancelled\n"
    until(lambda: set(login.states(*longer).values()) == {"failed"}, 60)


def test_a_member_is_cancelled_while_its_job_goes_on_and_the_job_with_its_last_member(login):
    common = (*SMALL, "spot_mode=fixed", "epochs=2000", "tracking=none")
    sweep = (*common, "distiller=kd,sp")
    login.launch(*sweep)

    def cells() -> list[dict]:
        return login.status(*sweep)["cells"]

    kd, sp = until(lambda: all((cell["epoch"] or 0) >= 2 for cell in cells()) and cells(), 200)
    assert kd["job"] == sp["job"]
    assert login.sakd("cancel", *common, "distiller=sp") == "1 cell cancelled\n"
    until(lambda: [cell["state"] for cell in cells()] == ["running", "failed"], 60)
    before, cancelled = cells()
    assert (before["job"], cancelled["error"]) == (kd["job"], "cancelled")
    until(lambda: cells()[0]["epoch"] > before["epoch"], 60)
    assert login.sakd("cancel", *sweep) == "1 cell cancelled\n"
    queue = ["squeue", "--noheader", f"--name={arrays(login)[-1]['name']}"]
    until(lambda: not subprocess.run(queue, capture_output=True, text=True, check=True).stdout, 60)
    assert [cell["error"] for cell in cells()] == ["cancelled"] * 2


def test_out_of_time_a_cohort_goes_on_bit_for_bit_with_all_members_but_one_that_failed(login):
    common = (*SMALL, "spot_mode=fixed,adaptive", "seed=0", "epochs=120", "tracking=none")
    sweep = (*common, "distiller=sp,kd,fsp")  # FSP needs equal channels
    login.launch(*sweep)

    def started() -> str | None:
        cells = [cell for cell in login.status(*sweep)["cells"] if cell["distiller"] != "fsp"]
        return cells[0]["job"] if all((cell["epoch"] or 0) >= 3 for cell in cells) else None

    job = until(started, 200)
    states = Counter(login.states(*sweep).values())
    assert (states["running"], states["failed"]) == (4, 2), "a failure is known while the others go on"
    subprocess.run(["scancel", "--signal=USR2", "--full", job], check=True)
    until(lambda: Counter(login.states(*sweep).values())["queued"] == 4, 60)
    start_now(job)
    counts = login.until_done(*sweep)["counts"]
    assert (counts["finished"], counts["failed"]) == (4, 2)
    said = "".join(path.read_text() for path in (login.folder / "runs/.sweeps").rglob("*_log.out"))
    assert len(re.findall(r"-fsp-\w+-seed0-\w+ failed$", said, re.MULTILINE)) == 2, "in the first turn alone"
    seen = Counter(EPOCH.findall(said))
    assert (len(seen), set(seen.values())) == (4 * 120, {1}), "each epoch once"
    for name in login.results():
        if "-none-none-" not in name:
            assert "going on after epoch" in (login.folder / "runs" / name / "run.log").read_text()
    login.launch(*common, "distiller=sp,kd", "runs=alone", "cohort=1", "hydra.launcher.wait=true")
    assert {name: result["student_sha256"] for name, result in login.results().items()} == {
        name: result["student_sha256"] for name, result in login.results("alone").items()
    }


REFUSED = {
    "hydra.launcher.partition=nowhere": "hydra.launcher.partition: found nowhere, expected one of main, "
    "urgent, wide",
    "hydra.launcher.gpus_per_node=7": "hydra.launcher: sbatch refused these keys",
    "hydra.launcher.acount=me": "no key 'hydra.launcher.acount'",
    "hydra.launcher.partition=wide": "expected a server. Start one",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_submitted_is_refused_by_name_and_nothing_is_queued(key, login):
    sweep = (*SMALL, "distiller=sp", "epochs=1")
    assert REFUSED[key] in login.launch(*sweep, key, expect=1).replace("\n", " ")
    assert login.status(*sweep)["counts"]["missing"] == 1
    for array in arrays(login):
        queued = ["squeue", "--noheader", f"--name={array['name']}"]
        assert subprocess.run(queued, capture_output=True, text=True, check=True).stdout == ""
    assert not list(login.folder.rglob("*_log.out")), "a job that ran"


def test_a_server_serves_several_nodes_and_may_be_away_at_submission_and_all_the_time(login, tmp_path):
    server = MlflowServer(tmp_path / "server")
    sweep = (
        *SMALL,
        "distiller=sp",
        "epochs=3",
        "hydra.launcher.partition=wide",
        f"tracking.uri={server.uri}",
    )
    assert f"MLflow at {server.uri} cannot be reached" in " ".join(login.launch(*sweep).split())
    assert login.until_done(*sweep)["counts"]["finished"] == 1
    process = server.start()
    try:
        login.sakd("sync", "runs", "--uri", server.uri)
        assert set(mlflow_states(server.uri, "sakd").values()) == {"FINISHED"}
        assert list(metrics_in(server.uri, "sakd", "test/accuracy").values()) == [[1, 2, 3]]
    finally:
        server.stop(process)
