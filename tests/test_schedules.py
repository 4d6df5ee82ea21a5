"""Optimizers and schedules by name, warmed up, by epoch or by step: what is composed, and the rates of each
step written out."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sakd.configuration import build, compose, digest
from sakd.configuration.identity import NEUTRAL
from sakd.errors import SakdError
from sakd.training import Schedule
from sakd.training.schedules import Rates
from tests.conftest import compose_config, fit
from tests.test_cohort import alone, assert_as_alone, small
from tests.test_resume import assert_same

CPU = torch.device("cpu")
WARM = ("schedule.warmup_epochs=2", "schedule.warmup_start=0.1")
EPOCHS, STEPS, LR = 4, 3, 0.05


def multistep(t: float) -> float:
    return LR * 0.1 ** sum(t >= milestone for milestone in (2, 3))


def cosine(t: float) -> float:
    return LR * (1 + math.cos(math.pi * t / EPOCHS)) / 2


def onecycle(t: float) -> float:
    """Up to LR in 30 %, and down to a 250,000th: PyTorch counts from the first step to the last."""
    step, total = t * STEPS, EPOCHS * STEPS
    top, last = 0.3 * total - 1, total - 1
    (begin, end, low, high) = (0, top, LR / 25, LR) if step <= top else (top, last, LR, LR / 250_000)
    return high + (low - high) * (1 + math.cos(math.pi * (step - begin) / (end - begin))) / 2


FORMULAS = {"multistep": multistep, "cosine": cosine, "constant": lambda t: LR, "onecycle": onecycle}


def rates_of(node: dict) -> list[float]:
    """The rate of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    rates = Rates(optimizer, build.schedule(node, "schedule"), STEPS)
    found = []
    for _ in range(EPOCHS):
        for _ in range(STEPS):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if rates.by_step:
                rates.step()
        if not rates.by_step:
            rates.step()
    return found


@pytest.mark.parametrize("name", ["multistep", "cosine", "constant", "onecycle"])
def test_the_rate_of_each_step_is_the_formula_s(name):
    keys = ("schedule.milestones=[2,3]",) if name == "multistep" else ()
    node = compose_config(f"epochs={EPOCHS}", f"schedule={name}", *keys)["schedule"]
    for by, warm_up in product(("step",) if name == "onecycle" else ("epoch", "step"), (0, 2, 2.5)):
        expected = []
        for step in range(EPOCHS * STEPS):
            t = step / STEPS if by == "step" else step // STEPS  # in epochs
            share = 0.1 + 0.9 * t / warm_up if t < warm_up else 1.0
            expected.append(share * FORMULAS[name](t))
        found = rates_of({**node, "by": by, "warmup_epochs": warm_up, "warmup_start": 0.1})
        assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_an_optimizer_and_a_schedule_are_chosen_by_name_for_the_teacher_too():
    line = ("optimizer=adamw", "schedule=cosine", "epochs=7", "teacher.training.epochs=5")
    config = compose.compose_one(
        [*line, "teacher.training.optimizer=adam", "teacher.training.schedule=cosine"]
    )
    assert config["optimizer"] == {
        "_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.01
    }  # fmt: skip
    assert (config["schedule"]["T_max"], config["teacher"]["training"]["schedule"]["T_max"]) == (7, 5)
    assert config["teacher"]["training"]["optimizer"]["_target_"] == "torch.optim.Adam"
    build.check_parts(config)


def test_an_experiment_s_rate_is_its_optimizer_s_and_goes_with_it():
    line = ["experiment=cifar100/vgg13_MobileNetV2"]
    assert compose.compose_one(line)["optimizer"]["lr"] == 0.01
    assert compose.compose_one([*line, "optimizer=adamw"])["optimizer"]["lr"] == 1e-3


@pytest.mark.parametrize("of", ["", "teacher.training."])
def test_null_is_no_schedule_also_in_a_sweep(of):
    alone = compose.compose_one([f"{of}schedule=null"])
    swept = [config for _, config in compose.sweep([f"{of}schedule=null,cosine"]).cells]
    nodes = [(config["teacher"]["training"] if of else config)["schedule"] for config in (alone, *swept)]
    assert nodes[:2] == [None, None]
    assert nodes[2]["_target_"].endswith("CosineAnnealingLR")


