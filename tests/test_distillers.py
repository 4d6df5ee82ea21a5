"""Every distiller's masked loss is n_kept / B times its published loss on the kept rows, written out here in
plain steps."""

from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sakd.distillers import AT, CC, CRD, CTKD, DIST, DKD, KD, NKD, NST, PKT, RKD, SP, VID, WTTM, FitNet, VkD
from sakd.distillers.vkd import OrthogonalProjection
from sakd.errors import ConfigError
from sakd.networks import resnet8, resnet8x4, resnet20, vgg8

BATCH, TEMPERATURE = 6, 4.0
INDICES = torch.tensor([4, 9, 0, 7, 2, 5])  # of the batch in the training set
LABELS = torch.arange(12) % 5  # of the training set
KEEPS = {
    "all": [True] * BATCH,
    "some": [True, False, True, True, False, True],
    "one": [False, False, False, True, False, False],
    "none": [False] * BATCH,
}

# With 8x8 images stages 1, 2 and 3 give maps of 8x8, 4x4 and 2x2; resnet8x4 is four times as wide as resnet8.
MAPS = {
    "equal": ("stage2", resnet20),
    "channels-differ": ("stage2", resnet8x4),
    "larger-teacher-map": ("stage2:stage1", resnet8x4),
    "larger-student-map": ("stage2:stage3", resnet8x4),
}
VECTORS = {"equal": ("embedding", resnet20), "widths-differ": ("embedding", resnet8x4)}


def plain_kd(student, teacher):
    losses = []
    for z_s, z_t in zip(student, teacher, strict=True):
        p_s = (z_s / TEMPERATURE).exp() / (z_s / TEMPERATURE).exp().sum()
        p_t = (z_t / TEMPERATURE).exp() / (z_t / TEMPERATURE).exp().sum()
        losses.append(TEMPERATURE**2 * sum(t * (t / s).log() for s, t in zip(p_s, p_t, strict=True)))
    return sum(losses) / len(losses)


def plain_at(student, teacher):
    size = min(student.shape[-1], teacher.shape[-1])

    def attention(sample):
        block = sample.shape[-1] // size
        positions = []
        for i in range(0, size * block, block):
            for j in range(0, size * block, block):
                mean = sample[:, i : i + block, j : j + block].sum((1, 2)) / block**2
                positions.append((mean**2).sum() / len(mean))
        flat = torch.stack(positions)
        return flat / (flat**2).sum().sqrt()

    pairs = zip(student, teacher, strict=True)
    return sum(((attention(s) - attention(t)) ** 2).sum() / size**2 for s, t in pairs) / len(student)


def plain_sp(student, teacher):
    def similarity(features):
        rows = []
        for f in features:
            row = torch.stack([(f * other).sum() for other in features])
            rows.append(row / (row**2).sum().sqrt())
        return torch.stack(rows)

    return ((similarity(student) - similarity(teacher)) ** 2).sum() / len(student) ** 2


def plain_pkt(student, teacher, epsilon=1e-7):
    def probabilities(embeddings):
        rows = []
        for e in embeddings:
            cosines = [(e * o).sum() / ((e.norm() + epsilon) * (o.norm() + epsilon)) for o in embeddings]
            similarities = (torch.stack(cosines) + 1) / 2
            rows.append(similarities / similarities.sum())
        return torch.stack(rows)

    p_s, p_t = probabilities(student), probabilities(teacher)
    return (p_t * ((p_t + epsilon) / (p_s + epsilon)).log()).sum() / len(student) ** 2


def plain_cc(student, teacher, distiller):
    name = distiller.spots[0].name
    e_s, e_t = distiller.embed_student[name], distiller.embed_teacher[name]
    differences = []
    for s, t in zip(student, teacher, strict=True):
        differences.append(((e_s.weight @ s + e_s.bias) - (e_t.weight @ t + e_t.bias)).abs())
    pairs = len(differences) - 1
    return (
        sum((differences[i] * differences[i + 1]).sum() for i in range(pairs)) / pairs
        if pairs
        else 0 * student.sum()
    )


def smooth_l1(a, b):
    error = (a - b).abs()
    return 0.5 * error**2 if error < 1 else error - 0.5


