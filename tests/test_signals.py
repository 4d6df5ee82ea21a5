"""Interruptions: the first ends in order, a further one at once, whoever sends it; with real processes and
terminals."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from sakd.runs import is_locked, last_words
from sakd.signals import INTERRUPTIONS, ended_in_order, interruptible, uninterrupted
from tests.conftest import ROOT, TINY, tracked_cells
from tests.test_local_launcher import workers
from tests.test_sweeps import SMALL, until

# A program that waits to be interrupted, and then takes its ``seconds`` to note that, and again at its end.
PROGRAM = """
import os, sys, time
from pathlib import Path
from sakd.signals import ended_in_order, uninterrupted
seconds = float(sys.argv[1])
with ended_in_order("the same command goes on"):
    try:
        print("begun", flush=True)
        time.sleep(60)
    except KeyboardInterrupt as interruption:
        with uninterrupted():
            time.sleep(seconds)
            Path("ended").write_text(str(interruption))
        time.sleep(seconds)
        print("a word for the terminal", flush=True)
        raise
"""


@pytest.fixture
def program(tmp_path):
    """Starts the program in a folder of the test's own; it has begun."""

    def started(seconds: float, *before: str) -> subprocess.Popen:
        command = [*before, sys.executable, "-c", PROGRAM, str(seconds)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout.readline() == "begun\n"
        return process

    return started


# A program that is interrupted once it has done all, while it leaves.
LEAVING = """
import atexit, os, sys, time
from sakd.signals import ended_in_order
with ended_in_order():
    atexit.register(lambda: (os.kill(os.getpid(), int(sys.argv[1])), time.sleep(60)))
"""


def test_an_interruption_of_the_last_moments_ends_at_once():
    for number in INTERRUPTIONS:
        done = subprocess.run(
            [sys.executable, "-c", LEAVING, str(int(number))],
            cwd=ROOT, capture_output=True, text=True, timeout=40, check=False,
        )  # fmt: skip
        assert done.returncode == 130
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", INTERRUPTIONS)
def test_an_interruption_ends_in_order_with_one_line(number, program, tmp_path):
    process = program(0.0)
    process.send_signal(number)
    _, said = process.communicate(timeout=40)
    name = signal.Signals(number).name
    assert (process.returncode, said) == (130, f"interrupted ({name}); the same command goes on\n")
    assert (tmp_path / "ended").read_text() == name


def test_a_second_interruption_ends_at_once_but_not_before_what_must_be_noted(program, tmp_path):
    process = program(2.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = process.communicate(timeout=40)
    assert 0.5 < time.monotonic() - start < 3
    assert process.returncode == 130
    assert said.splitlines() == ["interrupted (SIGINT) at the end; `sakd sync` sends what MLflow lacks"]
    assert (tmp_path / "ended").read_text() == "SIGINT"


def test_two_signals_that_come_together_are_one(program, tmp_path):
    process = program(0.3)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    output, said = process.communicate(timeout=40)
    assert process.returncode == 130
    assert output == "a word for the terminal\n"
    assert len(said.splitlines()) == 1


def test_below_nohup_a_hang_up_is_ignored(program):
    process = program(0.0, "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)
    assert process.returncode == 130


def hang_up(command: list[str], folder: Path, begun) -> int:
    """Close the terminal of a command once it has ``begun``; its exit code."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        os.set_blocking(terminal, False)

        def reading() -> bool:
            with suppress(BlockingIOError):
                os.read(terminal, 1 << 16)  # a terminal that nobody reads fills up
            return begun()

        until(reading, 120)
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_closed_terminal_ends_in_order_though_no_word_can_be_said(tmp_path):
    program = PROGRAM.replace('print("begun", flush=True)', 'Path("begun").touch()')
    command = [sys.executable, "-c", program, "0.0"]
    assert hang_up(command, tmp_path, (tmp_path / "begun").exists) == 130
    assert (tmp_path / "ended").read_text() == "SIGHUP"


def test_handlers_are_as_before_once_nothing_is_to_be_interrupted():
    before = [signal.getsignal(number) for number in INTERRUPTIONS]

    def told_twice():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)

    with interruptible(), pytest.raises(KeyboardInterrupt, match="SIGHUP"):
        told_twice()
    with pytest.raises(SystemExit), ended_in_order():
        sys.exit("another error")
    assert [signal.getsignal(number) for number in INTERRUPTIONS] == before


def test_a_command_that_is_interrupted_ends_with_130(tmp_path):
    (tmp_path / "x").mkdir()
    state = tmp_path / "x/mlflow.json"
    noted = {"uid": "0" * 32, "start_time": 0, "uri": f"sqlite:///{tmp_path}/x.db", "experiment": "sakd"}
    state.write_text(json.dumps({**noted, "run_id": None, "status": "RUNNING", "delivered": None}))
    with FileLock(tmp_path / "x/.mirror.lock"):
        process = subprocess.Popen(
            [sys.executable, "-m", "sakd.cli", "sync", str(tmp_path)],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        until(lambda: "KILLED" in state.read_text(), 60)
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=40)
    assert (process.returncode, output + said) == (130, "interrupted (SIGINT)\n")


# ---- runs


def of_mlflow(folder: Path) -> list[str]:
    return [run.info.status for run in tracked_cells(f"sqlite:///{folder}/mlflow.db")]


def begun(folder: Path) -> bool:
    """True once a run has done an epoch."""
    return bool(list(folder.glob("runs/*/last.pt")))


@pytest.fixture
def training(tmp_path):
    """Starts a training that takes minutes, and ends it if the test does not."""
    processes = []

    def started(*overrides: str, before: tuple[str, ...] = (), sweep: tuple[str, ...] = ()):
        small = (*TINY, "distiller=none")
        command = [*before, sys.executable, str(ROOT / "launch.py"), *sweep, *small, *overrides]
        processes.append(
            subprocess.Popen(
                command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_is_killed_in_mlflow_and_goes_on(launch, tmp_path):
    overrides = (*TINY, "distiller=none", "epochs=300")
    command = [sys.executable, str(ROOT / "launch.py"), *overrides]
    assert hang_up(command, tmp_path, lambda: begun(tmp_path)) == 130
    assert of_mlflow(tmp_path) == ["KILLED"]
    (folder,) = (tmp_path / "runs").glob("digits-*")
    assert last_words(folder) == "ended by SIGHUP"
    assert not is_locked(folder / ".lock")
    assert "going on after epoch" in launch(*overrides).stdout
    assert of_mlflow(tmp_path) == ["FINISHED"]


@pytest.mark.slow
def test_a_run_below_nohup_trains_to_its_end(training, tmp_path):
    process = training("epochs=60", before=("nohup",))
    until(lambda: begun(tmp_path), 120)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert of_mlflow(tmp_path) == ["FINISHED"]


@pytest.mark.slow
def test_a_sweep_of_processes_whose_terminal_is_closed_ends_them_all(tmp_path):
    local = ("hydra/launcher=local", "hydra.launcher.processes=2", "device=cpu")
    overrides = (*SMALL, *local, "distiller=none", "epochs=1000", "seed=0,1,2")
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *overrides]
    assert hang_up(command, tmp_path, lambda: len(list(tmp_path.glob("runs/*/last.pt"))) == 2) == 130
    assert workers(tmp_path) == {}
    assert of_mlflow(tmp_path) == ["KILLED"] * 2


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_wait_for_the_store(training, launch, tmp_path):
    process = training("epochs=300")
    until(lambda: begun(tmp_path), 120)
    with FileLock(tmp_path / "mlflow.db.lock"):
        process.send_signal(signal.SIGINT)
        (folder,) = (tmp_path / "runs").glob("digits-*")
        until(lambda: last_words(folder) is not None, 60)
        time.sleep(1)
        assert process.poll() is None, "it waits for the store"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert output.splitlines()[-1] == "interrupted (SIGINT) at the end; `sakd sync` sends what MLflow lacks"
    assert not is_locked(folder / ".lock")
    subprocess.run([sys.executable, "-m", "sakd.cli", "sync", str(tmp_path / "runs")], cwd=ROOT, check=True)
    assert of_mlflow(tmp_path) == ["KILLED"]
    assert "going on after epoch" in launch(*TINY, "distiller=none", "epochs=300").stdout
    assert of_mlflow(tmp_path) == ["FINISHED"]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_sweep_of_processes_that_end_by_themselves(training, tmp_path):
    local = ("hydra/launcher=local", "hydra.launcher.processes=2", "device=cpu", "threads=1")
    process = training("epochs=1000", "seed=0,1,2", sweep=("-m", *local))
    until(lambda: len(list(tmp_path.glob("runs/*/last.pt"))) == 2, 120)
    with FileLock(tmp_path / "mlflow.db.lock"):
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert process.poll() is None, "it waits for what it has ended"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "Traceback" not in output
    until(lambda: workers(tmp_path) == {}, 60)
    folders = list((tmp_path / "runs").glob("digits-*"))
    assert [last_words(folder) for folder in folders] == ["ended by SIGTERM"] * 2
    assert not any(is_locked(folder / ".lock") for folder in folders)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")])
def test_who_is_interrupted_once_all_is_finished_is_told_so(sweep, training, launch, tmp_path):
    process = training("epochs=300", sweep=sweep)
    until(lambda: begun(tmp_path), 120)
    with FileLock(tmp_path / "mlflow.db.lock"):
        until(lambda: len(list(tmp_path.glob("runs/*/result.json"))) == (2 if sweep else 1), 240)
        for line in process.stdout:  # all is finished a moment after the last result is stored
            if line.startswith("waiting for MLflow"):
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.endswith(
        "interrupted (SIGINT); all is finished; the same command shows it and brings MLflow up to date\n"
    )
    launch(*sweep, *TINY, "distiller=none", "epochs=300")
    assert set(of_mlflow(tmp_path)) == {"FINISHED"}