@pytest.mark.slow
def test_sweeps_within_a_schedule_compose_as_each_alone():
    line = ("schedule=cosine", "schedule.warmup_epochs=0,1.5", "epochs=2,3", "teacher.training.epochs=4")
    cells = compose.sweep([*line, "teacher.training.optimizer=sgd,adamw"]).cells
    assert len(cells) == 8
    assert all(repr(config) == repr(compose.compose_one(own)) for own, config in cells)


def test_by_epoch_and_without_warm_up_a_schedule_counts_as_before():
    config = compose_config()
    before = {key: value for key, value in config["schedule"].items() if key not in build.OF_SCHEDULES}
    assert digest({**config, "schedule": before}) == digest(config)
    others = [compose_config(key) for key in ("schedule.by=step", *WARM)]
    assert len({digest(each) for each in (config, *others)}) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["optimizer=lion"], r"'optimizer/lion'; expected one of adam, adamw, sgd, sgd_published"),
        (["optimizer=null"], "optimizer: found null, expected one of adam, adamw, sgd, sgd_published"),
        (["teacher.training.optimizer=null"], "teacher.training.optimizer: found null, expected one of adam"),
        (["schedule=cosin"], r"'schedule/cosin'; expected one of .* Did you mean 'cosine'\?"),
        (["schedule.by=batch"], "schedule.by: found 'batch', expected one of epoch, step"),
        (["schedule.warmup_epochs=-1"], "schedule.warmup_epochs: found -1, expected a number of at least 0"),
        (
            ["schedule.warmup_epochs=2.5", "epochs=2"],
            r"^schedule\.warmup_epochs: found 2\.5, more than epochs, which is 2; expected at most that",
        ),
        (
            ["teacher.training.schedule.warmup_epochs=3", "teacher.training.epochs=2"],
            r"^teacher\.training\.schedule\.warmup_epochs: found 3, more than teacher\.training\.epochs",
        ),
        (["schedule=null", "schedule.by=step"], r"^no key 'schedule\.by'; schedule has none\. Did you mean"),
        (["teacher.training.schedule.warmup_start=2"], "teacher.training.schedule.warmup_start: found 2"),
        (["schedule=onecycle", "schedule.pct_start=1.0"], "schedule.*pct_start=1.0.*refuses"),
        (
            ["schedule=onecycle", "schedule.anneal_strategy=up"],
            "anneal_strategy: found 'up', expected one of",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_by_its_key(line, message):
    with pytest.raises(SakdError, match=message):
        build.check_parts(compose.compose_one(line))


BY_STEP = ("schedule=cosine", "schedule.by=step", *WARM, "batch_size=20", "distiller=kd")


@pytest.mark.slow
def test_rates_by_step_go_on_where_they_were_and_in_a_cohort_as_alone():
    """Three batches of 48 images, the last of 8."""
    configs = {
        "adamw": small(*BY_STEP, "optimizer=adamw"),
        "one cycle": small("schedule=onecycle", *BY_STEP[-2:], "spot_mode=fixed"),
    }
    assert_as_alone(configs, 2)
    for config in configs.values():
        whole, measured = alone(config, 2)
        first, _ = alone(config, 1)
        second = build.trainer(config, build.parts(config), CPU)
        second.prepare(build.dataset(config), config["batch_size"])
        second.load_state_dict(first.state_dict())
        (last,) = fit(second, build.dataset(config), 2, config["batch_size"])
        assert_same(second.state_dict(), whole.state_dict())
        assert last["lr/student"] == measured[1]["lr/student"] != measured[0]["lr/student"]


def test_a_plain_schedule_of_a_library_s_user_goes_on_by_epoch():
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    config = small("distiller=none")
    trainer = build.Trainer(
        build.parts(config).student, optimizer=partial(torch.optim.SGD, lr=0.4), schedule=schedule
    )
    assert [each["lr/student"] for each in fit(trainer, build.dataset(config), 3, 48)] == [0.4, 0.2, 0.1]
    assert not Schedule(lambda optimizer, moves: schedule(optimizer)).by_step


def test_an_absent_start_of_the_warm_up_is_the_one_that_identities_count_it_as():
    assert Schedule(lambda optimizer, moves: None).warmup_start == NEUTRAL["schedule.warmup_start"]
