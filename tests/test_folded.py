"""Batch norm folded into convolutions: the same network, in values and in gradients to its input."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from sakd import networks
from sakd.configuration import build
from sakd.networks.cut import foreign
from sakd.networks.folded import FoldedConv2d, cast_weights, fold_batch_norm, foldable, refold
from sakd.networks.staged import StagedNet
from sakd.spots import frozen_alias
from sakd.streams import initialising
from sakd.training import Execution, Teacher
from tests.conftest import fit, take_step
from tests.test_execution import ready, small

IMAGE = 16
FAMILIES = ["MobileNetV2_half", "ResNet50", "ShuffleNetV1", "ShuffleNetV2", "resnet8", "vgg8", "wrn_16_1"]
NO_NETWORKS = {"Shape", "StagedNet", "foreign", "with_head_of"}  # foreign ones are tested below
OTHERS = sorted(
    {name for name in networks.__all__ if not name.endswith("_imagenet")} - {*FAMILIES, *NO_NETWORKS}
)


def settled(network: nn.Module) -> nn.Module:
    """In float64, with scales, shifts and statistics that are not those of a fresh network."""
    with initialising(0, "settled"), torch.no_grad():
        for module in network.double().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def made(name: str) -> StagedNet:
    with initialising(0, name):
        return settled(getattr(networks, name)(4, 3, IMAGE))


def passed(network: StagedNet) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every stage's output, and the gradient of their squares to the images."""
    images = (
        torch.linspace(-2, 2, 3 * 3 * IMAGE**2, dtype=torch.float64)
        .sin()
        .reshape(3, 3, IMAGE, IMAGE)
        .requires_grad_()
    )
    features = network.features(images)
    (gradient,) = torch.autograd.grad(sum(f.square().mean() for f in features.values()), images)
    return {name: f.detach() for name, f in features.items()}, gradient


def assert_folded_is_the_same(network: StagedNet) -> None:
    features, gradient = passed(network)
    folded = frozen_alias(network, fold=True)
    assert any(isinstance(module, FoldedConv2d) for module in folded.modules())
    folded_features, folded_gradient = passed(folded)
    assert list(folded_features) == list(features)
    for name, values in features.items():
        scale = float(values.abs().max())
        assert_close(folded_features[name], values, rtol=1e-10, atol=1e-10 * scale, msg=name)
    assert_close(folded_gradient, gradient, rtol=1e-8, atol=1e-10 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_network_is_the_network(name):
    assert_folded_is_the_same(made(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_folded_network_is_the_network(name):
    assert_folded_is_the_same(made(name))


FOREIGN = {  # torchvision's, and where they are cut
    "resnet18": {"stem": "maxpool", "stage1": "layer2", "stage2": "layer4", "embedding": "flatten"},
    "mobilenet_v2": {
        "stem": "features.0",
        "stage1": "features.6",
        "stage2": "features.18",
        "embedding": "flatten",
    },
}


@pytest.mark.parametrize(("name", "cuts"), FOREIGN.items())
def test_a_folded_foreign_network_is_the_network(name, cuts):
    with initialising(0, name):
        network = foreign(
            f"torchvision.models.{name}", {}, {"num_classes": "num_classes"}, name, cuts, 4, 3, IMAGE
        )
    assert_folded_is_the_same(settled(network))


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet8", 0),
        ("vgg8", 0),
        ("MobileNetV2_half", 0),
        ("ShuffleNetV1", 0),
        ("ShuffleNetV2", 0),
        ("wrn_16_1", 7),
    ],
)
def test_every_batch_norm_behind_a_convolution_is_folded(name, left):
    """WRN's blocks, and its last map, begin with one that follows an addition."""
    folded = frozen_alias(made(name), fold=True)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left


# ---- what is not folded


class Branching(nn.Module):
    """Uses the convolution's output beside its batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


class Repeating(Branching):
    """Calls both twice."""

    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


class Deciding(Branching):
    """Cannot be traced."""

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) if x.sum() > -1e9 else x


class Twice(Branching):
    """Has the convolution under two names, and calls it by the second."""

    def __init__(self):
        super().__init__()
        self.again = self.conv

    def forward(self, x):
        return self.norm(self.again(x))


LEFT_ALONE = {
    "used-beside": Branching,
    "called-twice": Repeating,
    "not-traced": Deciding,
    "two-names": Twice,
    "no-scale": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)),
    "no-statistics": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    "other-padding": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(3)
    ),
    "something-between": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
}


@pytest.mark.parametrize("stage", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_no_convolution_and_its_own_batch_norm_stays(stage):
    torch.manual_seed(0)
    stage = stage().double().eval()
    network = nn.Sequential(stage)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = network(x)
    assert foldable(stage) == []
    fold_batch_norm(network)
    assert torch.equal(network(x), expected)


def test_nothing_is_folded_across_stages():
    """A stage's output, which a distiller sees, would be another."""
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.BatchNorm2d(3))).eval()
    fold_batch_norm(network)
    assert isinstance(network[0][0], nn.Conv2d)
    assert isinstance(network[1][0], nn.BatchNorm2d)


