"""Every network of our own that conf/network offers: its size, its stages, how it is cut, and where its
weights come from."""

import csv
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sakd.errors import ConfigError
from sakd.networks import StagedNet, resnet8, vgg8, vgg8_imagenet
from sakd.networks.resnet import BasicBlock
from sakd.networks.wrn import PreActivationBlock
from sakd.streams import initialising

HERE = Path(__file__).parent
OFFERED = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((HERE.parent / "conf/network").glob("*.yaml"))
}
OFFERED = {name: node for name, node in OFFERED.items() if "build" not in node}  # foreign ones: test_cut.py
with (HERE / "reference_networks.csv").open() as file:
    REFERENCE = {row["network"]: row for row in csv.DictReader(file)}


# Parameters of the others, by number of classes: of RepDistiller's networks, and of torchvision's VGGs with
# batch norm; vgg8's convolutions have 3,913,728, the larger head 123,642,856.
COUNTED = {
    "ResNet101": (100, 42_697_380),
    "ResNet152": (100, 58_341_028),
    "MobileNetV2_half": (100, 812_836),
    "MobileNetV1": (1000, 4_231_976),
    "resnet20a": (10, 269_722),  # these as in the README of akamaster's pytorch_resnet_cifar10, in thousands
    "resnet32a": (10, 464_154),
    "resnet44a": (10, 658_586),
    "resnet56a": (10, 853_018),
    "resnet110a": (10, 1_727_962),
    "vgg8_imagenet": (1000, 127_556_584),
    "vgg11_imagenet": (1000, 132_868_840),
    "vgg13_imagenet": (1000, 133_053_736),
    "vgg16_imagenet": (1000, 138_365_992),
    "vgg19_imagenet": (1000, 143_678_248),
}
# These have the blocks of shallower ones, only more of them.
DEEPER = re.compile(
    r"resnet(14|(20|32|44|56|110)a?|32x4)|ResNet(34|101|152)|vgg(11|13|16|19)(_imagenet)?|wrn_(40_1|40_2|28_10)"
)
DISTINCT = [name for name in OFFERED if not DEEPER.fullmatch(name)]
LARGE = [name for name in OFFERED if name.endswith("_imagenet")]  # for images of at least 32x32


