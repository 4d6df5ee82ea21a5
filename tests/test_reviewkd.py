"""ReviewKD against the fusion and the distance written out in plain steps, with a mask of its own at every
spot."""

from copy import deepcopy

import pytest
import torch

from sakd.distillers import ReviewKD
from sakd.errors import ConfigError
from sakd.networks import resnet8, resnet8x4, resnet14, vgg8
from tests.test_distillers import BATCH, INDICES, KEEPS, close

# With 8x8 images a ResNet's stages give maps of 8x8, 4x4 and 2x2, VGG's four 4x4, 2x2, 1x1 and 1x1.
PAIRS = {
    "equal": (resnet14, resnet8),
    "wider-teacher": (resnet8x4, resnet8),
    "smaller-teacher-maps": (vgg8, resnet8),
    "larger-teacher-maps": (resnet8, vgg8),
}
WHERE = ("stages", "embedding")


def build(teacher=resnet14, student=resnet8, where=WHERE, weight=2.5, max_width=16, ramp_epochs=0):
    torch.manual_seed(0)
    networks = student(10, 1, 8), teacher(10, 1, 8)
    distiller = ReviewKD(
        *networks, list(where), weight, max_width=max_width, ramp_epochs=ramp_epochs
    ).double()
    for parameter in distiller.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return distiller


def features(distiller, dtype=torch.float64):
    """Random features at every spot, by stage: the student's take gradients."""
    student = {
        s.student: torch.randn(BATCH, *s.student_shape, dtype=dtype).requires_grad_() for s in distiller.spots
    }
    return student, {s.teacher: torch.randn(BATCH, *s.teacher_shape, dtype=dtype) for s in distiller.spots}


def masks(distiller, kept):
    """Another mask at every spot."""
    return {spot: torch.tensor(KEEPS[kept]).roll(i) for i, spot in enumerate(distiller.spots)}


def normalised(x, norm):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def pointwise(x, convolution):
    return torch.einsum("oc,bchw->bohw", convolution.weight[..., 0, 0], x)


