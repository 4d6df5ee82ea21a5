"""`hydra/launcher=local`: a sweep as processes on this machine, with everything that can happen to them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sakd.cli import main as cli
from sakd.runs import read_metrics
from tests.conftest import ROOT, TINY, tracked_cells
from tests.test_code import checkout, commit
from tests.test_sweeps import SMALL, cells, here, planned, states, status, until  # noqa: F401 (here is a fixture)

LOCAL = ("hydra/launcher=local", "hydra.launcher.processes=2", "device=cpu")
ALONE = (*SMALL, "tracking=none", "distiller=none")
WORKERS = "sakd.sweeps.work"


def results(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")}


def checksums(folder: Path) -> dict[str, str]:
    return {name: result["student_sha256"] for name, result in results(folder).items()}


def record(folder: Path, number: int = -1) -> dict:
    """What is known of a hand-over, by default the last one."""
    paths = sorted(
        folder.glob("runs/.sweeps/*/submission.json"), key=lambda path: json.loads(path.read_text())["time"]
    )
    return json.loads(paths[number].read_text())


def handed_over(folder: Path, number: int = -1) -> list[str]:
    return [run for array in record(folder, number)["arrays"] for job in array["jobs"] for run in job]


def logs(folder: Path) -> dict[str, list[Path]]:
    """By run, what its jobs have said, one log for each."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob("runs/.sweeps/*/submission.json"):
        for array in json.loads(path.read_text())["arrays"]:
            for index, job in enumerate(array["jobs"]):
                log = path.parent / "logs" / array["name"] / f"{index}.log"
                for run in job if log.exists() else ():
                    found.setdefault(run, []).append(log)
    return found


def workers(folder: Path) -> dict[str, int]:
    """Processes of sweeps in this folder, by the run that they work on."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue  # it has just ended
        if WORKERS in words and words[words.index(WORKERS) + 1].startswith(str(folder)):
            runs = [word for word in words[words.index(WORKERS) + 2 :] if word]
            found |= dict.fromkeys(runs, int(path.parent.name))
    return found


def running(folder: Path, number: int) -> list[str]:
    """Runs that have done an epoch, by name, once there are so many."""

    def begun() -> list[str]:
        return [path.parent.name for path in folder.glob("runs/*/last.pt")]

    until(lambda: len(begun()) >= number)
    return begun()


