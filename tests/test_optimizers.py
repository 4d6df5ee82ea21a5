"""Steps of optimizers: gradients clipped, accumulated over batches, and in half precision, scaled."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.testing import assert_close

from sakd.configuration import build, digest, prerequisites
from sakd.data import Dataset
from sakd.errors import ConfigError
from sakd.networks import StagedNet
from sakd.runs.job import execute
from sakd.streams import initialising
from sakd.training import Execution, Schedule, Trainer
from sakd.training.loss_scale import LossScale
from sakd.training.optimizers import Stepper
from tests.conftest import compose_config, fit
from tests.test_cohort import CPU, alone, assert_as_alone, small
from tests.test_resume import assert_same

SIZE = 48  # images in all
SGD_AT = partial(SGD, lr=0.05, momentum=0.9)


def without_batch_norm() -> StagedNet:
    """A network in which images do not see each other."""
    with initialising(0, "student"):
        stages = {
            "stem": nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
            "stage1": nn.Conv2d(4, 4, 3, stride=2),
            "embedding": nn.Sequential(nn.ReLU(), nn.Flatten()),
            "logits": nn.Linear(36, 10),
        }
    return StagedNet(stages, "own", (1, 8, 8))


def trained(epochs: int, batch_size: int, **keys) -> dict[str, Tensor]:
    trainer = Trainer(without_batch_norm(), **{"optimizer": SGD_AT} | keys)
    fit(trainer, images(), epochs, batch_size)
    return trainer.student.state_dict()


def images() -> Dataset:
    return build.dataset(small())


# ---- accumulation


@pytest.mark.parametrize(("batch_size", "accumulate"), [(16, 3), (20, 3), (24, 7)])
def test_batches_whose_gradients_add_up_are_one_large_batch(batch_size, accumulate):
    """Also one that is smaller, and fewer than asked for at an epoch's end."""
    found = trained(2, batch_size, accumulate=accumulate)
    assert_close(found, trained(2, SIZE), rtol=1e-5, atol=1e-6)


def test_an_epoch_has_as_many_steps_as_that_comes_to_and_schedules_by_step_count_them():
    """Five batches of 10 images, the last of 8, two at a time."""
    config = small("distiller=kd", "spot_mode=adaptive", "batch_size=10", "accumulate=2", "schedule=onecycle")
    trainer = build.trainer(config, build.parts(config), CPU)
    seen = {name: [] for name in trainer.steppers}
    for name, stepper in trainer.steppers.items():
        stepper.optimizer.register_step_pre_hook(
            lambda optimizer, *_, rates=seen[name]: rates.append(optimizer.param_groups[0]["lr"])
        )
    fit(trainer, build.dataset(config), 2, 10)
    assert [len(set(rates)) for rates in seen.values()] == [6, 6]
    assert_close(seen["policy"], [rate / 2 for rate in seen["student"]])


def test_a_run_says_where_an_epoch_has_fewer_batches_than_make_a_step(tiny, caplog):
    taught = ("distiller=none", "epochs=1", "batch_size=24", "dataset.train_samples=48")
    execute(tiny(*taught, "accumulate=3"))
    assert "accumulate: found 3, more than the 2 batches of an epoch of digits-none-" in caplog.text
    caplog.clear()
    execute(tiny(*taught, "accumulate=2"))
    assert "accumulate" not in caplog.text


def test_what_counts_steps_needs_the_size_of_batches():
    for keys in ({"accumulate": 2}, {"schedule": Schedule(lambda optimizer, moves: None, by_step=True)}):
        with pytest.raises(ConfigError, match="batch_size: found None"):
            Trainer(without_batch_norm(), optimizer=SGD_AT, **keys).prepare(images())


# ---- clipping


def test_the_norm_of_all_gradients_together_is_clipped_and_of_many_batches_their_mean_s():
    network, (images_, labels) = without_batch_norm(), batch()
    loss = nn.functional.cross_entropy(network(images_), labels)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for clip, accumulate in ((norm / 3, 1), (norm / 3, 2), (norm * 3, 1)):
        trainer = Trainer(
            without_batch_norm(), optimizer=partial(SGD, lr=1.0), clip_gradients=clip, accumulate=accumulate
        )
        trainer.prepare(images(), SIZE // 2)
        for _ in range(accumulate):
            trainer.train_step(images_, labels, torch.arange(len(labels)))
            trainer.end_step()
        steps = zip(network.parameters(), trainer.student.parameters(), gradients, strict=True)
        for before, after, gradient in steps:
            assert_close(before - after, gradient * min(1.0, float(clip / norm)), rtol=1e-4, atol=1e-7)


def batch() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(8, 1, 8, 8, generator=draws), torch.arange(8)


# ---- both in a run


BOTH = ("clip_gradients=0.5", "accumulate=2", "batch_size=20", "schedule=cosine", "schedule.by=step")


def test_both_resume_and_train_in_a_cohort_as_alone():
    configs = {
        "both": small("distiller=kd", *BOTH, "optimizer=adamw"),
        "neither": small("distiller=kd", "batch_size=20", "spot_mode=fixed"),
    }
    assert_as_alone(configs, 2)
    config = configs["both"]
    first, _ = alone(config, 1)
    second = build.trainer(config, build.parts(config), CPU)
    second.prepare(build.dataset(config), 20)
    second.load_state_dict(first.state_dict())
    fit(second, build.dataset(config), 2, 20)
    assert_same(second.state_dict(), alone(config, 2)[0].state_dict())


def test_they_count_where_they_are_used_also_of_what_is_trained_first():
    plain = compose_config("distiller=ft")
    without = {key: value for key, value in plain.items() if key not in ("clip_gradients", "accumulate")}
    assert digest(without) == digest(plain)
    keys = ("clip_gradients=1", "accumulate=2")
    of = [compose_config("distiller=ft", key) for key in keys]
    of += [compose_config("distiller=ft", f"teacher.training.{key}") for key in keys]
    assert len({digest(config) for config in (plain, *of)}) == 5
    first = [prerequisites(config).teacher for config in (plain, *of)]
    assert len({digest(config) for config in first}) == 3
    assert (first[3]["clip_gradients"], first[4]["accumulate"]) == (1, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clip_gradients=0", "clip_gradients: found 0, expected a number above 0"),
        ("accumulate=0", "accumulate: found 0, expected a whole number of at least 1"),
        (
            "teacher.training.accumulate=1.5",
            "teacher.training.accumulate: found 1.5, expected a whole number",
        ),
        ("+distiller.pretraining.clip_gradients=x", "distiller.pretraining.clip_gradients: found 'x'"),
    ],
)
def test_a_value_that_cannot_be_is_told_by_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_config("distiller=ft", override)


