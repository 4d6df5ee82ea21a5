"""Convolutions that take along ReLU and what is added before it: the same network, in values and in gradients
to its input.

cuDNN's call is for CUDA alone (tests marked ``gpu``); here, a plain one stands in its place.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from sakd.networks import StagedNet, fused
from sakd.networks.cut import foreign
from sakd.networks.folded import cast_weights, refold
from sakd.networks.fused import FusedConv2d, fuse_activations
from sakd.networks.staged import Pooled
from sakd.spots import frozen_alias
from sakd.streams import initialising
from sakd.training import Execution, Teacher
from tests.test_folded import FAMILIES, FOREIGN, IMAGE, OTHERS, made, passed, settled

# Convolutions that are fused, and all that are folded: those of more groups than one are left as they are,
# and those with nothing behind them.
FUSED = {
    "resnet8": (7, 9),
    "vgg8": (5, 5),
    "wrn_16_1": (6, 6),
    "ShuffleNetV1": (2, 49),
    "ShuffleNetV2": (37, 56),
}


@pytest.fixture(autouse=True)
def _plain_call(monkeypatch):
    def plain(x, weight, bias, added, of):
        out = F.conv2d(x, weight, bias, *of)
        return F.relu(out if added is None else out + added)

    monkeypatch.setattr(fused, "convolution_relu", plain)


def fused_alias(network: StagedNet) -> StagedNet:
    alias = frozen_alias(network, fold=True)
    fuse_activations(alias)
    return alias


def number_of(kind: type[nn.Module], network: nn.Module) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


def assert_fused_is_the_same(network: StagedNet) -> StagedNet:
    features, gradient = passed(network)
    alias = fused_alias(network)
    assert number_of(FusedConv2d, alias) > 0
    fused_features, fused_gradient = passed(alias)
    for name, values in features.items():
        scale = float(values.abs().max())
        assert_close(fused_features[name], values, rtol=1e-10, atol=1e-10 * scale, msg=name)
    assert_close(fused_gradient, gradient, rtol=1e-8, atol=1e-10 * float(gradient.abs().max()))
    return alias


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_network_is_the_network(name):
    alias = assert_fused_is_the_same(made(name))
    assert (number_of(FusedConv2d, alias), number_of(fused.FoldedConv2d, alias)) == FUSED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FAMILIES, *OTHERS} - {*FUSED}))
def test_every_fused_network_is_the_network(name):
    assert_fused_is_the_same(made(name))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cuts"), FOREIGN.items())
def test_a_fused_foreign_network_is_the_network(name, cuts):
    with initialising(0, name):
        build = f"torchvision.models.{name}"
        network = foreign(build, {}, {"num_classes": "num_classes"}, name, cuts, 4, 3, IMAGE)
    if name == "mobilenet_v2":  # its activations are ReLU6
        assert number_of(FusedConv2d, fused_alias(settled(network))) == 0
    else:
        assert_fused_is_the_same(settled(network))


def test_a_block_takes_two_calls():
    network = made("resnet8")
    block = fused_alias(network).stage1
    called = [node.target for node in block.graph.nodes if node.op not in ("placeholder", "output")]
    assert called == ["0.conv1", "0.conv2"]


def test_a_fused_network_takes_over_weights_that_have_changed():
    network = made("resnet8")
    alias = fused_alias(network)
    with torch.no_grad():
        network.stage1[0].bn2.weight.mul_(2)
    refold(alias)
    assert_close(passed(alias)[0], passed(network)[0], rtol=1e-10, atol=1e-10)


def test_maps_are_given_in_the_weights_precision():
    """As autocast would; what is mixed at a spot is float32."""
    alias = frozen_alias(made("resnet8").float(), fold=True)
    cast_weights(alias, torch.bfloat16)
    fuse_activations(alias)
    assert alias.stage1(torch.ones(1, 16, IMAGE, IMAGE)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "execution", [Execution(fold_batch_norm=True), Execution("bf16", fold_batch_norm=True)]
)
def test_nothing_is_fused_on_a_cpu(execution):
    assert number_of(FusedConv2d, Teacher(made("resnet8").float(), execution=execution).frozen) == 0


def test_fusing_is_for_folded_networks_on_cuda_that_are_not_compiled():
    cuda = torch.device("cuda")
    assert Execution(fold_batch_norm=True, compile="graph").fuses_on(cuda)
    assert not Execution(fold_batch_norm=False).fuses_on(cuda)
    assert not Execution(fold_batch_norm=True, compile="default").fuses_on(cuda)


# ---- what is not fused


class Block(nn.Module):
    """Adds its input to its convolution, and rectifies."""

    def __init__(self, **convolution):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, **convolution), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


class UsedBeside(Block):
    def forward(self, x):
        x = self.norm(self.conv(x))
        return F.relu(x) + x


class SumUsedBeside(Block):
    def forward(self, x):
        x = x + self.norm(self.conv(x))
        return F.relu(x) + x


class Broadcast(Block):
    """Adds a map of another shape."""

    def forward(self, x):
        means = x.mean((2, 3), keepdim=True)
        return F.relu(self.norm(self.conv(x)) + means)


class WrittenBetween(Block):
    """Writes into the convolution's input before the addition."""

    def forward(self, x):
        out = self.norm(self.conv(x))
        return F.relu(out + F.relu(x, inplace=True))


class Aliased(Block):
    """Adds in place, which torch.fx traces as an addition that leaves ``same`` as it was."""

    def forward(self, x):
        same = x
        x += 1
        return F.relu(self.norm(self.conv(same)))


class Scaled(Block):
    def forward(self, x):
        return F.relu(torch.add(self.norm(self.conv(x)), x, alpha=2))


class Doubled(Block):
    """Adds the convolution to itself."""

    def forward(self, x):
        x = self.norm(self.conv(x))
        return F.relu(x + x)


class Drawing(Block):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)


LEFT_ALONE = {
    "used-beside": UsedBeside,
    "sum-used-beside": SumUsedBeside,
    "broadcast": Broadcast,
    "written-between": WrittenBetween,
    "aliased": Aliased,
    "scaled": Scaled,
    "doubled": Doubled,
    "drawing": Drawing,
    "groups": lambda: Block(groups=2),
    "padding-by-name": lambda: Block(padding="same"),
}


def staged(block: nn.Module) -> StagedNet:
    stages = {"stem": nn.Conv2d(3, 4, 1), "stage1": block, "embedding": Pooled(), "logits": nn.Linear(4, 2)}
    with initialising(0, "block"):
        return settled(StagedNet(stages, "made", (3, IMAGE, IMAGE)))


@pytest.mark.parametrize("block", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_no_convolution_with_all_that_follows_it_stays(block):
    with initialising(0, "weights"):
        network = staged(block())
    before = network.stage1
    assert number_of(FusedConv2d, fused_alias(network)) == 0
    assert network.stage1 is before


def test_the_block_from_which_those_are_made_is_fused():
    assert number_of(FusedConv2d, assert_fused_is_the_same(staged(Block()))) == 1


def test_what_cannot_be_called_stays(monkeypatch):
    """A device's library may lack the call, or have none for these shapes."""

    def failing(x, weight, bias, added, of):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(fused, "convolution_relu", failing)
    network = made("resnet8")
    alias = fused_alias(network)
    assert number_of(FusedConv2d, alias) == 0
    assert_close(passed(alias)[0], passed(network)[0], rtol=1e-10, atol=1e-10)
