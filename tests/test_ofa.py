"""OFA against exits and cross-entropies written out in plain steps, with a mask of its own at every spot."""

import pytest
import torch

from sakd.distillers import KD, OFA
from sakd.errors import ConfigError
from sakd.networks import resnet8, resnet8x4, vgg8
from tests.test_distillers import BATCH, INDICES, KEEPS, LABELS, close
from tests.test_reviewkd import normalised, pointwise

PAIRS = {"wider-teacher": (resnet8x4, resnet8), "deeper-student": (resnet8, vgg8)}
TARGETS = LABELS[INDICES]


def build(teacher=resnet8x4, student=resnet8, where=("stages", "logits"), temperature=2.0, exponent=1.5):
    torch.manual_seed(0)
    networks = student(10, 1, 8), teacher(10, 1, 8)
    distiller = OFA(*networks, list(where), 2.5, temperature, exponent).double()
    distiller.prepare(LABELS, 10, torch.Generator())
    for parameter in distiller.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return distiller


def features(distiller):
    """Random features at every spot, by stage: the student's take gradients; the teacher's, but its logits,
    are of no use."""
    student = {
        spot.student: torch.randn(BATCH, *spot.student_shape, dtype=torch.float64).requires_grad_()
        for spot in distiller.spots
    }
    return student, {"logits": torch.randn(BATCH, 10, dtype=torch.float64)}


def masks(distiller, kept):
    return {spot: torch.tensor(KEEPS[kept]).roll(i) for i, spot in enumerate(distiller.spots)}


def plain_exit(x, layers):
    *blocks, _, _, linear = layers
    for block in blocks:
        if isinstance(block, torch.nn.Conv2d):  # of the last stage
            x = pointwise(x, block) + block.bias[:, None, None]
        else:
            for stride, (depthwise, across, norm, _) in ((2, block[:4]), (1, block[4:])):
                x = torch.conv2d(x, depthwise.weight, stride=stride, padding=1, groups=x.shape[1])
                x = normalised(pointwise(x, across), norm).relu()
    return x.mean((2, 3)) @ linear.weight.T + linear.bias


def plain_ofa(distiller, student, teacher, keep):
    total = 0
    for spot in distiller.spots:
        z = student[spot.student]
        if spot.student != "logits":
            z = plain_exit(z, distiller.exits[spot.name])
        for row, label in enumerate(TARGETS):
            p_s = (z[row] / 2).exp() / (z[row] / 2).exp().sum()
            p_t = (teacher["logits"][row] / 2).exp() / (teacher["logits"][row] / 2).exp().sum()
            for c in range(10):
                share = p_t[c] ** 1.5 if c != label else (1 + p_t[c]) ** 1.5 - 1
                total = total - keep[spot][row] * share * p_s[c].log()
    return 2.5 * total / BATCH


@pytest.mark.parametrize(
    ("pair", "kept"),
    [*(("wider-teacher", kept) for kept in ("all", "some", "one")), ("deeper-student", "some")],
)
def test_each_exits_term_is_the_kept_share_of_the_published_one_of_its_kept_rows(pair, kept):
    distiller = build(*PAIRS[pair])
    (student, teacher), keep = features(distiller), masks(distiller, kept)
    loss = distiller(student, teacher, keep, INDICES)
    expected = plain_ofa(distiller, student, teacher, keep)
    close(loss, expected)
    learned = [*student.values(), *distiller.parameters()]
    close(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned))


def test_an_exponent_of_one_gives_the_gradients_of_kd():
    distiller = build(where=("logits",), temperature=1.0, exponent=1.0)
    (student, teacher), keep = features(distiller), masks(distiller, "some")
    kd = KD(resnet8(10, 1, 8), resnet8x4(10, 1, 8), "logits", 2.5, 1.0)
    found, expected = (
        torch.autograd.grad(d(student, teacher, keep, INDICES), student["logits"]) for d in (distiller, kd)
    )
    close(found, expected)


def test_without_kept_rows_loss_and_gradients_are_exactly_zero():
    distiller = build()
    student, teacher = features(distiller)
    loss = distiller(student, teacher, masks(distiller, "none"), INDICES)
    assert loss == 0
    learned = [*student.values(), *distiller.parameters()]
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, learned))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_it_is_finite_where_a_network_is_sure_and_where_maps_are_zero(exponent):
    distiller = build(exponent=exponent).float()
    student, _ = features(distiller)
    student = {
        stage: torch.zeros_like(x, dtype=torch.float32).requires_grad_() for stage, x in student.items()
    }
    certain = 1e4 * torch.nn.functional.one_hot(TARGETS, 10).float()
    loss = distiller(student, {"logits": certain}, masks(distiller, "some"), INDICES)
    assert loss.isfinite()
    learned = [*student.values(), *distiller.parameters()]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, learned))


def test_a_key_out_of_its_range_and_another_vector_are_refused_by_name():
    with pytest.raises(ConfigError, match="exponent of OFA: found 0, expected a"):
        build(exponent=0)
    with pytest.raises(ConfigError, match="found embedding, OFA takes maps and the logits"):
        build(where=("embedding",))