def test_folding_leaves_the_network_itself_alone():
    network = made("resnet8")
    before = deepcopy(network)
    frozen_alias(network, fold=True)
    assert str(network) == str(before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), before.state_dict().values(), strict=True)
    )


class Drawing(Branching):
    """Draws in its forward."""

    def forward(self, x):
        return self.norm(self.conv(x)) + torch.rand(1)


def test_looking_for_what_can_be_folded_moves_no_random_stream():
    stage, before = Drawing(), torch.get_rng_state()
    foldable(stage)
    assert torch.equal(torch.get_rng_state(), before)


# ---- weights that change


def test_refolding_takes_over_weights_and_statistics_that_have_changed():
    network = made("resnet8")
    alias = frozen_alias(network, fold=True)
    places = [module.weight.data_ptr() for module in alias.modules() if isinstance(module, FoldedConv2d)]
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.1)
    expected, _ = passed(network)
    assert not torch.allclose(passed(alias)[0]["logits"], expected["logits"])
    refold(alias)
    assert_close(passed(alias)[0], expected, rtol=1e-10, atol=1e-10)
    assert places == [
        module.weight.data_ptr() for module in alias.modules() if isinstance(module, FoldedConv2d)
    ]


def test_the_routed_student_is_the_student_of_this_step(tiny):
    """Its folded weights are renewed after the student's pass has moved the statistics, before its weights
    move."""
    trainer, batches = ready(small(tiny, "at"))
    seen = []

    def compare(grafts: nn.Module, arguments: tuple) -> None:
        routed, _, images, *_ = arguments
        seen.append((routed(images), deepcopy(trainer.student).eval()(images)))

    trainer.spot_mode.grafts.register_forward_pre_hook(compare)
    for batch in batches[:2]:
        take_step(trainer, *batch)
    assert len(seen) == 2
    for folded, plain in seen:
        assert_close(folded, plain, rtol=1e-4, atol=1e-4)


def test_a_teacher_loaded_after_the_trainer_was_built_is_the_one_that_teaches(tiny):
    config = small(tiny, "at")
    dataset, parts = build.dataset(config), build.parts(config)
    trainer = build.trainer(config, parts, torch.device("cpu"))
    with torch.no_grad():
        for value in trainer.teacher.network.parameters():
            value.mul_(1.1)
    fit(trainer, dataset, 1, 16)
    images = trainer.execution.arrange(torch.ones(1, *trainer.teacher.network.input_shape))
    assert_close(trainer.teacher.frozen(images), trainer.teacher.network(images), rtol=1e-3, atol=0)


# ---- weights kept in a lower precision


class Casts(TorchDispatchMode):
    """Counts tensors that are made of others in another precision."""

    number = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keys=None):
        self.number += operation is torch.ops.aten._to_copy.default
        return operation(*arguments, **(keys or {}))


def in_bfloat16(network: StagedNet) -> tuple[list[torch.Tensor], int]:
    """All that a pass forwards and backwards gives, and how many casts its forward takes."""
    images = torch.linspace(-2, 2, 3 * 3 * IMAGE**2).sin().reshape(3, 3, IMAGE, IMAGE).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Casts() as casts:
        features = network.features(images)
    (gradient,) = torch.autograd.grad(sum(f.float().square().mean() for f in features.values()), images)
    return [*features.values(), gradient], casts.number


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "as-it-is"])
@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_weights_that_are_cast_once_are_those_that_autocast_makes_in_each_pass(name, fold):
    """Bit for bit, also of weights that have changed, once they are taken over."""
    network = made(name).float().requires_grad_(False)
    cast, plain = frozen_alias(network, fold), frozen_alias(network, fold)
    cast_weights(cast, torch.bfloat16)
    for change in (1.0, 1.1):
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.mul_(change)
        for alias in (cast, plain):
            refold(alias)
        (found, casts), (expected, casts_of_autocast) = in_bfloat16(cast), in_bfloat16(plain)
        assert all(map(torch.equal, found, expected))
        assert casts == 1  # the images
        assert casts_of_autocast > 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_s_weights_are_kept_in_the_precision_of_its_passes(precision):
    network = made("resnet8").float()
    teacher = Teacher(network, execution=Execution(precision, fold_batch_norm=True))
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert teacher.frozen.logits.weight.dtype == teacher.frozen.stage1[0].conv1.weight.dtype == kind
    assert network.logits.weight.dtype == torch.float32


# ---- a step


@pytest.mark.parametrize("distiller", ["at", "fitnet", "pkt"])
def test_folding_changes_a_step_by_rounding_alone(distiller, tiny):
    measured = {}
    for fold in ("true", "false"):
        trainer, batches = ready(small(tiny, distiller, f"fold_batch_norm={fold}"))
        assert trainer.execution == Execution("fp32", "auto", "auto", fold == "true")
        kinds = {
            type(module)
            for network in (trainer.teacher.frozen, trainer.routed_student)
            for module in network.modules()
        }
        assert (FoldedConv2d in kinds) == (fold == "true")
        measured[fold] = take_step(trainer, *batches[0])
    for name, value in measured["true"].items():
        assert_close(value, measured["false"][name], rtol=1e-3, atol=1e-5, msg=name)
