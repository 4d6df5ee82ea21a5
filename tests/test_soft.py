"""The soft spot mode: adaptive's policy, whose choice weighs what it chooses, without a draw."""

import numpy as np
import pytest
import torch

from sakd.configuration import build
from sakd.data import train_batches
from sakd.networks import resnet8, resnet14
from sakd.spots import Adaptive, Soft, all_spots, spots_at
from sakd.streams import stream
from tests.conftest import fit

CPU = torch.device("cpu")
BATCH = 12


def mode(kind, temperature):
    torch.manual_seed(0)
    student, teacher = resnet8(10, 1, 8), resnet14(10, 1, 8)
    spots = all_spots(spots_at("stages", student, teacher), student, teacher)
    made = kind(spots, student, teacher, temperature, 1.0, same_family_bias=0.5, other_family_bias=0.0)
    made.stream = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 1, 8, 8)
    return made, (student.features(images), teacher.features(images))


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_a_weight_is_the_softmax_of_the_policys_scores_and_nothing_is_drawn(temperature):
    soft, features = mode(Soft, temperature)
    before = soft.stream.get_state()
    route = soft.route(*features)
    embeddings = torch.cat([features[1]["embedding"], features[0]["embedding"]], dim=1)
    scores = (embeddings @ soft.policy.weight.T + soft.policy.bias).unflatten(1, (-1, 2)) / temperature
    torch.testing.assert_close(route, scores[..., 0].exp() / scores.exp().sum(2))
    assert torch.equal(soft.stream.get_state(), before)
    assert torch.equal(soft.keep(route), route)
    assert not soft.keep(route).requires_grad
    assert torch.autograd.grad(route.sum(), soft.policy.weight)[0].abs().max() > 0


def test_at_a_temperature_of_one_it_is_the_share_of_adaptives_draws():
    (soft, features), (adaptive, _) = mode(Soft, 1.0), mode(Adaptive, 5.0)
    with torch.no_grad():
        draws = torch.stack([adaptive.route(*features) for _ in range(1000)])
        weights = soft.route(*features)
    assert weights.min() < weights.max()
    torch.testing.assert_close(draws.mean(0), weights, rtol=0, atol=0.08)  # five standard errors


def small(tiny, *overrides):
    return tiny("teacher=resnet14", "dataset.train_samples=48", *overrides)


def student_of(config):
    made = build.trainer(config, build.parts(config), CPU)
    fit(made, build.dataset(config), 1, 24)
    return made.student


def test_a_policy_that_is_sure_of_the_teacher_distils_as_fixed(tiny):
    keys = "distiller=[at,sp,pkt]", "compile=none"
    sure = small(tiny, *keys, "spot_mode=soft", "spot_mode.same_family_bias=1000000")
    fixed = student_of(small(tiny, *keys, "spot_mode=fixed")).state_dict()
    for name, weight in student_of(sure).state_dict().items():
        torch.testing.assert_close(weight, fixed[name], rtol=1e-4, atol=1e-5)


def test_a_step_measures_the_mean_weight_records_who_is_above_one_half_and_trains_the_policy(tiny):
    config = small(
        tiny, "distiller=at", "spot_mode=soft", "spot_mode.same_family_bias=0", "record_spots=true"
    )
    trainer = build.trainer(config, build.parts(config), CPU)
    dataset = build.dataset(config)
    trainer.prepare(dataset)
    trainer.begin_epoch()
    policy = trainer.spot_mode.policy.weight.clone()
    batch = next(iter(train_batches(dataset, 48, stream(0, "data", 1))))
    step = trainer.train_step(*batch, trainer.teacher.features(batch.images))
    assert not torch.equal(trainer.spot_mode.policy.weight, policy)
    named = dict(zip(trainer.measurements, step.measured, strict=True))
    bits = np.unpackbits(trainer.kept_table.packed(), axis=1, count=48).T
    assert bits.min() < bits.max()
    for k, spot in enumerate(trainer.spots):
        torch.testing.assert_close(named[f"kept/{spot.name}"], step.kept[:, k].mean())
        assert np.array_equal(bits[batch.indices, k], step.kept[:, k] > 0.5)
