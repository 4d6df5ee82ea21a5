"""Distillers that see what networks make of their last maps: class activation maps, logits of regions."""

import pytest
import torch

from sakd.distillers import CATKD, SDD, Classifier
from sakd.errors import ConfigError
from sakd.networks import MobileNetV2_half, foreign, resnet8, resnet8x4, vgg8_imagenet, wrn_16_1
from tests.test_distillers import BATCH, INDICES, KEEPS, LABELS, close

# Student and teacher. With 16x16 images a ResNet's last map is 4x4, MobileNetV2's 1x1, and behind WRN's and
# MobileNetV2's there are layers with batch norm before it is pooled.
PAIRS = {"plain": (resnet8, resnet8x4), "layers-before-pooling": (wrn_16_1, MobileNetV2_half)}
KINDS = {
    CATKD: ("last_stage", {"size": 2, "normalised": True}),
    SDD: ("logits", {"temperature": 4.0, "sizes": [1, 2], "complementary_weight": 3.0}),
}


def built(pair="plain", kind=CATKD, where=None, **keys):
    """A distiller with the networks that it is for, in float64, as a trainer has them."""
    torch.manual_seed(0)
    student, teacher = (network(10, 3, 16).double() for network in PAIRS[pair])
    teacher.requires_grad_(False).eval()
    for network in (student, teacher):
        torch.nn.init.normal_(network.logits.weight)
        torch.nn.init.normal_(network.logits.bias)
    usual, own = KINDS[kind]
    distiller = kind(student.train(), teacher, where or usual, 2.5, **(own | keys))
    distiller.prepare(LABELS, 10, torch.Generator())
    return student, teacher, distiller


def features(student, teacher):
    """Of one batch, by stage: gradients go back to the student's features."""
    images = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
    taken = {stage: f.detach().requires_grad_() for stage, f in student.features(images).items()}
    return taken, teacher.features(images)


def pooled_map(network, last_map):
    """What the layers before pooling give of a last map, in the network's mode."""
    layers = list(network.embedding)[:-2]
    for layer in layers:
        if isinstance(layer, torch.nn.BatchNorm2d):
            mean, variance = layer.running_mean[:, None, None], layer.running_var[:, None, None]
            if layer.training:
                mean = last_map.mean((0, 2, 3), keepdim=True)
                variance = ((last_map - mean) ** 2).mean((0, 2, 3), keepdim=True)
            scale = layer.weight[:, None, None] / (variance + 1e-5).sqrt()
            last_map = (last_map - mean) * scale + layer.bias[:, None, None]
        else:
            last_map = last_map.relu() if isinstance(layer, torch.nn.ReLU) else layer(last_map)
    return last_map


def regions(maps, size):
    """Means of size x size blocks, sample by sample and block by block: [B][size * size] vectors."""
    side = max(maps.shape[-1] // size, 1)
    starts = [min(i * side, maps.shape[-1] - side) for i in range(size)]
    return [[m[:, i : i + side, j : j + side].mean((1, 2)) for i in starts for j in starts] for m in maps]


def plain_catkd(student, teacher, f_s, f_t, rows, labels):
    losses = []
    sides = ((student, f_s), (teacher, f_t))
    maps = [regions(pooled_map(network, f[network.maps[-1]]), 2) for network, f in sides]
    for row in range(BATCH):
        for c in range(10):
            own = []
            for of_samples, network in zip(maps, (student, teacher), strict=True):
                activations = torch.stack([network.logits.weight[c] @ vector for vector in of_samples[row]])
                own.append(activations / (activations**2).sum().sqrt())
            losses.append(rows[row] * ((own[0] - own[1]) ** 2).mean())
    return 2.5 * sum(losses) / (BATCH * 10)


def plain_sdd(student, teacher, f_s, f_t, rows, labels):
    total, count = 0, 0
    maps = [pooled_map(n, f[n.maps[-1]]) for n, f in ((student, f_s), (teacher, f_t))]
    for size in (1, 2):
        of_student, of_teacher = (regions(m, size) for m in maps)
        count += size**2
        for row, label in enumerate(labels):
            right = teacher.logits(maps[1][row].mean((1, 2))).argmax() == label
            for v_s, v_t in zip(of_student[row], of_teacher[row], strict=True):
                z_s = student.logits.weight @ v_s + student.logits.bias
                z_t = teacher.logits.weight @ v_t + teacher.logits.bias
                p_s, p_t = (torch.softmax(z / 4, dim=0) for z in (z_s, z_t))
                counts = 1 if (z_t.argmax() == label) == right else 3
                total = total + rows[row] * counts * 16 * (p_t * (p_t / p_s).log()).sum()
    return 2.5 * total / (BATCH * count)


@pytest.mark.parametrize(
    ("pair", "kept"),
    [*(("plain", kept) for kept in ("all", "some", "one")), ("layers-before-pooling", "some")],
)
@pytest.mark.parametrize(("kind", "plain"), [(CATKD, plain_catkd), (SDD, plain_sdd)])
def test_the_loss_is_the_kept_share_of_the_published_one_of_the_kept_rows(kind, plain, pair, kept):
    student, teacher, distiller = built(pair, kind)
    f_s, f_t = features(student, teacher)
    rows = torch.tensor(KEEPS[kept])
    # The teacher is right of some images, of which it is wrong in some regions.
    labels = torch.where(torch.arange(BATCH) % 3 < 2, f_t["logits"].argmax(1), LABELS[INDICES])
    distiller.labels = LABELS.scatter(0, INDICES, labels)
    loss = distiller(f_s, f_t, {distiller.spots[0]: rows}, INDICES)
    expected = plain(student, teacher, f_s, f_t, rows, labels)
    close(loss, expected)
    learned = [f_s[student.maps[-1]], student.logits.weight, *student.embedding.parameters()]
    close(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned))


