"""What a run stores of an epoch is written beside the next one, and nothing is worse for it."""

import io
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from sakd import files
from sakd.configuration import Config, build
from sakd.errors import RunError
from sakd.runs import Run, last_words
from sakd.runs.job import execute
from sakd.training import Trainer
from tests.conftest import fit
from tests.test_resume import assert_same, assert_same_runs

ALONE = ("distiller=none", "epochs=3", "threads=1")
PATIENCE = 60.0  # seconds


class Slow:
    """Lets the write of an epoch's checkpoint take as long as the training of the next one needs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, epoch: int):
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.told: list[str] = []
        save, begin_epoch, finish = Run.save_checkpoint, Trainer.begin_epoch, Run.finish

        def slow(run: Run, state: dict, sources: dict) -> None:
            self.told.append(f"write {state['epoch']}")
            if state["epoch"] == epoch:
                self.begun.set()
                assert self.may_end.wait(PATIENCE)
            save(run, state, sources)
            self.told.append(f"written {state['epoch']}")

        def begun(trainer: Trainer) -> None:
            begin_epoch(trainer)
            self.told.append(f"train {trainer.epoch}")
            if trainer.epoch == epoch + 1:
                assert self.begun.wait(PATIENCE)
                self.in_the_next_epoch()

        def finished(run: Run, *arguments: object) -> dict:
            self.told.append("finish")
            return finish(run, *arguments)

        monkeypatch.setattr(Run, "save_checkpoint", slow)
        monkeypatch.setattr(Trainer, "begin_epoch", begun)
        monkeypatch.setattr(Run, "finish", finished)

    def in_the_next_epoch(self) -> None:
        threading.Timer(0.3, self.may_end.set).start()


def epoch_of(run: Run, config: Config) -> int:
    """The epoch that last.pt goes on from."""
    return run.load_checkpoint({"data set": build.dataset(config).checksum})["epoch"]


def test_an_epoch_is_written_beside_the_next_one_but_before_that_is_and_all_before_the_result(
    tiny, monkeypatch
):
    told = Slow(monkeypatch, epoch=1).told
    execute(tiny(*ALONE))
    assert told.index("train 2") < told.index("written 1") < told.index("train 3")
    assert [one for one in told if "train" not in one] == [
        *("write 1", "written 1", "write 2", "written 2", "write 3", "written 3", "finish")
    ]


def test_what_is_written_is_what_was_and_not_what_is_trained_meanwhile(tiny):
    config = tiny("distiller=crd", "spot_mode=adaptive", "epochs=2", "schedule.milestones=[1]")
    trainer, dataset = build.trainer(config, build.parts(config), torch.device("cpu")), build.dataset(config)
    fit(trainer, dataset, 1, 64)
    expected = io.BytesIO()
    torch.save(trainer.state_dict(), expected)
    state = trainer.snapshot()
    fit(trainer, dataset, 2, 64)
    found = io.BytesIO()
    torch.save(state(), found)
    assert_same(*(torch.load(saved, weights_only=True) for saved in rewound(found, expected)))
    assert state()["student"]._metadata == trainer.student.state_dict()._metadata


def rewound(*contents: io.BytesIO) -> tuple[io.BytesIO, ...]:
    for content in contents:
        content.seek(0)
    return contents


def _killed_while_a_checkpoint_is_written(config: Config) -> None:
    torch.set_num_threads(1)
    written, replace, begin_epoch = threading.Event(), os.replace, Trainer.begin_epoch

    def never(source: os.PathLike, target: os.PathLike) -> None:
        if target.name == "last.pt" and target.exists():  # the second
            written.set()
            time.sleep(PATIENCE)
        replace(source, target)

    def killed(trainer: Trainer) -> None:
        begin_epoch(trainer)
        if trainer.epoch == 3:
            assert written.wait(PATIENCE)
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace, Trainer.begin_epoch = never, killed
    execute(config)


@pytest.mark.slow
def test_killed_while_an_epoch_is_written_it_loses_that_and_the_one_under_way_and_ends_with_the_same_bits(
    tiny, tmp_path
):
    config, undisturbed = tiny(*ALONE), tiny(*ALONE, f"runs={tmp_path}/undisturbed")
    execute(undisturbed)
    process = multiprocessing.get_context("forkserver").Process(
        target=_killed_while_a_checkpoint_is_written, args=(config,)
    )
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    run = Run(config)
    assert [line["epoch"] for line in run.metrics()] == [1, 2]
    assert epoch_of(run, config) == 1
    execute(config)
    assert_same_runs(run, Run(undisturbed))
    assert not list(run.folder.glob("*.partial"))


def test_what_cannot_be_written_ends_the_run_at_its_next_step_and_is_named(tiny, monkeypatch):
    config = tiny(*ALONE, "batch_size=16")
    run, steps = Run(config), []
    train_step = Trainer.train_step

    def counted(trainer: Trainer, *arguments: object) -> object:
        if trainer.epoch == 2:
            steps.append(trainer.epoch)
            time.sleep(0.1)
        return train_step(trainer, *arguments)

    class InTheWay(Slow):
        def in_the_next_epoch(self) -> None:
            (run.folder / "last.pt").mkdir()  # nothing can be renamed over a folder
            self.may_end.set()

    InTheWay(monkeypatch, epoch=1)
    monkeypatch.setattr(Trainer, "train_step", counted)
    with pytest.raises(RunError, match=r"^cannot write .*/last\.pt: Is a directory; .* goes on from there$"):
        execute(config)
    assert len(steps) < 12
    assert last_words(run.folder).startswith("cannot write ")
    assert not run.is_held
    assert not list(run.folder.glob("*.partial"))


@pytest.mark.parametrize("is_full", [False, True])
def test_an_interruption_waits_for_what_is_being_written(is_full, tiny, monkeypatch):
    config = tiny(*ALONE)
    run = Run(config)

    class Interrupted(Slow):
        def in_the_next_epoch(self) -> None:
            if is_full:
                (run.folder / "last.pt").mkdir()
            super().in_the_next_epoch()
            raise KeyboardInterrupt("SIGTERM")

    with monkeypatch.context() as patch:
        Interrupted(patch, epoch=1)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    assert [line["epoch"] for line in run.metrics()] == [1]
    assert last_words(run.folder) == "ended by SIGTERM"
    assert not run.is_held
    told = (run.folder / "run.log").read_text()
    assert ("last.pt: Is a directory" in told) == is_full
    if not is_full:
        assert epoch_of(run, config) == 1
