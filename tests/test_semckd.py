"""SemCKD against attention, projections and distances written out in plain steps, with a mask of its own at
every spot."""

from copy import deepcopy

import pytest
import torch

from sakd.distillers import SemCKD
from sakd.errors import ConfigError
from sakd.networks import resnet8, resnet8x4, resnet14, vgg8
from tests.test_distillers import BATCH, INDICES, KEEPS, close, pooled
from tests.test_reviewkd import normalised, pointwise

# Teacher and student. With 8x8 images a ResNet's three stages give maps of 8x8, 4x4 and 2x2, VGG's four 4x4,
# 2x2, 1x1 and 1x1.
PAIRS = {
    "equal": (resnet14, resnet8),
    "wider-teacher": (resnet8x4, resnet8),
    "deeper-teacher": (vgg8, resnet8),
    "deeper-student": (resnet8, vgg8),
}
KEYS = {"batch_size": BATCH, "reduction": 2, "widening": 0.05}


def build(teacher=resnet14, student=resnet8, where="stages", weight=2.5, **keys):
    torch.manual_seed(0)
    networks = student(10, 1, 8), teacher(10, 1, 8)
    distiller = SemCKD(*networks, where, weight, **(KEYS | keys)).double()
    for parameter in distiller.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return distiller


def features(teacher=resnet14, student=resnet8, dtype=torch.float64):
    """Random features of every stage: the student's take gradients."""
    (f_s, f_t) = (
        {stage: torch.randn(BATCH, *network.shapes[stage], dtype=dtype) for stage in network.maps}
        for network in (student(10, 1, 8), teacher(10, 1, 8))
    )
    return {stage: x.requires_grad_() for stage, x in f_s.items()}, f_t


def masks(distiller, kept):
    """Another mask at every spot."""
    return {spot: torch.tensor(KEEPS[kept]).roll(i) for i, spot in enumerate(distiller.spots)}


def embedded(features, mlp, width):
    """A unit vector of every row, from its inner products with the batch's rows."""
    first, _, second = mlp
    rows = []
    for f in features:
        products = [(f * other).sum() for other in features]
        products += [torch.zeros((), dtype=f.dtype)] * (width - len(products))
        hidden = first.weight @ torch.stack(products) + first.bias
        row = second.weight @ (hidden * (hidden > 0)) + second.bias
        rows.append(row / (row**2).sum().sqrt())
    return rows


def plain_projection(x, layers):
    first, norm, _, second, other_norm, _, third = layers
    x = normalised(pointwise(x, first), norm)
    x = normalised(torch.conv2d(x * (x > 0), second.weight, padding=1), other_norm)
    return pointwise(x * (x > 0), third)


def plain_semckd(distiller, student, teacher, keep):
    """A student stage goes by the mask of the spot of its own number, or of the last one."""
    width = distiller.batch_size
    queries = [embedded(x, distiller.queries[stage], width) for stage, x in student.items()]
    keys = [embedded(x, distiller.keys[stage], width) for stage, x in teacher.items()]
    total = 0
    for i, (s, f_s) in enumerate(student.items()):
        rows = keep[distiller.spots[min(i, len(distiller.spots) - 1)]]
        errors = []
        for t, f_t in teacher.items():
            small, target = pooled(f_s, f_t)
            errors.append((plain_projection(small, distiller.projections[f"{s}-{t}"]) - target) ** 2)
        for b in range(BATCH):
            if rows[b]:
                scores = torch.stack([(queries[i][b] * key[b]).sum() for key in keys]).exp()
                total = (
                    total
                    + sum(score * error[b].mean() for score, error in zip(scores, errors, strict=True))
                    / scores.sum()
                )
    return 2.5 * total / (BATCH * len(student))