def make(
    name: str, num_classes: int = 100, in_channels: int = 3, image_size: int = 32, **others
) -> StagedNet:
    node = {key: value for key, value in OFFERED[name].items() if key != "name"} | others
    return instantiate(node, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


@pytest.fixture(scope="module", params=DISTINCT)
def network(request) -> StagedNet:
    """Of 100 classes, for 32x32 images; with running statistics that are not those of a fresh network."""
    with initialising(0, request.param):
        made = make(request.param, **({"hidden": 8, "dropout": 0.0} if request.param in LARGE else {}))
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 2)
    made.name = request.param
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def dimensions(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def test_every_offered_network_has_a_reference():
    assert set(OFFERED) - {"wrn_28_10"} <= {*REFERENCE, *COUNTED}


def test_files_are_named_as_their_networks():
    assert {file: node["name"] for file, node in OFFERED.items()} == {file: file for file in OFFERED}


@pytest.mark.parametrize("name", [name for name in OFFERED if name in REFERENCE])
def test_size_and_stage_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        network = make(name)
    reference = REFERENCE[name]
    assert parameters(network) == int(reference["parameters"])
    *stages, logits = network.shapes.values()
    assert " ".join(map(dimensions, stages)) == reference["stage_output_shapes"]
    assert logits == (100,)


@pytest.mark.parametrize("name", COUNTED)
def test_size_is_the_published_one(name):
    classes, expected = COUNTED[name]
    with torch.device("meta"):
        assert parameters(make(name, classes)) == expected


def test_stage_shapes_of_large_images():
    with torch.device("meta"):
        shapes = make("vgg8_imagenet", 1000, image_size=224).shapes
    assert " ".join(map(dimensions, shapes.values())) == (
        "64x224x224 128x112x112 256x56x56 512x28x28 512x14x14 4096 1000"
    )


def test_half_a_mobilenet_has_half_its_channels_but_in_the_embedding():
    with torch.device("meta"):
        whole, half = (make(name).shapes for name in ("MobileNetV2", "MobileNetV2_half"))
    for stage in ("stem", "stage1", "stage2", "stage3", "stage4"):
        assert half[stage] == (whole[stage][0] // 2, *whole[stage][1:])
    assert half["embedding"] == whole["embedding"] == (1280,)


def test_wrn_28_10_has_36_5_million_parameters():
    def block(
        a: int, b: int
    ) -> int:  # two batch norms, two convolutions, and a 1x1 shortcut where the width changes
        return 2 * a + 9 * a * b + 2 * b + 9 * b * b + (a * b if a != b else 0)

    widths = (16, 160, 320, 640)
    stages = sum(block(a, b) + 3 * block(b, b) for a, b in zip(widths, widths[1:]))  # noqa: B905, RUF007
    expected = 9 * 3 * 16 + stages + 2 * 640 + 640 * 100 + 100
    with torch.device("meta"):
        counted = parameters(make("wrn_28_10"))
    assert counted == expected
    assert round(counted / 1e6, 1) == 36.5


@pytest.mark.parametrize(("in_channels", "image_size"), [(3, 8), (1, 28), (1, 32), (3, 64)])
@pytest.mark.parametrize("name", DISTINCT)
def test_grey_and_colour_images_of_usual_sizes_pass(name, in_channels, image_size):
    if name in LARGE and image_size < 32:
        pytest.skip("halves its maps five times")
    with torch.device("meta"):
        network = make(name, num_classes=7, in_channels=in_channels, image_size=image_size)
        outputs = network.features(torch.empty(2, in_channels, image_size, image_size))
    assert {stage: output.shape[1:] for stage, output in outputs.items()} == network.shapes
    assert outputs["logits"].shape == (2, 7)
    assert network.classes == 7


def test_vgg_halves_large_maps_alone_before_its_last_stage():
    with torch.device("meta"):
        sizes = {size: vgg8(10, 3, size).shapes["stage4"] for size in (8, 28, 32, 64)}
    assert sizes == {8: (512, 1, 1), 28: (512, 3, 3), 32: (512, 4, 4), 64: (512, 4, 4)}


large_vgg8 = partial(vgg8_imagenet, hidden=1, dropout=0.0)


@pytest.mark.parametrize(
    ("build", "image_size"), [(vgg8, 4), (vgg8, 1), (resnet8, 0), (large_vgg8, 8), (large_vgg8, 31)]
)
def test_too_small_an_image_is_refused(build, image_size):
    with pytest.raises(ConfigError, match=rf"image_size.*\b{image_size}x{image_size}\b"):
        build(10, 3, image_size)


@pytest.mark.parametrize("training", [False, True])
def test_features_are_the_stages_in_order_and_none_is_overwritten(network, images, training):
    network.train(training)
    untouched = images.clone()
    features = network.features(images)
    expected, x = {}, images
    for name, stage in network.named_children():
        x = stage(x.clone())
        expected[name] = x.clone()

    assert list(features) == list(expected) == network.names
    assert network.names == ["stem", *network.maps, "embedding", "logits"]
    assert network.maps == [f"stage{number}" for number in range(1, len(network.maps) + 1)]
    assert_close(features, expected, rtol=0, atol=0)
    assert_close(features["logits"], network(images), rtol=0, atol=0)
    assert_close(images, untouched, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet8x4", "vgg8", "wrn_16_2"])
def test_slices_compose(name, images):
    network = make(name).eval()
    features = network.features(images)
    for number, middle in enumerate(network.names):
        assert_close(network.between(None, middle)(images), features[middle], rtol=0, atol=0)
        for end in network.names[number + 1 :]:
            assert_close(network.between(middle, end)(features[middle]), features[end], rtol=0, atol=0)


def test_a_slice_shares_its_weights():
    network = resnet8(10, 1, 8)
    assert network.between("stem", "stage2").stage2[0].conv1.weight is network.stage2[0].conv1.weight


@pytest.mark.parametrize("ends", [("stag2", "logits"), (None, "stag2")])
def test_an_unknown_stage_is_refused_with_the_near_name(ends):
    with pytest.raises(ConfigError, match=r"'stag2'.*Did you mean 'stage\d'"):
        resnet8(10, 1, 8).between(*ends)


@pytest.mark.parametrize("ends", [("stage2", "stage1"), ("stage2", "stage2"), ("logits", "stem")])
def test_stages_out_of_order_are_refused(ends):
    with pytest.raises(ConfigError, match=rf"'{ends[0]}' does not come before '{ends[1]}'"):
        resnet8(10, 1, 8).between(*ends)


def test_building_keeps_the_mode_and_the_running_statistics():
    network = resnet8(10, 1, 8)
    assert network.training
    assert all(module.training for module in network.modules())
    assert int(network.stem[1].num_batches_tracked) == 0


def test_initial_weights_are_a_function_of_seed_and_name():
    def weights(seed: int, name: str) -> Tensor:
        with initialising(seed, name):
            return nn.utils.parameters_to_vector(resnet8(10, 1, 8).parameters())

    first = weights(0, "student")
    torch.rand(5)
    assert_close(weights(0, "student"), first, rtol=0, atol=0)
    assert not torch.equal(weights(0, "teacher"), first)
    assert not torch.equal(weights(1, "student"), first)


def test_initialising_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with initialising(0, "student"):
        resnet8(10, 1, 8)
    assert_close(torch.rand(3), expected, rtol=0, atol=0)


def randomised(block: nn.Module) -> dict[str, Tensor]:
    """Put ``block`` in eval with all its values drawn anew; its state."""
    draws = torch.Generator().manual_seed(0)
    for value in block.eval().state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=draws) + 0.1)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data -= 0.6  # of both signs, so that something is left to rectify
    return block.state_dict()


def batch_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 1), (6, 2)])
def test_basic_block_arithmetic(channels, stride):
    block = BasicBlock(4, channels, stride)
    state = randomised(block)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    out = batch_norm(F.conv2d(x, state["conv1.weight"], stride=stride, padding=1), state, "bn1").clamp_min(0)
    out = batch_norm(F.conv2d(out, state["conv2.weight"], padding=1), state, "bn2")
    beside = x
    if channels != 4:
        beside = batch_norm(F.conv2d(x, state["shortcut.0.weight"], stride=stride), state, "shortcut.1")
    assert_close(block(x), (out + beside).clamp_min(0))


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 1), (6, 2)])
def test_pre_activation_block_arithmetic(channels, stride):
    block = PreActivationBlock(4, channels, stride)
    state = randomised(block)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    active = batch_norm(x, state, "bn1").clamp_min(0)
    out = batch_norm(
        F.conv2d(active, state["conv1.weight"], stride=stride, padding=1), state, "bn2"
    ).clamp_min(0)
    out = F.conv2d(out, state["conv2.weight"], padding=1)
    beside = x if channels == 4 else F.conv2d(active, state["shortcut.weight"], stride=stride)
    assert_close(block(x), out + beside)