def plain_rkd(student, teacher):
    rows = range(len(student))

    def distances(embeddings):
        pairs = {(i, j): (embeddings[i] - embeddings[j]).norm() for i in rows for j in rows if i != j}
        mean = sum(pairs.values()) / max(len(pairs), 1)
        return {pair: distance / mean for pair, distance in pairs.items()}

    def angle(embeddings, i, j, k):
        to_j, to_k = embeddings[j] - embeddings[i], embeddings[k] - embeddings[i]
        return (to_j * to_k).sum() / (to_j.norm() * to_k.norm())

    d_s, d_t = distances(student), distances(teacher)
    by_distance = sum(smooth_l1(d_s[pair], d_t[pair]) for pair in d_s)
    triples = [(i, j, k) for i in rows for j in rows for k in rows if i not in (j, k)]
    by_angle = sum(smooth_l1(angle(student, *t), angle(teacher, *t)) for t in triples)
    return 25 * by_distance / len(rows) ** 2 + 50 * by_angle / len(rows) ** 3 + 0 * student.sum()


def pooled(student, teacher):
    """The larger of two maps averaged over blocks to the smaller's size."""
    size = min(student.shape[-1], teacher.shape[-1])

    def shrink(maps):
        block = maps.shape[-1] // size
        return maps.reshape(*maps.shape[:2], size, block, size, block).mean((3, 5))

    return shrink(student), shrink(teacher)


def plain_vid(student, teacher, distiller):
    student, teacher = pooled(student, teacher)
    bound = distiller.bounds[distiller.spots[0].name]
    first, _, second, _, third = bound.mean
    mean = torch.einsum("oc,bchw->bohw", first.weight[..., 0, 0], student)
    mean = torch.einsum("oc,bchw->bohw", second.weight[..., 0, 0], mean * (mean > 0))
    mean = torch.einsum("oc,bchw->bohw", third.weight[..., 0, 0], mean * (mean > 0))
    variance = (1 + bound.scale.exp()).log() + 1e-5
    return (0.5 * ((mean - teacher) ** 2 / variance + variance.log())).mean()


def plain_nst(student, teacher):
    student, teacher = pooled(student, teacher)

    def kernel(a, b):
        units, others = (
            torch.stack([channel.flatten() / channel.norm() for channel in maps]) for maps in (a, b)
        )
        return sum(((unit * others).sum(1) ** 2).sum() for unit in units) / (len(a) * len(b))

    pairs = list(zip(student, teacher, strict=True))
    return sum(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in pairs) / len(pairs)


def plain_dkd(student, teacher, labels):
    losses = []
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        e_s, e_t = (z_s / TEMPERATURE).exp(), (z_t / TEMPERATURE).exp()
        p_s, p_t = e_s / e_s.sum(), e_t / e_t.sum()
        own_s, own_t = p_s[label], p_t[label]
        of_target = own_t * (own_t / own_s).log() + (1 - own_t) * ((1 - own_t) / (1 - own_s)).log()
        others = [c for c in range(len(z_s)) if c != label]
        of_others = sum(
            p_t[c] / (1 - own_t) * (p_t[c] / (1 - own_t) / (p_s[c] / (1 - own_s))).log() for c in others
        )
        losses.append(TEMPERATURE**2 * (0.7 * of_target + 8 * of_others))
    return sum(losses) / len(losses)


def plain_nkd(student, teacher, labels):
    losses = []
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        log_s, p_t = (z_s.exp() / z_s.exp().sum()).log(), z_t.exp() / z_t.exp().sum()
        others = [c for c in range(len(z_s)) if c != label]
        e_s, e_t = (z_s[others] / TEMPERATURE).exp(), (z_t[others] / TEMPERATURE).exp()
        of_others = (e_t / e_t.sum() * (e_s / e_s.sum()).log()).sum()
        losses.append(-0.7 * p_t[label] * log_s[label] - 3.5 * TEMPERATURE**2 * of_others)
    return sum(losses) / len(losses)


def plain_wttm(student, teacher):
    losses = []
    for z_s, z_t in zip(student, teacher, strict=True):
        p_s = z_s.exp() / z_s.exp().sum()
        powers = (z_t.exp() / z_t.exp().sum()) ** 0.2
        q = powers / powers.sum()
        losses.append(powers.sum() * sum(t * (t / s).log() for s, t in zip(p_s, q, strict=True)))
    return sum(losses) / len(losses)


