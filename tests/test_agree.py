"""The comparison of the authors' training with ours sees what differs; it needs none of their code here."""

import math
from copy import deepcopy

import pytest
import torch

from benchmarks import agree
from tests.conftest import compose_config


def compared(config, other, steps):
    """Two of our own trainings, side by side."""
    with agree.in_float64():
        sides = [agree.our_side(made, samples=200) for made in (config, other)]
        return agree.compared(*sides, (agree.inputs(number, 4, 200) for number in range(steps)))


def test_a_planted_difference_is_seen_where_it_is_and_nowhere_else():
    names = ("teacher=resnet8", "student=resnet8", "distiller=fitnet", "spot_mode=adaptive")
    config = compose_config("dataset=cifar100", *names)
    alike = compared(config, config, steps=2)
    assert (alike.first, {*alike.largest.values()}) == (None, {0.0})
    planted = deepcopy(config)
    planted["spot_mode"]["optimizer"]["weight_decay"] *= 1.01
    found = compared(planted, config, steps=2)
    assert found.first == 1
    assert min(found.largest[part] for part in ("policy", "adapters")) > agree.AGREED
    assert {found.largest[part] for part in ("teacher", "student", "statistics", "layers")} == {0.0}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 4.0], [1.0, 5.0], 0.2),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [1.0, math.nan], math.inf),
        ([1.0, math.inf], [1.0, math.inf], math.inf),
    ],
)
def test_a_difference_is_relative_to_the_largest_number(one, other, expected):
    assert agree.relative_difference(torch.tensor(one), torch.tensor(other)) == pytest.approx(expected)


def test_the_first_step_above_rounding_is_kept():
    differences = agree.Differences()
    for step, found in enumerate([1e-12, 1e-3, 1e-6], 1):
        differences.note(step, "student", found)
    assert (differences.first, differences.largest) == (2, {"student": 1e-3})


def test_only_reasons_that_are_needed_for_agreement_are_named():
    reasons = [agree.Known(name, (), ()) for name in "abc"]

    def runs(*removed):
        agrees = {"a", "c"} <= {known.reason for known in removed}
        return agree.Differences(first=None if agrees else 1)

    assert [known.reason for known in agree.explained(runs, reasons)] == ["a", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "anti"], "train_reverse.py; expected a clone of zju-vipa/spot-adaptive-pytorch"),
        (["--distillers", "at,kd"], "found 'kd', expected some of fitnet, at,"),
    ],
)
def test_what_cannot_be_compared_is_told(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        agree.parse(["--code", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