@pytest.fixture
def start(tmp_path):
    """Starts `python launch.py -m …` in a folder of the test's own, and ends what is left of it."""
    launchers = []

    def started(
        *overrides: str, script: Path = ROOT / "launch.py", where: Path = tmp_path, **keys
    ) -> subprocess.Popen:
        command = [sys.executable, str(script), "-m", *LOCAL, *overrides]
        launchers.append(
            subprocess.Popen(
                command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **keys
            )
        )
        return launchers[-1]

    yield started
    for launcher in launchers:
        launcher.kill()
        launcher.communicate()
    for process in {*workers(tmp_path).values()}:
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_all_finish_by_the_copied_code_the_teacher_first_and_the_same_command_again_trains_nothing(
    launch,
    tmp_path,
    here,  # noqa: F811
):
    overrides = (*TINY, "threads=1", "tracking=none", "distiller=kd", "spot_mode=fixed,adaptive")
    output = launch("-m", *LOCAL, *overrides).stdout
    assert "2 cells: 2 missing" in output
    assert "2 cells: 2 finished" in output
    by_processes = results(tmp_path)
    (teacher,) = [job.name for job in planned(*overrides).first]
    assert len(by_processes) == 3
    assert handed_over(tmp_path)[0] == teacher
    begun = {name: read_metrics(tmp_path / "runs" / name)[0] for name in by_processes}
    taught = [line["time"] - line["seconds"] for name, line in begun.items() if name != teacher]
    assert read_metrics(tmp_path / "runs" / teacher)[-1]["time"] < min(taught)
    said = {name: path.read_text() for name, (path,) in logs(tmp_path).items()}
    assert said.keys() == by_processes.keys()
    assert len(set(said.values())) == 2, "the students are one job"
    assert not any(re.search("training the teacher|waiting for it", log) for log in said.values())
    (copy,) = (tmp_path / "runs/.code").iterdir()
    for result in by_processes.values():
        assert result["code"]["snapshot"].endswith(f"({copy.name})")

    lines = {name: (tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in by_processes}
    again = launch("-m", *LOCAL, *overrides).stdout
    assert "nothing to submit" in again
    assert "2 cells: 2 finished" in again
    assert lines == {name: (tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in by_processes}
    assert len(list((tmp_path / "runs/.sweeps").glob("*/submission.json"))) == 1


@pytest.mark.slow
def test_the_same_cells_by_plain_commands_one_after_another_have_the_same_weights(launch, tmp_path):
    overrides = (*TINY, "threads=1", "tracking=none", "distiller=ft", "+dataset.recipe.pretraining_epochs=1")
    launch("-m", *LOCAL, *overrides, "spot_mode=fixed,random", "seed=0,1")
    (tmp_path / "plain").mkdir()
    for mode in ("random", "fixed"):
        for seed in (1, 0):
            launch(*overrides, f"spot_mode={mode}", f"seed={seed}", "runs=plain/runs")
    assert len(results(tmp_path)) == 4 + 2  # with the teacher and the paraphraser, once
    assert checksums(tmp_path / "plain") == checksums(tmp_path)


@pytest.mark.slow
def test_a_cell_that_fails_does_not_stop_the_others_and_mlflow_shows_its_traceback(launch, tmp_path, here):  # noqa: F811
    overrides = (*TINY, "threads=1", "distiller=none", "optimizer.lr=1000000,0.05,0.1")
    done = launch("-m", *LOCAL, *overrides, expect=1)
    assert "3 cells: 2 finished, 1 failed" in done.stdout
    failed, *others = [job.name for job in planned(*overrides).cells]
    assert set(results(tmp_path)) == set(others)
    (log,) = logs(tmp_path)[failed]
    assert "Traceback (most recent call last)" in log.read_text()
    assert "became NaN" in log.read_text()
    assert cells(*overrides)[failed]["state"] == "failed"
    assert (tmp_path / cells(*overrides)[failed]["log"]).samefile(log)
    runs = tracked_cells(f"sqlite:///{tmp_path}/mlflow.db")
    by_folder = {Path(run.data.tags["sakd.folder"]).name: run for run in runs}
    assert {name: run.info.status for name, run in by_folder.items()} == {failed: "FAILED"} | dict.fromkeys(
        others, "FINISHED"
    )
    note = by_folder[failed].data.tags["mlflow.note.content"]
    assert "```\nTraceback (most recent call last)" in note
    assert "became NaN" in note
    assert not any("Traceback" in by_folder[name].data.tags["mlflow.note.content"] for name in others)

    again = launch("-m", *LOCAL, *overrides, expect=1)
    assert "3 cells: 2 finished, 1 failed" in again.stdout
    assert handed_over(tmp_path) == [failed]


@pytest.mark.slow
def test_students_of_a_teacher_that_fails_are_left_out_and_say_why(launch, tmp_path, here):  # noqa: F811
    overrides = (
        *TINY,
        "tracking=none",
        "distiller=kd",
        "spot_mode=fixed,anti",
        "teacher.training.optimizer.lr=1000000,0.05",
    )
    output = launch("-m", *LOCAL, *overrides, expect=1).stdout
    told = cells(*overrides)
    assert [cell["state"] for cell in told.values()] == ["failed", "finished"] * 2
    (teacher,) = [
        job.name for job in planned(*overrides).first if job.run.config["optimizer"]["lr"] == 1000000
    ]
    for name, cell in told.items():
        if cell["state"] == "failed":
            assert cell["error"].startswith(f"{teacher}, which it needs, failed: ")
            assert "became NaN" in cell["error"]
            assert (tmp_path / cell["log"]).samefile(logs(tmp_path)[teacher][0])
            assert f"{name} is left out: what it needs failed" in output
            assert name not in logs(tmp_path)
    assert "4 cells: 2 finished, 2 failed" in status(*overrides)


@pytest.mark.slow
def test_ctrl_c_ends_its_processes_and_the_same_command_goes_on(start, tmp_path, here):  # noqa: F811
    overrides = (*SMALL, "distiller=none", "epochs=150", "seed=0,1,2")
    launcher = start(*overrides, start_new_session=True)
    begun = running(tmp_path, 2)
    assert set(workers(tmp_path)) == set(begun)
    assert all(os.getsid(process) == process for process in workers(tmp_path).values())
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal sends it, to all in the foreground
    output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 130, output
    assert "the same command goes on" in output
    assert workers(tmp_path) == {}
    waiting = [job.name for job in planned(*overrides).cells if job.name not in begun]
    told = cells(*overrides)
    assert {told[name]["error"] for name in begun} == {"ended by SIGTERM"}
    assert [told[name]["state"] for name in waiting] == ["lost"]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert [run.info.status for run in tracked_cells(store)] == ["KILLED"] * 2
    before = {name: len(read_metrics(tmp_path / "runs" / name)) for name in begun}
    assert all(0 < epochs < 150 for epochs in before.values())

    again = start(*overrides)
    output, _ = again.communicate(timeout=500)
    assert again.returncode == 0, output
    assert "3 cells: 3 finished" in output
    assert [run.info.status for run in tracked_cells(store)] == ["FINISHED"] * 3
    for name in begun:
        assert "going on after epoch" in (tmp_path / "runs" / name / "run.log").read_text()
        assert [line["epoch"] for line in read_metrics(tmp_path / "runs" / name)] == list(range(1, 151))


@pytest.mark.slow
def test_when_the_launcher_is_killed_what_waits_is_lost_and_the_same_command_takes_up_that_alone(
    start, tmp_path, here  # noqa: F811
):  # fmt: skip
    overrides = (*ALONE, "epochs=400", "seed=0,1,2")
    launcher = start(*overrides)
    names = [job.name for job in planned(*overrides).cells]
    assert set(running(tmp_path, 2)) == set(names[:2])
    assert states(*overrides) == ["running", "running", "queued"]
    launcher.kill()
    launcher.wait()
    assert set(workers(tmp_path)) == set(names[:2])
    assert states(*overrides) == ["running", "running", "lost"]
    again = start(*overrides)
    output, _ = again.communicate(timeout=500)
    assert again.returncode == 0, output
    assert handed_over(tmp_path) == names[2:]
    assert states(*overrides) == ["finished"] * 3
    for name in names:  # each had one process
        assert len(logs(tmp_path)[name]) == 1


COHORT = (*SMALL, "distiller=kd,at,sp", "spot_mode=fixed", "teacher.training.epochs=1", "epochs=300")


@pytest.mark.slow
def test_a_member_that_is_cancelled_ends_the_others_go_on_and_retry_takes_it_up(start, tmp_path, here):  # noqa: F811
    launcher = start(*COHORT)
    names = [cell.name for cell in planned(*COHORT).cells]
    until(lambda: set(running(tmp_path, 3)) >= {*names})
    (process,) = {workers(tmp_path)[name] for name in names}
    told = cells(*COHORT)
    assert [told[name]["state"] for name in names] == ["running"] * 3
    assert all(0 < told[name]["epoch"] < 300 for name in names)

    alone = [text for text in COHORT if not text.startswith("distiller")]
    assert CliRunner().invoke(cli, ["cancel", *alone, "distiller=at"]).output == "1 cell cancelled\n"
    until(lambda: states(*COHORT) == ["running", "failed", "running"], 30)
    epochs = len(read_metrics(tmp_path / "runs" / names[1]))
    assert 0 < epochs < 300
    assert cells(*COHORT)[names[1]]["error"] == "cancelled"
    assert set(workers(tmp_path).values()) == {process}
    retried = CliRunner().invoke(cli, ["retry", *COHORT])  # while the others go on
    assert retried.exit_code == 0, retried.output
    assert handed_over(tmp_path) == names[1:2]
    output, _ = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, output
    assert states(*COHORT) == ["finished"] * 3
    assert "going on after epoch" in (tmp_path / "runs" / names[1] / "run.log").read_text()
    for name in names:
        assert [line["epoch"] for line in read_metrics(tmp_path / "runs" / name)] == list(range(1, 301))
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert [run.info.status for run in tracked_cells(store)] == ["FINISHED"] * 3


@pytest.mark.slow
def test_a_job_whose_cells_are_all_cancelled_is_never_started(start, tmp_path, here):  # noqa: F811
    overrides = (*ALONE, "epochs=100", "seed=0,1")
    launcher = start(*overrides, "hydra.launcher.processes=1")
    first, second = (cell.name for cell in planned(*overrides).cells)
    running(tmp_path, 1)
    cancelled = CliRunner().invoke(cli, ["cancel", *ALONE, "epochs=100", "seed=1"])
    assert cancelled.output == "1 cell cancelled\n"
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 1
    assert f"{second} is left out: it is cancelled" in output
    told = cells(*overrides)
    assert [told[name]["state"] for name in (first, second)] == ["finished", "failed"]
    assert not (tmp_path / "runs" / second).exists()
    assert second not in logs(tmp_path)


@pytest.mark.slow
def test_all_cells_can_be_cancelled_also_where_the_launch_has_died(start, tmp_path, here):  # noqa: F811
    overrides = (*COHORT, "seed=0,1")
    launcher = start(*overrides)
    running(tmp_path, 7)
    launcher.kill()
    launcher.wait()
    assert CliRunner().invoke(cli, ["cancel", *overrides]).output == "6 cells cancelled\n"
    until(lambda: states(*overrides) == ["failed"] * 6, 60)
    until(lambda: not workers(tmp_path), 60)


def test_processes_that_write_one_file_at_once_all_succeed(tmp_path):
    """As students do that certify their teacher at the same moment."""
    script = "import sys; from pathlib import Path; from sakd.files import write_whole\n"
    script += "for _ in range(300): write_whole(Path(sys.argv[1]), b'the same')"
    command = [sys.executable, "-c", script, str(tmp_path / "certificate.json")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[1] for process in processes] == [""] * 4
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("certificate.json", "the same")
    ]


@pytest.mark.slow
def test_two_launches_of_overlapping_sweeps_at_once_hand_nothing_over_twice(start, tmp_path):
    both = [start(*ALONE, "epochs=3", "seed=0,1"), start(*ALONE, "epochs=3", "seed=1,2")]
    for launcher in both:
        output, _ = launcher.communicate(timeout=500)
        assert launcher.returncode == 0, output
    assert len(results(tmp_path)) == 3
    assert len(handed_over(tmp_path, 0) + handed_over(tmp_path, 1)) == 3


@pytest.mark.slow
def test_each_process_has_a_gpu_of_its_own_and_there_are_as_many_as_gpus(start, tmp_path):
    overrides = (*ALONE, "epochs=5000", "seed=0,1,2", "hydra.launcher.processes=null")
    launcher = start(*overrides, env=os.environ | {"CUDA_VISIBLE_DEVICES": "5,7"})
    running(tmp_path, 2)
    time.sleep(1)
    given = []
    for process in workers(tmp_path).values():
        environment = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
        given += [word.partition("=")[2] for word in environment if word.startswith("CUDA_VISIBLE_DEVICES=")]
    assert sorted(given) == ["5", "7"]
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=200)
    assert workers(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in the checkout", "elsewhere"])
def test_jobs_run_the_code_as_it_was(where, start, tmp_path):
    root = checkout(tmp_path / "checkout")
    folder = root if where == "in the checkout" else tmp_path
    with (root / "sakd/training/trainer.py").open("a") as file:
        file.write("# changed before the launch\n")
    environment = os.environ | {"PYTHONPATH": str(root)}
    overrides = (*ALONE, "epochs=60", "seed=0,1", "hydra.launcher.processes=1")
    launcher = start(*overrides, script=root / "launch.py", where=folder, env=environment)
    (first,) = running(folder, 1)
    with (root / "sakd/training/trainer.py").open("a") as file:
        file.write('raise SystemExit("broken")\n')
    commit(root)
    output, _ = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, output
    found = results(folder)
    assert len(found) == 2
    (code,) = [dict(pairs) for pairs in {tuple(result["code"].items()) for result in found.values()}]
    assert code["changed"]
    assert code["snapshot"] is not None
    for name in found:
        difference = (folder / "runs" / name / "code.diff").read_text()
        assert "+# changed before the launch" in difference
        assert "broken" not in difference
    assert first in found
