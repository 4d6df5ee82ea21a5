"""AFD against attention and distances written out in plain steps, with a mask of its own at every spot."""

import pytest
import torch

from sakd.distillers import AFD
from sakd.errors import ConfigError
from sakd.networks import resnet8, resnet14, vgg8
from tests.test_distillers import BATCH, INDICES, KEEPS, close
from tests.test_semckd import features, masks

# Teacher and student: where the teacher is deeper, its last stage has no spot of its own.
PAIRS = {"equal": (resnet14, resnet8), "deeper-teacher": (vgg8, resnet8), "deeper-student": (resnet8, vgg8)}


def build(teacher=resnet14, student=resnet8, where="stages", weight=2.5, width=5):
    torch.manual_seed(0)
    distiller = AFD(student(10, 1, 8), teacher(10, 1, 8), where, weight, width).double()
    for parameter in distiller.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return distiller


def plain_embedding(rows, layers):
    """A linear layer and batch norm over the whole batch."""
    linear, norm, *_ = layers
    rows = rows @ linear.weight.T + linear.bias
    mean = rows.sum(0) / len(rows)
    variance = ((rows - mean) ** 2).sum(0) / len(rows)
    return (rows - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def plain_attention(distiller, student, teacher):
    queries = [plain_embedding(f.mean((2, 3)), distiller.queries[stage]) for stage, f in teacher.items()]
    keys = [plain_embedding(f.mean((2, 3)), distiller.keys[stage]).relu() for stage, f in student.items()]
    # All samples' keys pass one batch norm together, sample by sample and stage by stage.
    rows = torch.stack([key[b] for b in range(BATCH) for key in keys])
    bilinear = plain_embedding(rows, distiller.key_of_each)
    attention = torch.zeros(BATCH, len(queries), len(keys), dtype=torch.float64)
    width = distiller.width
    for b in range(BATCH):
        for t, query in enumerate(queries):
            scores = []
            for s in range(len(keys)):
                key = bilinear[b * len(keys) + s, t * width : (t + 1) * width]
                place = (distiller.teacher_places[t] * distiller.student_places[s]).sum()
                scores.append(((key * query[b]).sum() + place) / width**0.5)
            exponentials = torch.stack(scores).exp()
            attention[b, t] = exponentials / exponentials.sum()
    return attention


def plain_map(energy):
    flat = energy.flatten()
    return flat / (flat**2).sum().sqrt()


def plain_afd(distiller, student, teacher, keep):
    """A teacher stage goes by the mask of the spot of its own number, or of the last one."""
    attention, total = plain_attention(distiller, student, teacher), 0
    for t, f_t in enumerate(teacher.values()):
        rows = keep[distiller.spots[min(t, len(distiller.spots) - 1)]]
        for b in range(BATCH):
            target = plain_map((f_t[b] ** 2).mean(0))
            for s, f_s in enumerate(student.values()):
                energy = torch.nn.functional.adaptive_avg_pool2d((f_s[[b]] ** 2).mean(1), f_t.shape[-2:])
                error = ((plain_map(energy) - target) ** 2).mean()
                total = total + rows[b] * attention[b, t, s] * error
    return 2.5 * total / BATCH


@pytest.mark.parametrize(
    ("pair", "kept"),
    [
        *(("equal", kept) for kept in ("all", "some", "one")),
        ("deeper-teacher", "some"),
        ("deeper-student", "some"),
    ],
)
def test_each_teacher_stages_term_is_the_kept_share_of_the_published_one_of_its_spots_kept_rows(pair, kept):
    distiller = build(*PAIRS[pair])
    (student, teacher), keep = features(*PAIRS[pair]), masks(distiller, kept)
    loss = distiller(student, teacher, keep, INDICES)
    expected = plain_afd(distiller, student, teacher, keep)
    close(loss, expected)
    learned = [*student.values(), *distiller.parameters()]
    close(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned))


def test_without_kept_rows_loss_and_gradients_are_exactly_zero():
    distiller = build(vgg8)
    student, teacher = features(vgg8)
    loss = distiller(student, teacher, masks(distiller, "none"), INDICES)
    assert loss == 0
    learned = [*student.values(), *distiller.parameters()]
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, learned))


@pytest.mark.parametrize("kept", KEEPS)
def test_features_of_zero_give_finite_losses_and_gradients(kept):
    distiller = build(vgg8).float()
    student, teacher = features(vgg8, dtype=torch.float32)
    student = {stage: torch.zeros_like(x, requires_grad=True) for stage, x in student.items()}
    teacher = {stage: torch.zeros_like(x) for stage, x in teacher.items()}
    loss = distiller(student, teacher, masks(distiller, kept), INDICES)
    learned = [*student.values(), *distiller.parameters()]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, learned))


def test_a_width_out_of_its_range_and_a_vector_are_refused_by_name():
    with pytest.raises(ConfigError, match="width of AFD: found 0, expected a"):
        build(width=0)
    with pytest.raises(ConfigError, match="where=embedding: found a vector at embedding, AFD takes maps"):
        build(where="embedding")
