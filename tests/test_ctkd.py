"""CTKD's temperature learns against the student, more from epoch to epoch, and goes on where it was."""

from math import cos, pi

import pytest
import torch

from sakd.configuration import build
from tests.conftest import fit
from tests.test_distillers import (
    BATCH,
    CTKD,
    INDICES,
    KEEPS,
    assert_same_with_gradients,
    close,
    features,
    plain_z_scores,
)
from tests.test_distillers import build as built
from tests.test_resume import assert_same

CPU = torch.device("cpu")


def plain_ctkd(student, teacher, logit):
    temperature, losses = 1 + 20 / (1 + (-logit).exp()), []
    for z_s, z_t in zip(student, teacher, strict=True):
        e_s, e_t = (z_s / temperature).exp(), (z_t / temperature).exp()
        p_s, p_t = e_s / e_s.sum(), e_t / e_t.sum()
        losses.append(temperature**2 * sum(t * (t / s).log() for s, t in zip(p_s, p_t, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("epoch", "done"), [(1, 0.1), (5, 0.5), (10, 1), (40, 1)])
@pytest.mark.parametrize("kept", ["all", "some", "one"])
def test_it_is_kd_at_its_temperature_which_gets_the_gradient_reversed(kept, epoch, done):
    distiller, keep = built(CTKD, "logits"), torch.tensor(KEEPS[kept])
    distiller.begin_epoch(epoch)
    f_s, f_t = features(distiller)
    loss = distiller.spot_loss(distiller.spots[0], f_s, f_t, keep, INDICES)
    expected = int(keep.sum()) / BATCH * plain_ctkd(f_s[keep], f_t[keep], distiller.logit)
    (reversed_,) = torch.autograd.grad(loss, distiller.logit, retain_graph=True)
    (plain,) = torch.autograd.grad(expected, distiller.logit, retain_graph=True)
    assert plain != 0
    close(reversed_, -(1 - cos(pi * done)) / 2 * plain)
    assert_same_with_gradients(loss, expected, [f_s])


def test_standardised_logits_are_compared_by_their_z_scores():
    distiller, keep = built(CTKD, "logits"), torch.tensor(KEEPS["some"])
    distiller.standardise = True
    f_s, f_t = features(distiller)
    loss = distiller.spot_loss(distiller.spots[0], f_s, f_t, keep, INDICES)
    z_scores = (plain_z_scores(f[keep]) for f in (f_s, f_t))
    expected = int(keep.sum()) / BATCH * plain_ctkd(*z_scores, distiller.logit)
    assert_same_with_gradients(loss, expected, [f_s])


def test_without_a_curriculum_the_gradient_is_reversed_in_full_at_once():
    distiller = built(CTKD, "logits")
    distiller.curriculum_epochs = 0
    distiller.begin_epoch(1)
    assert distiller.reversal == 1


def test_the_temperature_learns_with_the_student_and_goes_on_from_a_saved_state(tiny):
    config = tiny("distiller=ctkd", "spot_mode=random", "dataset.train_samples=48")
    dataset = build.dataset(config)
    whole, first, second = (build.trainer(config, build.parts(config), CPU) for _ in range(3))
    fit(whole, dataset, 2, 24)
    fit(first, dataset, 1, 24)
    second.prepare(dataset)
    second.load_state_dict(first.snapshot()())
    fit(second, dataset, 2, 24)
    assert_same(second.state_dict(), whole.state_dict())
    assert whole.distillers["ctkd"].logit != first.distillers["ctkd"].logit != 1
