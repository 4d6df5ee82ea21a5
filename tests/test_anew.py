"""What is said where another number of epochs makes another run."""

import logging

import pytest

from sakd.configuration import teacher_of
from sakd.errors import ConfigError
from sakd.runs import Run
from sakd.runs.anew import tell_what_is_trained_anew
from sakd.runs.job import execute


@pytest.fixture
def told(tiny, caplog):
    """Lines that are said as runs of these overrides begin, after one of two epochs has been finished."""

    def lines(*asked: tuple[str, ...]) -> list[str]:
        before = tiny("distiller=kd")
        for config in (before, teacher_of(before)):
            run = Run(config)
            run.folder.mkdir(parents=True)
            run.start()
            (run.folder / "result.json").write_text("{}")
        caplog.set_level(logging.INFO, "sakd")
        tell_what_is_trained_anew([Run(tiny("distiller=kd", *overrides)) for overrides in asked])
        return caplog.messages

    return lines


def test_more_epochs_are_another_run_and_another_teacher_which_can_be_held(told):
    (line,) = told(("epochs=30",))
    assert "epochs: found 30, and " in line
    assert "-kd-adaptive-seed0-" in line
    assert "is finished with 2; another number is another run" in line
    assert "trained from its start, as schedule.milestones follows it" in line
    assert "teacher.training.epochs follows epochs: teacher.training.epochs=2 keeps the one there is" in line


def test_a_teacher_that_is_held_is_not_spoken_of(told):
    (line,) = told(("epochs=30", "teacher.training.epochs=2"))
    assert "another run" in line
    assert "its teacher" not in line


@pytest.mark.parametrize(
    "overrides", [("epochs=2",), ("epochs=30", "optimizer.lr=0.1"), ("epochs=30", "seed=1"), ("seed=1",)]
)
def test_nothing_is_said_of_a_run_that_differs_in_more_or_is_there(overrides, told):
    assert told(overrides) == []


def test_nothing_is_said_beside_a_mistake(told, tiny, caplog):
    assert told() == []
    with pytest.raises(ConfigError, match=r"optimized_metric: found 'loss/none'"):
        execute(tiny("distiller=kd", "epochs=30", "optimized_metric=loss/none"))
    assert caplog.messages == []


def test_nothing_is_said_of_a_run_that_goes_on(told, tiny):
    Run(tiny("distiller=kd", "epochs=30")).folder.mkdir(parents=True)
    assert told(("epochs=30",)) == []
