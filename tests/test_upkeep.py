"""`sakd gc` removes what nobody needs, and never what a run or a job needs."""

import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from sakd.cli import main
from sakd.sweeps.launchers.local import ALIVE
from sakd.sweeps.submissions import Array, Submission, note_failure

OLD = time.time() - 3 * 86400


def gc(*arguments: object, expect: int = 0) -> str:
    done = CliRunner().invoke(main, ["gc", *map(str, arguments)])
    assert done.exit_code == expect, done.output
    assert "Traceback" not in done.output
    return done.output


class Folder:
    """A folder of runs, with submissions that are all of three days ago."""

    def __init__(self, runs: Path):
        self.runs, self.number = runs, 0
        runs.mkdir()

    def run(self, name: str, finished: bool = True) -> Path:
        (self.runs / name).mkdir()
        (self.runs / name / "config.yaml").touch()
        if finished:
            (self.runs / name / "result.json").touch()
        return self.runs / name

    def submit(self, *names: str) -> Submission:
        """A submission of these runs, whose jobs run a copy of the code of its own."""
        self.number += 1
        copy = self.runs / ".code" / f"{self.number:016x}"
        copy.mkdir(parents=True)
        (copy / "snapshot.json").write_text("{}")
        folder = self.runs / ".sweeps" / f"20260101-00000{self.number}-abcdef"
        launcher = {"_target_": "sakd.sweeps.LocalLauncher", "processes": 1}
        arrays = [Array(f"a{self.number}", [[name] for name in names])]
        submission = Submission(folder, launcher, arrays, {}, [], str(copy), time=OLD + self.number)
        submission.write({})
        return submission

    def left(self) -> set[str]:
        """Numbers of submissions that are there, and of copies."""
        copies = {f"code {int(path.name, 16)}" for path in (self.runs / ".code").glob("[0-9]*")}
        return copies | {f"sweep {path.name[14]}" for path in (self.runs / ".sweeps").glob("2026*")}

    def age(self) -> None:
        for path in self.runs.rglob("*"):
            os.utime(path, (OLD, OLD))


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "runs")


def test_submissions_whose_runs_are_finished_go_with_their_code_and_the_others_stay(folder):
    for name in ("a", "b"):
        folder.run(name)
    folder.run("c", finished=False)
    folder.submit("a", "b")  # 1: finished
    folder.submit("a", "c")  # 2: c was submitted again
    note_failure(folder.submit("c").folder, "c", "RuntimeError: no")  # 3: the last word about c
    folder.submit("b", "d")  # 4: d was never begun
    withdrawn = folder.submit("e")  # 5
    withdrawn.withdraw()
    (folder.runs / ".sweeps" / "parents" / "f").mkdir(parents=True)
    folder.age()
    every = folder.left()
    told = gc(folder.runs, "--dry-run")
    assert folder.left() == every
    assert "6 would be removed" in told
    assert gc(folder.runs).replace("removed", "would be removed") == told
    assert folder.left() == {"sweep 3", "code 3", "sweep 4", "code 4"}
    assert (folder.runs / ".sweeps" / "parents" / "f").exists()
    assert "0 removed" in gc(folder.runs)


def test_what_a_live_job_needs_stays(folder):
    """A job whose run is finished may train others, and a run under way may have lost its launch."""
    folder.run("a")
    folder.run("b")
    alive, under_way = folder.submit("a"), folder.submit("b")
    folder.age()
    with FileLock(alive.folder / ALIVE), FileLock(folder.runs / "b" / ".lock"):
        folder.age()
        assert "0 removed" in gc(folder.runs)
    assert {alive.folder.exists(), under_way.folder.exists()} == {True}
    gc(folder.runs)
    assert folder.left() == set()


def test_what_is_young_stays_unless_it_is_asked_for(folder):
    folder.run("a")
    folder.submit("a")
    assert "0 removed" in gc(folder.runs)
    assert "2 removed" in gc(folder.runs, "--older-than", 0)


def test_what_a_kill_cut_short_goes_but_not_of_a_run_under_way(folder):
    for name in ("a", "b"):
        (folder.run(name) / "last.pt.0123.partial").write_bytes(b"12345")
        (folder.runs / name / "last.pt").touch()
    (folder.runs / ".certificates").mkdir()
    (folder.runs / ".certificates" / "c.json.0123.partial").touch()
    (folder.runs / ".code" / ".partial-xyz").mkdir(parents=True)
    (folder.runs / "elsewhere").mkdir()
    (folder.runs / "a" / "link.partial").symlink_to(folder.runs / "elsewhere")
    folder.age()
    with FileLock(folder.runs / "b" / ".lock"):
        told = gc(folder.runs)
    assert "3 removed, 5 bytes" in told
    assert not (folder.runs / "a" / "last.pt.0123.partial").exists()
    assert (folder.runs / "b" / "last.pt.0123.partial").exists()
    assert (folder.runs / "elsewhere").exists()
    assert (folder.runs / "a" / "last.pt").exists()


def test_no_folder_and_a_damaged_record_are_named_and_nothing_goes(folder):
    folder.run("a")
    damaged = folder.submit("a").folder / "submission.json"
    damaged.write_text("{")
    folder.age()
    before = folder.left()
    assert f"{damaged}: found no valid JSON" in gc(folder.runs, expect=1)
    assert folder.left() == before
    assert "expected a folder of runs" in gc(folder.runs / "none", expect=1)
