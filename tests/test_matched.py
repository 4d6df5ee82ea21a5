"""The teacher's stages in another order: each student stage's loss is FitNet's with the stage that it is
matched with."""

import pytest
import torch

from sakd.distillers import Matched
from sakd.distillers.matched import matched
from sakd.errors import ConfigError
from sakd.networks import resnet8, resnet8x4, vgg8
from tests.test_distillers import BATCH, INDICES, KEEPS, close, plain_regression, pooled
from tests.test_semckd import features

STAGES = ["stage1", "stage2", "stage3"]
TEACHERS = {"forward": STAGES, "reversed": STAGES[::-1], "all_to_one": ["stage3"] * 3}


@pytest.mark.parametrize("matching", TEACHERS)
@pytest.mark.parametrize("teacher", [resnet8x4, vgg8])
def test_each_spots_term_is_the_kept_share_of_fitnets_with_the_matched_stage(teacher, matching):
    torch.manual_seed(0)
    distiller = Matched(resnet8(10, 1, 8), teacher(10, 1, 8), "stages", 2.5, matching).double()
    f_s, f_t = features(teacher)
    keep = {spot: torch.tensor(KEEPS["some"]).roll(i) for i, spot in enumerate(distiller.spots)}
    expected = 0
    for (spot, rows), stage in zip(keep.items(), TEACHERS[matching], strict=True):
        student, target = pooled(f_s[spot.student], f_t[stage])
        hint = plain_regression(distiller.regressors[spot.name], student)
        expected = expected + 2.5 * ((hint - target) ** 2)[rows].mean() * int(rows.sum()) / BATCH
    loss = distiller(f_s, f_t, keep, INDICES)
    close(loss, expected)
    learned = [*f_s.values(), *distiller.parameters()]
    close(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned))
    nobody = dict.fromkeys(keep, torch.zeros(BATCH, dtype=torch.bool))
    assert distiller(f_s, f_t, nobody, INDICES) == 0


def test_a_random_matching_has_every_stage_once_and_is_drawn_with_the_weights():
    drawn = {}
    for seed in range(8):
        torch.manual_seed(seed)
        drawn[seed] = matched(STAGES, "random")
        assert sorted(drawn[seed]) == STAGES
    assert len({tuple(order) for order in drawn.values()}) > 1
    torch.manual_seed(3)
    distiller = Matched(resnet8(10, 1, 8), resnet8x4(10, 1, 8), "stages", 1.0, "forward")
    assert list(distiller.taught_by.values()) == STAGES


def test_another_matching_is_refused_by_name():
    with pytest.raises(ConfigError, match="matching of Matched: found 'backwards', expected one of forward"):
        Matched(resnet8(10, 1, 8), resnet8x4(10, 1, 8), "stages", 1.0, "backwards")