@pytest.mark.parametrize("kind", KINDS)
def test_without_kept_rows_loss_and_gradients_are_exactly_zero(kind):
    student, teacher, distiller = built(kind=kind)
    f_s, f_t = features(student, teacher)
    loss = distiller(f_s, f_t, {distiller.spots[0]: torch.tensor(KEEPS["none"])}, INDICES)
    assert loss == 0
    learned = [f_s[student.maps[-1]], student.logits.weight]
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, learned))


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_zero_give_finite_losses_and_gradients(kind):
    student, teacher, distiller = built(kind=kind)
    f_s, f_t = features(student, teacher)
    f_s = {stage: torch.zeros_like(x, requires_grad=True) for stage, x in f_s.items()}
    f_t = {stage: torch.zeros_like(x) for stage, x in f_t.items()}
    loss = distiller(f_s, f_t, {distiller.spots[0]: torch.tensor(KEEPS["some"])}, INDICES)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [f_s["stage3"], student.logits.weight]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_distiller_reads_networks_without_owning_or_changing_them(kind):
    student, teacher, distiller = built("layers-before-pooling", kind)
    f_s, f_t = features(student, teacher)
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    distiller(f_s, f_t, {distiller.spots[0]: torch.tensor(KEEPS["all"])}, INDICES).backward()
    assert list(distiller.parameters()) == []
    assert distiller.state_dict() == {}
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())
    assert student.logits.weight.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_pooled_maps_logits_are_the_networks_own(training):
    torch.manual_seed(0)
    for build in (resnet8, wrn_16_1, MobileNetV2_half):
        network = build(10, 3, 16).double().train(training)
        seen = network.features(torch.randn(BATCH, 3, 16, 16, dtype=torch.float64))
        classifier = Classifier(network, "student")
        close(classifier.logits(classifier.map(seen[network.maps[-1]]).mean((2, 3))), seen["logits"])


@pytest.mark.slow
def test_a_network_of_another_package_that_pools_by_the_mean_has_a_classifier():
    pytest.importorskip("torchvision")
    cuts = {"stem": "maxpool", **{f"stage{i}": f"layer{i}" for i in (1, 2, 3, 4)}, "embedding": "flatten"}
    network = foreign(
        "torchvision.models.resnet18", {}, {"num_classes": "num_classes"}, "resnet", cuts, 10, 3, 32
    )
    seen = network.eval().features(torch.randn(2, 3, 64, 64))
    classifier = Classifier(network, "teacher")
    logits = classifier.logits(classifier.map(seen["stage4"]).mean((2, 3)))
    torch.testing.assert_close(logits, seen["logits"])


def test_a_network_that_does_not_pool_by_the_mean_is_refused():
    network = vgg8_imagenet(10, 3, 32, hidden=8, dropout=0.5)
    with pytest.raises(ConfigError, match="whose embedding is not the mean of a map"):
        CATKD(resnet8(10, 3, 32), network, "last_stage", 1.0, 2, True)


@pytest.mark.parametrize(
    ("kind", "keys", "told"),
    [
        (CATKD, {"size": 0}, "size of CATKD: found 0, expected a"),
        (CATKD, {"where": "stage2"}, "where=stage2: found stage2, CATKD takes the last stage alone"),
        (SDD, {"temperature": 0}, "temperature of SDD: found 0, expected a"),
        (SDD, {"sizes": [1, 2.5]}, "sizes of SDD: found 2.5, expected a"),
        (SDD, {"where": "embedding"}, "where=embedding: found embedding, SDD takes the logits alone"),
    ],
)
def test_a_key_out_of_its_range_is_refused_by_name(kind, keys, told):
    with pytest.raises(ConfigError, match=told):
        built(kind=kind, **keys)