def plain_dist(student, teacher, epsilon=1e-8):
    def correlation(a, b):
        a, b = a - a.sum() / len(a), b - b.sum() / len(b)
        return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt() + epsilon)

    def probabilities(logits):
        exponentials = (logits / TEMPERATURE).exp()
        return exponentials / exponentials.sum(1, keepdim=True)

    p_s, p_t = probabilities(student), probabilities(teacher)
    inter = 1 - sum(correlation(s, t) for s, t in zip(p_s, p_t, strict=True)) / len(p_s)
    intra = (
        1 - sum(correlation(s, t) for s, t in zip(p_s.T, p_t.T, strict=True)) / p_s.shape[1]
        if len(p_s) > 1
        else 0
    )
    return TEMPERATURE**2 * (1.5 * inter + 0.5 * intra)


def plain_vkd(student, teacher, distiller):
    reflections = distiller.projections[distiller.spots[0].name].reflections
    n, k = reflections.shape
    product = torch.eye(n, dtype=reflections.dtype)
    for i in range(k):
        vector = torch.cat([torch.zeros(i), torch.ones(1), reflections[i + 1 :, i]])
        product = product @ (torch.eye(n) - 2 * torch.outer(vector, vector) / (vector @ vector))
    weight = product[:, :k] if teacher.shape[1] == n else product[:, :k].T
    losses = []
    for s, t in zip(student, teacher, strict=True):
        mean = t.sum() / len(t)
        target = (t - mean) / (((t - mean) ** 2).sum() / len(t) + 1e-5).sqrt()
        losses += [smooth_l1(a, b) for a, b in zip(weight @ s, target, strict=True)]
    return sum(losses) / len(losses)


LEARNED = (plain_cc, plain_vid, plain_vkd)  # formulas with weights of the distiller
LABELLED = (plain_dkd, plain_nkd)


def plain_regression(regressor, student):
    """Convolution, batch norm over the whole batch, ReLU; a linear layer for vectors."""
    if student.dim() == 2:
        return student @ regressor.weight.T + regressor.bias
    convolution, norm, _ = regressor
    x = convolution(student)
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    return x * (x > 0)


KEYS = {
    KD: {"temperature": TEMPERATURE},
    CC: {"embedding_width": 5, "teacher_embedding": "learned"},
    CRD: {
        "embedding_width": 5,
        "negatives": 9,
        "temperature": 0.07,
        "momentum": 0.5,
    },  # its formula: test_crd.py
    RKD: {"distance_weight": 25.0, "angle_weight": 50.0},
    VID: {"initial_variance": 5.0},
    DKD: {"target_weight": 0.7, "others_weight": 8.0, "temperature": TEMPERATURE, "ramp_epochs": 20},
    NKD: {"target_weight": 0.7, "others_weight": 3.5, "temperature": TEMPERATURE},
    WTTM: {"power": 0.2},
    CTKD: {
        "least_temperature": 1.0,
        "temperature_span": 20.0,
        "initial_logit": 1.0,
        "curriculum_epochs": 10,
    },  # its formula: test_ctkd.py
    DIST: {"inter_weight": 1.5, "intra_weight": 0.5, "temperature": TEMPERATURE},
}


def build(kind, where, teacher=resnet20, weight=1.0):
    """The distiller for a resnet8 that learns from ``teacher``, in float64."""
    student, teacher = resnet8(10, 1, 8), teacher(10, 1, 8)
    distiller = kind(student, teacher, where, weight, **KEYS.get(kind, {})).double()
    distiller.prepare(LABELS, 10, torch.Generator().manual_seed(0))
    for parameter in distiller.parameters():  # so that no batch norm starts as the identity
        torch.nn.init.normal_(parameter, std=0.3)
    return distiller


def features(distiller, spot=None, dtype=torch.float64):
    """Random features at the distiller's spot: the student's takes gradients."""
    spot = spot or distiller.spots[0]
    student = torch.randn(BATCH, *spot.student_shape, dtype=dtype).requires_grad_()
    return student, torch.randn(BATCH, *spot.teacher_shape, dtype=dtype)


def masked(distiller, student, teacher, keep):
    """The masked loss at the first spot and its gradient for the student's features."""
    loss = distiller.spot_loss(distiller.spots[0], student, teacher, keep, INDICES)
    return loss, *torch.autograd.grad(loss, student)


