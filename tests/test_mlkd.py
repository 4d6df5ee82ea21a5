"""MLKD's loss is that of the published code on the kept rows, written out here in plain steps."""

from statistics import median

import pytest
import torch

from sakd.data import View
from sakd.distillers import MLKD
from sakd.errors import ConfigError
from sakd.networks import resnet8
from tests.test_distillers import BATCH, INDICES, KEEPS, assert_same_with_gradients, close, plain_z_scores

CLASSES = 5
TEMPERATURES, OF_VIEWS = (2.0, 3.0, 4.0, 5.0, 6.0), (3.0, 4.0, 5.0)
TIMES = torch.tensor([2.0, 0.0, 1.0, 3.0, 0.0, 1.0], dtype=torch.float64)


def built(where="logits", temperatures=TEMPERATURES, view_temperatures=OF_VIEWS, views=1):
    network = resnet8(CLASSES, 1, 8)
    asked = [View(None, place / 10) for place in range(views)]
    return MLKD(network, network, where, 0.9, list(temperatures), list(view_temperatures), asked)


def logits(views=1):
    """Of both networks and of the images and each view of them: the student's take gradients."""
    torch.manual_seed(0)
    draws = 2 * torch.randn(2, 1 + views, BATCH, CLASSES, dtype=torch.float64)
    return [z.clone().requires_grad_() for z in draws[0]], list(draws[1])


def loss_of(distiller, student, teacher, keep):
    (spot,) = distiller.spots
    own, *views = [({"logits": s}, {"logits": t}) for s, t in zip(student, teacher, strict=True)]
    return distiller(*own, {spot: keep}, INDICES, views)


def softmax(z, temperature=1.0):
    return (z / temperature).exp() / (z / temperature).exp().sum()


def kd(student, teacher, temperature, standardise=False):
    if standardise:
        student, teacher = plain_z_scores(student), plain_z_scores(teacher)
    rows = [(softmax(s, temperature), softmax(t, temperature)) for s, t in zip(student, teacher, strict=True)]
    return temperature**2 * sum((t * (t / s).log()).sum() for s, t in rows) / len(rows)


def relations(student, teacher, temperature, by_class):
    """Squared differences of rows' products, or of columns', over the number of them."""
    tables = [torch.stack([softmax(row, temperature) for row in z]) for z in (student, teacher)]
    vectors = [list(table.T if by_class else table) for table in tables]
    products = [[[(a @ b) for a in own] for b in own] for own in vectors]
    size = range(len(vectors[0]))
    return sum((products[0][i][j] - products[1][i][j]) ** 2 for i in size for j in size) / len(size)


def masked_share(values):
    return sum(value <= median(values) for value in values) / len(values)


def plain_mlkd(student, teacher, standardise=False):
    (s, *s_views), (t, *t_views) = student, teacher
    probabilities = [softmax(row) for row in t]
    unsure = masked_share([float(p.max()) for p in probabilities])
    rare = masked_share([float(total) for total in sum(probabilities)])
    total = 0
    for temperature in TEMPERATURES:
        of_image = kd(s, t, temperature, standardise)
        total += unsure * (of_image + relations(s, t, temperature, by_class=False))
        total += rare * relations(s, t, temperature, by_class=True)
        for s_view, t_view in zip(s_views, t_views, strict=True):
            in_view = temperature in OF_VIEWS
            total += kd(s_view, t_view, temperature, standardise) if in_view else of_image
    return 0.9 * total


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kept", ["all", "some", "one"])
def test_the_loss_is_that_of_the_kept_rows_times_their_share(kept, views):
    keep, (student, teacher) = torch.tensor(KEEPS[kept]), logits(views)
    expected = plain_mlkd([z[keep] for z in student], [z[keep] for z in teacher])
    found = loss_of(built(views=views), student, teacher, keep)
    assert_same_with_gradients(found, int(keep.sum()) / BATCH * expected, student)


def test_standardised_logits_are_compared_by_their_z_scores_but_for_relations():
    keep, (student, teacher) = torch.tensor(KEEPS["some"]), logits()
    expected = plain_mlkd([z[keep] for z in student], [z[keep] for z in teacher], standardise=True)
    distiller = built()
    distiller.standardise = True
    found = loss_of(distiller, student, teacher, keep)
    assert_same_with_gradients(found, int(keep.sum()) / BATCH * expected, student)


def test_a_row_of_weight_three_counts_as_three_rows():
    rows, (student, teacher) = torch.arange(BATCH).repeat_interleave(TIMES.long()), logits()
    expected = len(rows) / BATCH * plain_mlkd([z[rows] for z in student], [z[rows] for z in teacher])
    assert_same_with_gradients(loss_of(built(), student, teacher, TIMES), expected, student)


@pytest.mark.parametrize("keep", [torch.tensor(KEEPS["none"]), torch.zeros(BATCH)], ids=["mask", "weights"])
def test_without_a_kept_row_it_is_exactly_zero(keep):
    student, teacher = logits()
    loss = loss_of(built(), student, teacher, keep)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, student):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_rows_that_are_all_as_sure_are_all_at_their_median():
    """So they are where a trained teacher is certain of most."""
    student, teacher = logits()
    teacher[0] = teacher[0][:1].repeat(BATCH, 1)
    found = loss_of(built(), student, teacher, torch.tensor(KEEPS["all"]))
    assert masked_share([1.0] * BATCH) == 1
    close(found, plain_mlkd(student, teacher))


def test_compared_at_all_temperatures_the_views_stand_for_themselves():
    student, teacher = logits()
    everywhere = torch.tensor(KEEPS["all"])
    found = loss_of(built(view_temperatures=TEMPERATURES), student, teacher, everywhere)
    instead = sum(kd(student[0], teacher[0], t) - kd(student[1], teacher[1], t) for t in (2.0, 6.0))
    close(found, plain_mlkd(student, teacher) - 0.9 * instead)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"view_temperatures": [1.0]}, r"view_temperatures of MLKD: found 1\.0, expected some of the temp"),
        ({"temperatures": [0.0], "view_temperatures": []}, r"temperatures of MLKD: found 0\.0"),
        ({"where": "embedding"}, r"where=embedding: found embedding, MLKD takes the logits alone"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(keys, message):
    with pytest.raises(ConfigError, match=message):
        built(**keys)
