"""Runs of one process have logs of their own, each with its own messages alone."""

import contextvars
import io
import logging
import threading
from pathlib import Path

import pytest

from sakd.errors import RunError
from sakd.runs import last_words
from sakd.runs.logs import OwnLog

log = logging.getLogger("sakd")


@pytest.fixture(autouse=True)
def _messages_as_launched():
    before = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(before)
    assert not [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]


def messages(path: Path) -> list[str]:
    """What a log says after its first line, without date and time."""
    first, *rest = path.read_text().splitlines()
    assert " INFO begins, with the code of " in first
    return [line.split(" ", 2)[2] for line in rest]


def test_of_two_logs_each_gets_its_own_messages(tmp_path):
    paths = tmp_path / "a.log", tmp_path / "b.log"
    with OwnLog(paths[0]) as a, OwnLog(paths[1]) as b:
        log.info("of no run")
        with a.speaking():
            log.info("of a")
            with b.speaking():
                log.warning("of b, which a trains first")
            log.info("of a again")
        b.note("of b alone")
        log.info("of no run")
    log.info("of no run")
    assert messages(paths[0]) == ["INFO of a", "INFO of a again"]
    assert messages(paths[1]) == ["WARNING of b, which a trains first", "INFO of b alone"]


def test_a_note_is_said_nowhere_else(tmp_path, monkeypatch):
    elsewhere = io.StringIO()
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(elsewhere)])
    with OwnLog(tmp_path / "run.log") as own, own.speaking():
        log.info("to all")
        own.note("to this log")
    assert elsewhere.getvalue() == "to all\n"
    assert messages(tmp_path / "run.log") == ["INFO to all", "INFO to this log"]


def test_a_thread_with_a_copy_of_the_context_speaks_for_its_run_whatever_is_spoken_elsewhere(tmp_path):
    a_speaks, b_spoke = threading.Event(), threading.Event()

    def work():
        a_speaks.set()
        b_spoke.wait(10)
        log.info("from a's thread")

    with OwnLog(tmp_path / "a.log") as a, OwnLog(tmp_path / "b.log") as b:
        with a.speaking():
            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
            thread.start()
        a_speaks.wait(10)
        with b.speaking():
            log.info("from b")
            b_spoke.set()
            thread.join()
            log.info("from b")
    assert messages(tmp_path / "a.log") == ["INFO from a's thread"]
    assert messages(tmp_path / "b.log") == ["INFO from b", "INFO from b"]


def test_many_threads_speak_at_once_and_nothing_is_mixed_up(tmp_path):
    def work(own: OwnLog, name: str):
        with own.speaking():
            for number in range(200):
                log.info("%s %d", name, number)

    logs = {name: OwnLog(tmp_path / f"{name}.log") for name in "abcd"}
    for own in logs.values():
        own.__enter__()
    threads = [threading.Thread(target=work, args=(own, name)) for name, own in logs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in logs.values():
        own.__exit__(None, None, None)
    for name in logs:
        assert messages(tmp_path / f"{name}.log") == [f"INFO {name} {number}" for number in range(200)]


def test_a_member_that_failed_has_its_traceback_and_the_others_know_nothing_of_it(tmp_path):
    with OwnLog(tmp_path / "run.log") as own, OwnLog(tmp_path / "other.log") as other:
        try:
            raise ZeroDivisionError("of all things")
        except ZeroDivisionError as error:
            own.failed(error)
        with other.speaking():
            log.info("goes on")
    _, told, *traceback = (tmp_path / "run.log").read_text().splitlines()
    assert told.endswith(" ERROR ended early: ZeroDivisionError: of all things")
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ZeroDivisionError: of all things"
    assert last_words(tmp_path) == "ZeroDivisionError: of all things"
    assert messages(tmp_path / "other.log") == ["INFO goes on"]


def test_an_interruption_passes_through_all_and_is_noted_where_nothing_ended_before(tmp_path):
    for name in ("failed", "going"):
        (tmp_path / name).mkdir()
    failed, going = OwnLog(tmp_path / "failed/run.log"), OwnLog(tmp_path / "going/run.log")

    def interrupted():
        with failed, going, going.speaking():
            failed.failed(RunError("its disk is full"))
            raise KeyboardInterrupt("SIGTERM")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert last_words(tmp_path / "failed") == "its disk is full"
    assert last_words(tmp_path / "going") == "ended by SIGTERM"


def test_a_clusters_time_limit_is_no_failure(tmp_path):
    with pytest.raises(SystemExit), OwnLog(tmp_path / "run.log"):
        raise SystemExit
    assert messages(tmp_path / "run.log") == ["INFO ends here, to go on in its next turn"]
    assert last_words(tmp_path) is None


def test_a_log_that_is_opened_again_goes_on(tmp_path):
    for number in range(2):
        with pytest.raises(RunError), OwnLog(tmp_path / "run.log"):
            raise RunError(f"error {number}")
    assert (tmp_path / "run.log").read_text().count("begins, with") == 2
    assert last_words(tmp_path) == "error 1"


def test_before_it_is_open_and_afterwards_nothing_is_written_and_nothing_goes_wrong(tmp_path):
    own = OwnLog(tmp_path / "run.log")
    own.failed(RunError("an interruption while the logs of others are opened"))
    assert not own.path.exists()
    with own, own.speaking():
        log.info("inside")
    own.note("too late")
    with own.speaking():
        log.info("too late")
    assert messages(own.path) == ["INFO inside"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_does_not_drown_the_error_that_it_causes(capfd):
    def runs():
        with OwnLog(Path("/dev/full")) as own, own.speaking():
            log.info("cannot be written")
            raise RunError("the disk is full")

    with pytest.raises(RunError, match="the disk is full"):
        runs()
    assert capfd.readouterr().err == ""


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*missing/run\.log: No such file"):
        OwnLog(tmp_path / "missing/run.log").__enter__()