def assert_same_with_gradients(loss, expected, inputs):
    """For the student's features and all that the distiller itself learns."""
    close(loss, expected)
    found, wanted = (torch.autograd.grad(value, inputs, allow_unused=True) for value in (loss, expected))
    for gradient, plain in zip(found, wanted, strict=True):
        assert gradient is not None
        close(gradient, torch.zeros_like(gradient) if plain is None else plain)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


CASES = [
    pytest.param(kind, plain, *case, id=f"{kind.__name__}-{name}")
    for kind, plain, cases in (
        (KD, plain_kd, {"logits": ("logits", resnet20)}),
        (AT, plain_at, MAPS),
        (SP, plain_sp, MAPS | {f"vectors-{name}": case for name, case in VECTORS.items()}),
        (PKT, plain_pkt, VECTORS),
        (CC, plain_cc, VECTORS),
        (RKD, plain_rkd, VECTORS),
        (VID, plain_vid, MAPS),
        (NST, plain_nst, MAPS),
        (DKD, plain_dkd, {"logits": ("logits", resnet20)}),
        (DIST, plain_dist, {"logits": ("logits", resnet20)}),
        (NKD, plain_nkd, {"logits": ("logits", resnet20)}),
        (WTTM, plain_wttm, {"logits": ("logits", resnet20)}),
        (
            VkD,
            plain_vkd,
            {"wider": ("logits:embedding", resnet20), "narrower": ("embedding:logits", resnet20)},
        ),
    )
    for name, case in cases.items()
]
FITNET_CASES = [
    pytest.param(*case, id=name)
    for name, case in (MAPS | {f"vectors-{name}": case for name, case in VECTORS.items()}).items()
]
# One of each distiller, at its usual spot, with shapes that differ where they may.
USUAL = [
    pytest.param(kind, where, id=kind.__name__)
    for kind, where in (
        *((KD, "logits"), (FitNet, "hint"), (AT, "stages"), (SP, "last_stage"), (PKT, "embedding")),
        *((CC, "embedding"), (RKD, "embedding"), (VID, "stages"), (NST, "stages"), (CRD, "embedding")),
        *((DKD, "logits"), (DIST, "logits"), (NKD, "logits"), (WTTM, "logits"), (CTKD, "logits")),
        (VkD, "embedding"),
    )
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kept", ["all", "some", "one"])
@pytest.mark.parametrize(("kind", "plain", "where", "teacher"), CASES)
def test_masked_loss_is_the_kept_share_of_the_published_loss_on_the_kept_rows(
    kind, plain, where, teacher, kept
):
    distiller, keep = build(kind, where, teacher), torch.tensor(KEEPS[kept])
    f_s, f_t = features(distiller)
    loss = distiller.spot_loss(distiller.spots[0], f_s, f_t, keep, INDICES)
    own = {"distiller": distiller} if plain in LEARNED else {}
    own |= {"labels": LABELS[INDICES[keep]]} if plain in LABELLED else {}
    expected = int(keep.sum()) / BATCH * plain(f_s[keep], f_t[keep], **own)
    assert_same_with_gradients(loss, expected, [f_s, *distiller.parameters()])


@pytest.mark.parametrize("kept", ["all", "some", "one"])
@pytest.mark.parametrize(("where", "teacher"), FITNET_CASES)
def test_fitnet_masks_rows_behind_a_regressor_that_sees_the_whole_batch(where, teacher, kept):
    distiller, keep = build(FitNet, where, teacher), torch.tensor(KEEPS[kept])
    f_s, f_t = features(distiller)
    loss = distiller.spot_loss(distiller.spots[0], f_s, f_t, keep, INDICES)
    (regressor,) = distiller.regressors.values()
    errors = (plain_regression(regressor, f_s)[keep] - f_t[keep]) ** 2
    expected = int(keep.sum()) / BATCH * errors.sum() / errors.numel()
    assert_same_with_gradients(loss, expected, [f_s, *distiller.parameters()])


@pytest.mark.parametrize("kind_of_features", ["random", "zero"])
@pytest.mark.parametrize(("kind", "where"), USUAL)
def test_without_kept_rows_loss_and_gradients_are_exactly_zero(kind, where, kind_of_features):
    distiller = build(kind, where, resnet8x4)
    f_s, f_t = features(distiller)
    if kind_of_features == "zero":
        f_s, f_t = torch.zeros_like(f_s, requires_grad=True), torch.zeros_like(f_t)
    loss = distiller.spot_loss(distiller.spots[0], f_s, f_t, torch.tensor(KEEPS["none"]), INDICES)
    loss.backward()
    assert loss == 0
    assert torch.equal(f_s.grad, torch.zeros_like(f_s))
    for parameter in distiller.regressors[distiller.spots[0].name].parameters() if kind is FitNet else ():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("kept", KEEPS)
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
@pytest.mark.parametrize(("kind", "where"), USUAL)
def test_features_of_zero_give_finite_losses_and_gradients(kind, where, zero, kept):
    distiller = build(kind, where, resnet8x4).float()
    f_s, f_t = features(distiller, dtype=torch.float32)
    if zero != "teacher":
        f_s = torch.zeros_like(f_s, requires_grad=True)
    if zero != "student":
        f_t = torch.zeros_like(f_t)
    loss, gradient = masked(distiller, f_s, f_t, torch.tensor(KEEPS[kept]))
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kept", KEEPS)
def test_kd_with_the_kept_share_is_the_sum_of_kept_losses_over_the_batch(kept):
    distiller, keep = build(KD, "logits"), torch.tensor(KEEPS[kept])
    f_s, f_t = features(distiller)
    rows = [plain_kd(f_s[[i]], f_t[[i]]) for i in range(BATCH)]
    close(masked(distiller, f_s, f_t, keep)[0], sum(keep[i] * rows[i] for i in range(BATCH)) / BATCH)


def test_fitnets_batch_norm_does_not_depend_on_what_is_kept():
    distiller = build(FitNet, "hint", resnet8x4)
    f_s, f_t = features(distiller)
    statistics = {}
    for kept, rows in KEEPS.items():
        copy = deepcopy(distiller)
        copy.spot_loss(copy.spots[0], f_s, f_t, torch.tensor(rows), INDICES)
        statistics[kept] = copy.regressors["stage2"][1].running_mean
    mean = distiller.regressors["stage2"][0](f_s).mean((0, 2, 3))
    for running_mean in statistics.values():
        close(running_mean, 0.1 * mean)  # batch norm's momentum, from 0


def test_fitnets_regressor_learns():
    distiller = build(FitNet, "hint", resnet8x4)
    masked_loss = distiller.spot_loss(
        distiller.spots[0], *features(distiller), torch.tensor(KEEPS["some"]), INDICES
    )
    masked_loss.backward()
    convolution, norm, _ = distiller.regressors["stage2"]
    for parameter in (convolution.weight, norm.weight, norm.bias):
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "plain", "where"),
    [
        pytest.param(KD, plain_kd, "logits", id="KD"),
        pytest.param(AT, plain_at, ["stage1", "stage2:stage3"], id="AT"),
        pytest.param(SP, plain_sp, ["stage1", "stage2:stage3"], id="SP"),
        pytest.param(PKT, plain_pkt, ["embedding", "logits"], id="PKT"),
    ],
)
def test_forward_sums_over_spots_with_each_spots_own_mask_and_multiplies_with_the_weight(kind, plain, where):
    distiller = build(kind, where, weight=2.5).float()
    student, teacher, keep, expected = {}, {}, {}, 0
    for i, spot in enumerate(distiller.spots):
        f_s, f_t = features(distiller, spot, torch.float32)
        student[spot.student], teacher[spot.teacher] = f_s, f_t
        keep[spot] = rows = torch.tensor(KEEPS["some"]).roll(i)
        expected += 2.5 * int(rows.sum()) / BATCH * plain(f_s[rows].double(), f_t[rows].double())
    loss = distiller(student, teacher, keep, INDICES)
    assert len(distiller.spots) == (1 if kind is KD else 2)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_forward_of_fitnet_uses_each_spots_own_regressor():
    distiller = build(FitNet, "stages", resnet8x4, weight=2.5).float()
    inputs = {spot: features(distiller, spot, torch.float32) for spot in distiller.spots}
    student = {spot.student: f_s for spot, (f_s, _) in inputs.items()}
    teacher = {spot.teacher: f_t for spot, (_, f_t) in inputs.items()}
    keep = dict.fromkeys(distiller.spots, torch.tensor(KEEPS["all"]))
    loss = distiller(student, teacher, keep, INDICES)
    errors = [
        ((plain_regression(regressor, f_s) - f_t) ** 2).mean()
        for regressor, (f_s, f_t) in zip(distiller.regressors.values(), inputs.values(), strict=True)
    ]
    assert len(errors) == 3
    torch.testing.assert_close(loss, 2.5 * sum(errors), rtol=1e-5, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))]
        )
        return out