def nearest(x, size):
    """Each new position shows the old one it falls into."""
    return torch.stack(
        [
            torch.stack([x[:, :, i * x.shape[2] // size, j * x.shape[3] // size] for j in range(size)], dim=2)
            for i in range(size)
        ],
        dim=2,
    )


def plain_distance(a, b):
    """The mean squared error of maps, plus half that of their blocks' means, a quarter …, over the sum of
    these weights."""
    size, weight = a.shape[-1], 1.0
    total, weights = ((a - b) ** 2).mean(), 1.0
    for blocks in (4, 2, 1):
        if blocks < size:
            side = size // blocks
            means = [x.reshape(*x.shape[:2], blocks, side, blocks, side).mean((3, 5)) for x in (a, b)]
            weight /= 2
            total, weights = total + weight * ((means[0] - means[1]) ** 2).mean(), weights + weight
    return total / weights


def plain_reviewkd(distiller, student, teacher, keep):
    as_map = [(x if x.dim() == 4 else x[:, :, None, None]) for x in student.values()]
    targets = [(x if x.dim() == 4 else x[:, :, None, None]) for x in teacher.values()]
    spots = {spot.name: spot for spot in distiller.spots}
    total, deeper = 0, None
    for (name, fusion), x, target in zip(distiller.fusions.items(), as_map, targets, strict=True):
        x = normalised(pointwise(x, fusion.reduce[0]), fusion.reduce[1])
        if deeper is not None:
            deeper = nearest(deeper, x.shape[-1])
            convolution = fusion.attend[0]
            scores = pointwise(torch.cat([x, deeper], dim=1), convolution) + convolution.bias[:, None, None]
            attention = 1 / (1 + (-scores).exp())
            x = attention[:, :1] * x + attention[:, 1:] * deeper
        x = deeper = nearest(x, target.shape[-1])
        out = normalised(torch.conv2d(x, fusion.expand[0].weight, padding=1), fusion.expand[1])
        rows = keep[spots[name]]
        if rows.any():
            total = total + int(rows.sum()) / BATCH * plain_distance(out[rows], target[rows])
    return 2.5 * total


@pytest.mark.parametrize("kept", ["all", "some", "one"])
@pytest.mark.parametrize("pair", PAIRS)
def test_each_spots_term_is_the_kept_share_of_the_published_distance_of_its_kept_rows(pair, kept):
    distiller = build(*PAIRS[pair])
    (student, teacher), keep = features(distiller), masks(distiller, kept)
    loss = distiller(student, teacher, keep, INDICES)
    expected = plain_reviewkd(distiller, student, teacher, keep)
    close(loss, expected)
    learned = [*student.values(), *distiller.parameters()]
    close(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned))


def test_the_loss_rises_over_the_first_epochs():
    distiller = build(ramp_epochs=20)
    (student, teacher), keep = features(distiller), masks(distiller, "some")
    whole = distiller(student, teacher, keep, INDICES)
    distiller.begin_epoch(5)
    torch.testing.assert_close(distiller(student, teacher, keep, INDICES), 0.25 * whole)


def test_levels_are_fused_from_the_deepest_up_however_they_are_listed():
    ordered, shuffled = build(), build(where=["embedding", "stage2", "stage3", "stage1"])
    assert [spot.name for spot in ordered.spots] == ["embedding", "stage3", "stage2", "stage1"]
    assert list(ordered.fusions) == list(shuffled.fusions)
    student, teacher = features(ordered)
    keep = masks(ordered, "some")
    assert ordered(student, teacher, keep, INDICES) == shuffled(student, teacher, keep, INDICES)


def test_a_row_not_kept_at_a_deep_spot_still_hands_down_to_the_shallow_ones():
    distiller = build()
    student, teacher = features(distiller)
    everywhere = dict.fromkeys(distiller.spots, torch.tensor(KEEPS["all"]))
    nowhere = dict.fromkeys(distiller.spots, torch.tensor(KEEPS["none"]))
    shallow = distiller.spots[-1]
    loss = distiller(student, teacher, nowhere | {shallow: everywhere[shallow]}, INDICES)
    others = distiller(student, teacher, everywhere | {shallow: nowhere[shallow]}, INDICES)
    close(loss + others, distiller(student, teacher, everywhere, INDICES))
    (gradient,) = torch.autograd.grad(loss, student["embedding"])
    assert gradient.abs().amax(1).min() > 0


def test_without_kept_rows_loss_and_gradients_are_exactly_zero():
    distiller = build(vgg8)
    student, teacher = features(distiller)
    loss = distiller(student, teacher, masks(distiller, "none"), INDICES)
    learned = [*student.values(), *distiller.parameters()]
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, learned))


@pytest.mark.parametrize("kept", KEEPS)
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_features_of_zero_give_finite_losses_and_gradients(zero, kept):
    distiller = build(vgg8).float()
    student, teacher = features(distiller, torch.float32)
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
    student, teacher = ({k: x.bfloat16() for k, x in f.items()} for f in features(distiller, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert distiller(student, teacher, masks(distiller, "some"), INDICES).isfinite()


def test_the_fusions_learn_and_are_saved():
    distiller = build()
    student, teacher = features(distiller)
    distiller(student, teacher, masks(distiller, "some"), INDICES).backward()
    saved = distiller.state_dict()
    for name, parameter in distiller.named_parameters():
        assert parameter.grad.any(), name
        assert name in saved
    assert sum(name.endswith("running_mean") for name in saved) == 8


def test_batch_norm_does_not_depend_on_what_is_kept():
    distiller = build(vgg8)
    batch = features(distiller)
    states = []
    for kept in KEEPS:
        copy = deepcopy(distiller)
        copy(*batch, masks(copy, kept), INDICES)
        states.append(copy.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


@pytest.mark.parametrize(("max_width", "width"), [(16, 16), (512, 64)])
def test_levels_are_fused_in_no_more_channels_than_the_deepest_has(max_width, width):
    assert {fusion.reduce[0].out_channels for fusion in build(max_width=max_width).fusions.values()} == {
        width
    }


@pytest.mark.parametrize(
    ("key", "value"), [("max_width", 0), ("max_width", 2.5), ("ramp_epochs", -1), ("weight", float("nan"))]
)
def test_a_key_out_of_its_range_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"{key} of ReviewKD: found {value!r}, expected a"):
        build(**{key: value})


def test_a_map_beside_a_vector_is_refused():
    with pytest.raises(ConfigError, match="map beside a vector"):
        build(where=["stage1", "stage3:embedding"])
