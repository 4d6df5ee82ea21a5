"""A row that is kept by a weight counts as so many rows, in every distiller; a mask is weights of 0 and 1."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch

from sakd.distillers import AT, CC, CRD, DIST, DKD, KD, NKD, NST, PKT, RKD, SP, VID, WTTM, FitNet
from tests import test_distillers as plain
from tests.test_distillers import BATCH, INDICES, KEEPS, LABELS, USUAL, build, close, features

TIMES = torch.tensor([2.0, 0.0, 1.0, 3.0, 0.0, 1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.0, 1.0, 0.05, 0.7, 0.5], dtype=torch.float64)
FORMULAS = {
    KD: (plain.plain_kd, "logits"),
    DKD: (plain.plain_dkd, "logits"),
    NKD: (plain.plain_nkd, "logits"),
    WTTM: (plain.plain_wttm, "logits"),
    AT: (plain.plain_at, "stage2"),
    NST: (plain.plain_nst, "stage2"),
    VID: (plain.plain_vid, "stage2"),
    SP: (plain.plain_sp, "stage3"),
    PKT: (plain.plain_pkt, "embedding"),
    DIST: (plain.plain_dist, "logits"),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def loss_of(distiller, student, teacher, keep):
    return distiller.spot_loss(distiller.spots[0], student, teacher, keep, INDICES)


def with_gradients(loss, inputs):
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    zeros = [
        torch.zeros_like(value) if grad is None else grad
        for grad, value in zip(gradients, inputs, strict=True)
    ]
    return [loss, *zeros]


@pytest.mark.parametrize("kept", KEEPS)
@pytest.mark.parametrize(("kind", "where"), USUAL)
def test_weights_of_zero_and_one_are_the_mask(kind, where, kept):
    distiller, mask = build(kind, where), torch.tensor(KEEPS[kept])
    f_s, f_t = features(distiller)
    found = []
    for keep in (mask, mask.double()):
        own = deepcopy(distiller)
        own.stream = torch.Generator().manual_seed(1)
        state = with_gradients(loss_of(own, f_s, f_t, keep), [f_s, *own.parameters()])
        found.append([*state, *own.buffers()])
    for of_mask, of_weights in zip(*found, strict=True):
        close(of_weights, of_mask)
    if kept == "none":
        assert all(torch.equal(value, torch.zeros_like(value)) for value in found[1][:2])


@pytest.mark.parametrize("kind", FORMULAS, ids=lambda kind: kind.__name__)
def test_a_row_of_weight_three_counts_as_three_rows(kind):
    formula, where = FORMULAS[kind]
    distiller = build(kind, where)
    f_s, f_t = features(distiller)
    rows = torch.arange(BATCH).repeat_interleave(TIMES.long())
    own = {"distiller": distiller} if formula in plain.LEARNED else {}
    own |= {"labels": LABELS[INDICES[rows]]} if formula in plain.LABELLED else {}
    expected = len(rows) / BATCH * formula(f_s[rows], f_t[rows], **own)
    inputs = [f_s, *distiller.parameters()]
    found = with_gradients(loss_of(distiller, f_s, f_t, TIMES), inputs)
    for ours, wanted in zip(found, with_gradients(expected, inputs), strict=True):
        close(ours, wanted)


def test_fitnets_errors_are_weighed_behind_a_regressor_that_sees_the_whole_batch():
    distiller = build(FitNet, "stage2")
    f_s, f_t = features(distiller)
    (regressor,) = distiller.regressors.values()
    errors = (plain.plain_regression(regressor, f_s) - f_t).square().flatten(1).mean(1)
    close(
        loss_of(distiller, f_s, f_t, WEIGHTS),
        sum(w * e for w, e in zip(WEIGHTS, errors, strict=True)) / BATCH,
    )


def test_ccs_neighbours_are_rows_of_any_weight_and_a_pair_counts_by_the_product():
    distiller = build(CC, "embedding")
    f_s, f_t = features(distiller)
    differences = distiller.embed_student["embedding"](f_s) - distiller.embed_teacher["embedding"](f_t)
    rows = [i for i in range(BATCH) if WEIGHTS[i] > 0]
    pairs = list(pairwise(rows))
    products = [WEIGHTS[i] * WEIGHTS[j] * (differences[i] * differences[j]).abs().sum() for i, j in pairs]
    expected = sum(products) / sum(WEIGHTS[i] * WEIGHTS[j] for i, j in pairs) * WEIGHTS.sum() / BATCH
    close(loss_of(distiller, f_s, f_t, WEIGHTS), expected)


def test_rkds_pairs_and_triples_count_by_the_product():
    distiller = build(RKD, "embedding")
    f_s, f_t = features(distiller)
    w, rows = WEIGHTS, [i for i in range(BATCH) if WEIGHTS[i] > 0]

    def distances(f):
        apart = {(i, j): (f[i] - f[j]).norm() for i in rows for j in rows if i != j}
        total = sum(w[i] * w[j] for i, j in apart)
        mean = sum(w[i] * w[j] * distance for (i, j), distance in apart.items()) / total
        return {pair: distance / mean for pair, distance in apart.items()}

    def angle(f, i, j, k):
        to_j, to_k = f[j] - f[i], f[k] - f[i]
        return (to_j * to_k).sum() / (to_j.norm() * to_k.norm())

    d_s, d_t = distances(f_s), distances(f_t)
    by_distance = sum(w[i] * w[j] * plain.smooth_l1(d_s[i, j], d_t[i, j]) for i, j in d_s)
    triples = [(i, j, k) for i in rows for j in rows for k in rows if i not in (j, k)]
    by_angle = sum(
        w[i] * w[j] * w[k] * plain.smooth_l1(angle(f_s, i, j, k), angle(f_t, i, j, k)) for i, j, k in triples
    )
    mean = 25 * by_distance / w.sum() ** 2 + 50 * by_angle / w.sum() ** 3
    close(loss_of(distiller, f_s, f_t, w), w.sum() / BATCH * mean)


def test_crds_losses_are_weighed_and_banks_take_in_each_row_of_any_weight():
    distiller = build(CRD, "embedding")
    f_s, f_t = features(distiller)
    loss_of(distiller, f_s, f_t, torch.ones(BATCH, dtype=torch.bool))  # fixes Z
    losses, banks = [], []
    for keep in (WEIGHTS, WEIGHTS > 0, *(torch.arange(BATCH) == i for i in range(BATCH))):
        own = deepcopy(distiller)
        own.stream = torch.Generator().manual_seed(1)
        losses.append(loss_of(own, f_s, f_t, keep))
        banks.append(own.student_banks["embedding"].embeddings)
    weighed, _, *each = losses
    close(weighed, sum(w * loss for w, loss in zip(WEIGHTS, each, strict=True)))
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], distiller.student_banks["embedding"].embeddings)