@pytest.mark.parametrize("kept", ["all", "some", "one"])
@pytest.mark.parametrize("pair", PAIRS)
def test_each_student_stages_term_is_the_kept_share_of_the_published_one_of_its_spots_kept_rows(pair, kept):
    distiller = build(*PAIRS[pair])
    (student, teacher), keep = features(*PAIRS[pair]), masks(distiller, kept)
    loss = distiller(student, teacher, keep, INDICES)
    expected = plain_semckd(distiller, student, teacher, keep)
    close(loss, expected)
    learned = [*student.values(), *distiller.parameters()]
    close(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned))


def test_a_smaller_batch_is_as_one_whose_other_rows_resemble_nothing():
    distiller = build(batch_size=BATCH + 3)
    (student, teacher), keep = features(), masks(distiller, "some")
    close(distiller(student, teacher, keep, INDICES), plain_semckd(distiller, student, teacher, keep))


def test_a_larger_batch_is_refused_by_name():
    distiller = build(batch_size=BATCH - 1)
    with pytest.raises(
        ConfigError,
        match=f"batch_size of SemCKD: found {BATCH - 1}, expected at least a batch's {BATCH} rows",
    ):
        distiller(*features(), masks(distiller, "all"), INDICES)


def test_with_one_spot_every_stage_goes_by_it():
    distiller = build(where="last_stage")
    (student, teacher), keep = features(), masks(distiller, "some")
    assert len(distiller.spots) == 1
    close(distiller(student, teacher, keep, INDICES), plain_semckd(distiller, student, teacher, keep))


def test_a_samples_attention_is_a_share_of_every_teacher_stage():
    distiller = build(vgg8)
    attention = distiller.attention(*features(vgg8))
    assert attention.shape == (BATCH, 3, 4)
    close(attention.sum(2), torch.ones(BATCH, 3, dtype=torch.float64))


def test_without_kept_rows_loss_and_gradients_are_exactly_zero():
    distiller = build(vgg8)
    student, teacher = features(vgg8)
    loss = distiller(student, teacher, masks(distiller, "none"), INDICES)
    learned = [*student.values(), *distiller.parameters()]
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, learned))


@pytest.mark.parametrize("kept", KEEPS)
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_features_of_zero_give_finite_losses_and_gradients(zero, kept):
    distiller = build(vgg8).float()
    student, teacher = features(vgg8, dtype=torch.float32)
    if zero != "teacher":
        student = {stage: torch.zeros_like(x, requires_grad=True) for stage, x in student.items()}
    if zero != "student":
        teacher = {stage: torch.zeros_like(x) for stage, x in teacher.items()}
    loss = distiller(student, teacher, masks(distiller, kept), INDICES)
    assert loss.isfinite()
    learned = [*student.values(), *distiller.parameters()]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, learned))


def test_it_is_finite_under_bfloat16_autocast():
    distiller = build(vgg8).float()
    student, teacher = ({k: x.bfloat16() for k, x in f.items()} for f in features(vgg8, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert distiller(student, teacher, masks(distiller, "some"), INDICES).isfinite()


def test_attention_and_projections_learn_and_are_saved():
    distiller = build(widening=0.5)
    distiller(*features(), masks(distiller, "some"), INDICES).backward()
    saved = distiller.state_dict()
    for name, parameter in distiller.named_parameters():
        assert parameter.grad.any(), name
        assert name in saved
    assert len(distiller.projections) == 9


def test_batch_norm_does_not_depend_on_what_is_kept():
    distiller = build()
    batch = features()
    states = []
    for kept in KEEPS:
        copy = deepcopy(distiller)
        copy(*batch, masks(copy, kept), INDICES)
        states.append(copy.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("batch_size", 1), ("batch_size", 6.0), ("reduction", 0), ("reduction", True)),
        *(("widening", 0), ("widening", "1"), ("weight", -1)),
    ],
)
def test_a_key_out_of_its_range_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"{key} of SemCKD: found {value!r}, expected a"):
        build(**{key: value})


@pytest.mark.parametrize("where", ["embedding", "logits"])
def test_a_vector_is_refused_by_name(where):
    with pytest.raises(ConfigError, match=f"where={where}: found a vector at {where}, SemCKD takes maps"):
        build(where=where)