@pytest.mark.parametrize(
    ("kind", "where", "largest"),
    [
        pytest.param(
            NST, "stage1", BATCH * 64 * max(64, 8 * 8), id="NST"
        ),  # 64 channels of 8x8 in the teacher
        pytest.param(RKD, "embedding", BATCH * BATCH * 256, id="RKD"),
    ],
)
def test_no_tensor_has_a_dimension_more_than_features_and_relations_have(kind, where, largest):
    """Not B x C x C x HW, nor B x B x B x d."""
    distiller = build(kind, where, resnet8x4)
    f_s, f_t = features(distiller)
    with LargestTensor() as seen:
        masked(distiller, f_s, f_t, torch.tensor(KEEPS["some"]))
    assert f_t.numel() <= seen.numel <= largest


@pytest.mark.parametrize("weight", [-1, -0.5, float("nan"), "many", None, True])
@pytest.mark.parametrize(("kind", "where"), USUAL)
def test_a_weight_that_is_no_number_of_at_least_zero_is_refused(kind, where, weight):
    with pytest.raises(ConfigError, match=f"weight of {kind.__name__}: found {weight!r}"):
        build(kind, where, weight=weight)


@pytest.mark.parametrize("temperature", [0, -4.0, float("nan"), "4", None])
def test_a_temperature_that_is_no_number_above_zero_is_refused(temperature):
    networks = resnet8(10, 1, 8), resnet20(10, 1, 8)
    with pytest.raises(ConfigError, match=f"temperature of KD: found {temperature!r}"):
        KD(*networks, "logits", 1.0, temperature=temperature)