# ---- half precision


def test_a_scaled_step_is_the_step_and_one_that_is_not_finite_changes_nothing_from_the_first_on():
    """Which steps count, and the scale, are those of PyTorch's own scaler."""
    for optimizer in (partial(SGD_AT, fused=True), partial(AdamW, lr=0.1, fused=True)):
        ours, theirs, plain = (nn.Parameter(torch.ones(3)) for _ in range(3))
        scale = LossScale(CPU)
        stepper = Stepper(optimizer([ours]), CPU, captured=False, loss_scale=scale)
        their_optimizer, plain_optimizer = optimizer([theirs]), optimizer([plain])
        scaler = torch.amp.GradScaler("cpu")
        for factor in (float("inf"), 1.0, 2.0, float("nan"), 0.5):
            before = ours.clone()
            stepper.backward((ours * factor).sum(), 1)
            stepper.step()
            their_optimizer.zero_grad()
            scaler.scale((theirs * factor).sum()).backward()
            scaler.step(their_optimizer)
            scaler.update()
            assert float(scale.scale) == scaler.get_scale()
            assert int(scale.finite_steps) == scaler.state_dict()["_growth_tracker"]
            if factor * 0 == 0:
                plain_optimizer.zero_grad()
                (plain * factor).sum().backward()
                plain_optimizer.step()
            else:
                assert torch.equal(ours, before)
            assert_close(ours, plain, rtol=1e-6, atol=0)


@pytest.fixture
def also_on_a_cpu(monkeypatch):
    """PyTorch computes in float16 there, too, if more slowly."""
    monkeypatch.setattr(Execution, "check", lambda self, device: None)
    fused = partial(SGD, lr=0.05, momentum=0.9, fused=True)
    monkeypatch.setattr(build, "make", fused_optimizers(build.make, fused))


def fused_optimizers(make, fused):
    def made(node, key, *arguments, **keys):
        return fused(*arguments) if key.endswith("optimizer") else make(node, key, *arguments, **keys)

    return made


@pytest.mark.slow
def test_a_run_in_half_precision_resumes_with_its_scales(also_on_a_cpu):
    config = small("distiller=kd", "precision=fp16", "~schedule", "batch_size=24", "clip_gradients=1")
    whole, measured = alone(config, 2)
    exact, expected = alone({**config, "precision": "fp32"}, 2)
    assert_close(measured[0]["loss/task"], expected[0]["loss/task"], rtol=0.05, atol=0)
    assert set(whole.state_dict()) - set(exact.state_dict()) == {"loss_scale/student", "loss_scale/policy"}
    first, _ = alone(config, 1)
    second = build.trainer(config, build.parts(config), CPU)
    second.prepare(build.dataset(config), 24)
    second.load_state_dict(first.state_dict())
    fit(second, build.dataset(config), 2, 24)
    assert_same(second.state_dict(), whole.state_dict())


def test_half_precision_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match="precision: found fp16, which is for CUDA devices; expected"):
        Trainer(without_batch_norm(), optimizer=SGD_AT, execution=Execution("fp16"))


@pytest.mark.parametrize(
    ("key", "value"), [("precision", "fp16"), ("optimizer", {"_target_": "torch.optim.RMSprop", "lr": 0.1})]
)
def test_what_a_teacher_s_training_cannot_do_is_told_where_it_is_written(key, value, monkeypatch):
    config = {**small("distiller=none"), key: value}
    if key == "optimizer":
        config["precision"] = "fp16"
        monkeypatch.setattr(Execution, "check", lambda *_: None)  # that it is no CUDA device
    with pytest.raises(ConfigError, match=rf"^teacher\.training\.{key}[.:].*found"):
        build.trainer(config, build.parts(config), CPU, within="teacher.training.")


def test_and_for_an_optimizer_that_cannot_leave_a_step_out(also_on_a_cpu):
    with pytest.raises(ConfigError, match=r"^optimizer\._target_: found RMSprop, which is not fused, with"):
        Trainer(without_batch_norm(), optimizer=torch.optim.RMSprop, execution=Execution("fp16"))
