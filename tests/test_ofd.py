"""OFD against the margin and the partial distance written out in plain steps, with a mask of its own at every
spot; and the features before an activation that it takes."""

from math import erf, exp, pi, sqrt

import pytest
import torch
from torch.nn import functional as F

from sakd.distillers import OFD
from sakd.distillers.ofd import margins
from sakd.errors import ConfigError
from sakd.networks import MobileNetV2_half, ShuffleNetV1, StagedNet, resnet8, resnet8x4, vgg8, wrn_16_1
from sakd.networks.activations import BeforeActivation
from tests.test_distillers import BATCH, INDICES, KEEPS, close, pooled
from tests.test_reviewkd import normalised, pointwise

PAIRS = {"wider-teacher": (resnet8, resnet8x4), "smaller-teacher-maps": (resnet8, vgg8)}


def shaken(network: StagedNet) -> StagedNet:
    """A teacher in float64 whose batch norms are all different."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(tensor)
    return network.double().requires_grad_(False).eval()


def build(pair="wider-teacher"):
    torch.manual_seed(0)
    student, teacher = (network(10, 1, 8) for network in PAIRS[pair])
    distiller = OFD(student, shaken(teacher), "stages", 2.5).double()
    for parameter in distiller.parameters():
        torch.nn.init.normal_(parameter)
    images = torch.randn(BATCH, 1, 8, 8, dtype=torch.float64)
    taken = {stage: f.detach().requires_grad_() for stage, f in student.double().features(images).items()}
    keep = {spot: torch.tensor(KEEPS["some"]).roll(i) for i, spot in enumerate(distiller.spots)}
    return distiller, teacher, (taken, teacher.features(images), keep, INDICES)


def plain_margin(norm):
    found = []
    for deviation, mean in zip(norm.weight.abs().tolist(), norm.bias.tolist(), strict=True):
        share = (1 + erf(-mean / deviation / sqrt(2))) / 2
        density = exp(-((mean / deviation) ** 2) / 2) / sqrt(2 * pi)
        found.append(mean - deviation * density / share if share > 1e-3 else -3 * deviation)
    return torch.tensor(found, dtype=torch.float64)


def before_the_last_relu(teacher, stage, x):
    """Of a ResNet or a VGG, with the batch norm that comes before."""
    if teacher.family == "vgg":
        *layers, _ = teacher.get_submodule(stage)
        return torch.nn.Sequential(*layers)(x), layers[-1]
    *blocks, last = teacher.get_submodule(stage)
    x = torch.nn.Sequential(*blocks)(x)
    out = last.bn2(last.conv2(last.bn1(last.conv1(x)).relu()))
    return out + (x if last.shortcut is None else last.shortcut(x)), last.bn2


def plain_ofd(distiller, teacher, f_s, f_t, keep):
    total = 0
    for place, spot in enumerate(distiller.spots):
        before = teacher.names[teacher.index(spot.teacher) - 1]
        target, norm = before_the_last_relu(teacher, spot.teacher, f_t[before])
        convolution, own_norm = distiller.connectors[spot.name]
        student = normalised(pointwise(f_s[spot.student], convolution), own_norm)
        if target.shape[-1] > student.shape[-1]:
            _, target = pooled(student, target)
        elif target.shape[-1] < student.shape[-1]:
            target = F.interpolate(target, student.shape[-2:])
        target = torch.maximum(target, plain_margin(norm)[:, None, None])
        errors = (student - target) ** 2
        errors = errors * ((student > target) | (target > 0))
        share = 0.5 ** (len(distiller.spots) - 1 - place)
        total = total + share * errors.sum((1, 2, 3))[keep[spot]].sum()
    return 2.5 * total / BATCH


@pytest.mark.parametrize("pair", PAIRS)
def test_each_spots_term_is_the_kept_share_of_the_published_distance_of_its_kept_rows(pair):
    distiller, teacher, batch = build(pair)
    loss, expected = distiller(*batch), plain_ofd(distiller, teacher, *batch[:3])
    close(loss, expected)
    learned = [*(batch[0][spot.student] for spot in distiller.spots), *distiller.parameters()]
    close(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned))


def test_without_kept_rows_loss_and_gradients_are_exactly_zero():
    distiller, _, (f_s, f_t, keep, indices) = build()
    loss = distiller(f_s, f_t, {spot: torch.zeros_like(rows) for spot, rows in keep.items()}, indices)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, [f_s["stage2"], *distiller.parameters()]))


def test_features_of_zero_and_norms_of_zero_give_finite_losses_and_gradients():
    distiller, teacher, (f_s, f_t, keep, indices) = build()
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    f_s = {stage: torch.zeros_like(x, requires_grad=True) for stage, x in f_s.items()}
    loss = distiller(f_s, {stage: torch.zeros_like(x) for stage, x in f_t.items()}, keep, indices)
    assert loss.isfinite()
    learned = [f_s["stage2"], *distiller.parameters()]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, learned))


def test_a_margin_is_the_mean_of_what_is_negative_behind_the_batch_norm():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 1.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -0.5, 9.0]))  # the last is hardly ever below 0
    values = norm(torch.randn(200_000, 4, 1, 1, dtype=torch.float64))[..., 0, 0]
    means = torch.stack([channel[channel < 0].mean() for channel in values[:, :3].unbind(1)])
    torch.testing.assert_close(margins(norm)[:3], means.detach(), rtol=0.02, atol=0)
    assert margins(norm)[3] == -3


@pytest.mark.parametrize("network", [resnet8, vgg8, ShuffleNetV1, wrn_16_1, MobileNetV2_half])
def test_what_comes_before_the_activation_gives_the_stages_output(network):
    """Rectified, it is the output; of stages that end in no ReLU it is the output, or what the next stage's
    batch norm makes of it."""
    torch.manual_seed(0)
    teacher = shaken(network(10, 3, 16))
    seen = teacher.features(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    for stage in teacher.maps:
        cut = BeforeActivation(teacher, stage)
        found = cut(seen[cut.before])
        if network is wrn_16_1:
            assert torch.equal(found, cut.norm(seen[stage]))
        else:
            assert torch.equal(found if network is MobileNetV2_half else found.relu(), seen[stage])
        assert (found < 0).any()


def test_it_owns_no_weights_of_the_teacher():
    distiller, _, _ = build()
    assert all(name.startswith("connectors.") for name in distiller.state_dict())


def test_a_stage_without_another_before_it_is_refused():
    networks = resnet8(10, 3, 16), vgg8(10, 3, 16)
    with pytest.raises(ConfigError, match="found stem, the first stage, expected one with another before it"):
        OFD(*networks, "stem", 1.0)


def test_a_teacher_without_batch_norm_before_an_activation_is_refused():
    stages = {
        "stem": torch.nn.Conv2d(1, 4, 3, padding=1),
        "stage1": torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU()),
        "embedding": torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
        "logits": torch.nn.Linear(4, 10),
    }
    teacher = StagedNet(stages, "plain", (1, 8, 8))
    with pytest.raises(ConfigError, match="no batch norm before the activation of stage1 of a plain network"):
        OFD(resnet8(10, 1, 8), teacher, "stage1", 1.0)