@pytest.mark.parametrize("value", [0, -4.0, float("nan"), "4", None])
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((DKD, key) for key in ("target_weight", "others_weight", "temperature", "ramp_epochs")),
        *((DIST, key) for key in ("inter_weight", "intra_weight", "temperature")),
        *((NKD, key) for key in ("target_weight", "others_weight", "temperature")),
        (WTTM, "power"),
        *((CTKD, key) for key in ("least_temperature", "temperature_span", "curriculum_epochs")),
    ],
)
def test_another_key_that_is_no_number_of_its_range_is_refused_by_name(kind, key, value):
    networks, keys = (resnet8(10, 1, 8), resnet20(10, 1, 8)), KEYS[kind] | {key: value}
    if value == 0 and key not in ("temperature", "power", "least_temperature"):
        kind(*networks, "logits", 1.0, **keys)
        return
    with pytest.raises(
        ConfigError, match=f"{key} of {kind.__name__}: found {value!r}, expected a finite number"
    ):
        kind(*networks, "logits", 1.0, **keys)


def test_dkd_is_kd_where_its_weights_are_the_teachers_own():
    """KD is the target's part, plus the others' times the teacher's probability of them (the paper's
    reformulation)."""
    distiller, keep = build(DKD, "logits"), torch.tensor(KEEPS["one"])
    f_s, f_t = features(distiller)
    label = LABELS[INDICES[keep]]
    distiller.target_weight = 1.0
    distiller.others_weight = 1 - (f_t[keep] / TEMPERATURE).softmax(1)[0, label].item()
    close(masked(distiller, f_s, f_t, keep)[0], masked(build(KD, "logits"), f_s, f_t, keep)[0])


@pytest.mark.parametrize(("width_in", "width_out"), [(6, 9), (9, 6), (7, 7)])
def test_vkds_projection_is_orthogonal_whatever_its_reflections(width_in, width_out):
    projection = OrthogonalProjection(width_in, width_out).double()
    for scale in (1, 1e3):
        torch.nn.init.normal_(projection.reflections, std=scale)
        weight = projection.weight
        assert weight.shape == (width_out, width_in)
        gram = weight.T @ weight if width_in <= width_out else weight @ weight.T
        close(gram, torch.eye(len(gram), dtype=torch.float64))


