"""The running average of a student: what it is, and that it is what a run measures, stores and resumes."""

import io

import pytest
import torch
from torch.testing import assert_close

from sakd.configuration import build
from sakd.data import evaluation_batches
from sakd.errors import ConfigError
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.trained import read
from sakd.training import Cohort, Trainer, evaluate
from tests.conftest import fit
from tests.test_cohort import assert_as_alone, small
from tests.test_resume import assert_same

CPU = torch.device("cpu")
SMALL = ("distiller=kd", "spot_mode=fixed", "dataset.train_samples=48", "dataset.test_samples=32")


def trainer_of(config: dict) -> Trainer:
    return build.trainer(config, build.parts(config), CPU)


def test_it_is_the_plain_formula_over_all_steps_from_the_first_weights_on(tiny):
    config = tiny(*SMALL, "ema=0.9")
    trainer, dataset = trainer_of(config), build.dataset(config)
    trainer.student.logits.bias.data += 1  # as a pretraining does, once the trainer is built
    expected = {name: value.double().clone() for name, value in trainer.student.state_dict().items()}

    def step(*given: object) -> object:
        taken = trainer.__class__.train_step(trainer, *given)
        for name, value in trainer.student.state_dict().items():
            kept = 0.9 if value.is_floating_point() else 0.0
            expected[name] = kept * expected[name] + (1 - kept) * value.double()
        return taken

    cohort = Cohort(trainer.teacher, {"": trainer})
    cohort.members[""].train_step = step
    list(cohort.fit(dataset, 2, 24))
    for name, value in trainer.product.state_dict().items():
        assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(trainer.product.logits.weight, trainer.student.logits.weight)


def test_the_student_learns_as_without_it(tiny):
    states = []
    for ema in ("null", "0.5"):
        config = tiny(*SMALL, f"ema={ema}")
        trainer = trainer_of(config)
        fit(trainer, build.dataset(config), 2, 24)
        states.append(trainer.state_dict())
    del states[1]["average"]
    assert_same(*states)


def test_it_goes_on_from_a_saved_state_bit_for_bit(tiny):
    config = tiny(*SMALL, "ema=0.9")
    dataset = build.dataset(config)
    whole, first, second = (trainer_of(config) for _ in range(3))
    measured = fit(whole, dataset, 2, 24)
    fit(first, dataset, 1, 24)
    saved = io.BytesIO()
    torch.save(first.snapshot()(), saved)
    saved.seek(0)
    second.prepare(dataset)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert fit(second, dataset, 2, 24)[-1]["test/loss"] == measured[-1]["test/loss"]
    assert_same(second.state_dict(), whole.state_dict())


def test_members_of_a_cohort_average_as_each_would_alone():
    assert_as_alone({name: small("distiller=kd", f"ema={name}") for name in ("null", "0.9")}, epochs=1)


def test_a_run_measures_and_stores_the_average(tiny):
    config = tiny("distiller=none", "ema=0.5", "dataset.train_samples=96", "threads=1")
    result = execute(config)
    run, dataset = Run(config), build.dataset(config)
    network = read(run.folder).network
    measured = evaluate(network, evaluation_batches(dataset.test, dataset))
    assert measured["accuracy"] == result["student"]["accuracy"]
    assert measured["loss"] == pytest.approx(run.metrics()[-1]["test/loss"], rel=1e-5)
    saved = run.load_checkpoint({"data set": result["data_sha256"]})
    assert_same(dict(network.state_dict()), dict(saved["average"]))
    assert not torch.equal(saved["average"]["logits.bias"], saved["student"]["logits.bias"])


@pytest.mark.parametrize("decay", ["0", "1", "true"])
def test_a_decay_that_averages_nothing_is_refused_by_name(decay, tiny):
    with pytest.raises(ConfigError, match=r"ema: found \S+, expected a number above 0 to below 1 or null"):
        tiny(f"ema={decay}")