@pytest.mark.parametrize("sure", ["student", "teacher", "both"])
@pytest.mark.parametrize("kind", [DKD, NKD, WTTM])
def test_losses_of_class_probabilities_are_finite_where_a_network_is_sure(kind, sure):
    """In float32 the others' probabilities are then 0."""
    distiller = build(kind, "logits").float()
    f_s, f_t = features(distiller, dtype=torch.float32)
    certain = 1e4 * torch.nn.functional.one_hot(LABELS[INDICES], 10).float()
    f_s = (f_s if sure == "teacher" else certain).detach().requires_grad_()
    loss, gradient = masked(
        distiller, f_s, f_t if sure == "student" else certain, torch.tensor(KEEPS["some"])
    )
    assert loss.isfinite()
    assert gradient.isfinite().all()


def plain_z_scores(logits):
    rows = []
    for row in logits:
        mean = row.sum() / len(row)
        deviation = (((row - mean) ** 2).sum() / (len(row) - 1)).sqrt()
        rows.append((row - mean) / (deviation + 1e-7))
    return torch.stack(rows)


@pytest.mark.parametrize("kept", ["all", "some", "one"])
@pytest.mark.parametrize(("kind", "plain"), [(KD, plain_kd), (DKD, plain_dkd)])
def test_standardised_logits_are_compared_by_their_z_scores(kind, plain, kept):
    distiller, keep = build(kind, "logits"), torch.tensor(KEEPS[kept])
    distiller.standardise = True
    f_s, f_t = features(distiller)
    loss = distiller.spot_loss(distiller.spots[0], f_s, f_t, keep, INDICES)
    labels = {"labels": LABELS[INDICES[keep]]} if plain in LABELLED else {}
    expected = int(keep.sum()) / BATCH * plain(plain_z_scores(f_s[keep]), plain_z_scores(f_t[keep]), **labels)
    assert_same_with_gradients(loss, expected, [f_s])


@pytest.mark.parametrize("kind", [KD, DKD])
def test_a_row_of_equal_logits_has_z_scores_of_zero(kind):
    distiller = build(kind, "logits").float()
    f_s, f_t = features(distiller, dtype=torch.float32)
    equal = torch.full_like(f_s, 3.0).requires_grad_()
    zeros = torch.zeros_like(f_s, requires_grad=True)
    plain, _ = masked(distiller, zeros, plain_z_scores(f_t), torch.tensor(KEEPS["some"]))
    distiller.standardise = True
    loss, gradient = masked(distiller, equal, f_t, torch.tensor(KEEPS["some"]))
    torch.testing.assert_close(loss, plain)
    assert gradient.isfinite().all()


def test_dists_one_kept_row_leaves_the_correlation_between_classes():
    distiller, keep = build(DIST, "logits"), torch.tensor(KEEPS["one"])
    f_s, f_t = features(distiller)
    expected, _ = masked(distiller, f_s, f_t, keep)
    distiller.intra_weight = 1000.0
    assert masked(distiller, f_s, f_t, keep)[0] == expected


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (KD, "stage2"),
        (PKT, "stage2"),
        (AT, "embedding"),
        (CC, "stage2"),
        (CRD, "stage2"),
        (VID, "embedding"),
        (NST, "logits"),
        (DIST, "stage2"),
        (DKD, "embedding"),
        (NKD, "embedding"),
        (VkD, "stage2"),
    ],
)
def test_a_spot_whose_features_a_distiller_cannot_compare_is_refused_when_it_is_built(kind, where):
    with pytest.raises(ConfigError, match=where):
        build(kind, where)


@pytest.mark.parametrize(
    ("kind", "keys"), [(KD, (4.0,)), (CTKD, (1.0, 20.0, 1.0, 10)), (DIST, (1.0, 1.0, 1.0)), (WTTM, (0.5,))]
)
def test_vectors_of_other_lengths_are_refused_where_entries_are_compared(kind, keys):
    networks = resnet8(10, 1, 8), vgg8(10, 1, 8)
    message = f"where=embedding: found 64 entries in the student and 512 in the teacher .* {kind.__name__}"
    with pytest.raises(ConfigError, match=message):
        kind(*networks, "embedding", 1.0, *keys)
    kind(networks[0], networks[0], "embedding", 1.0, *keys)


def test_a_distiller_without_a_spot_is_refused_when_it_is_built():
    with pytest.raises(ConfigError, match="where"):
        build(SP, [])
