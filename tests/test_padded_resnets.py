"""CIFAR's ResNets with padded shortcuts against a plain implementation, in the names of public files."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sakd import networks
from sakd.networks.checkpoints import load_weights, read_weights, shared_weights
from sakd.streams import initialising


class PlainBlock(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, width // before, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.halves = width != before

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.halves:
            zeros = torch.zeros(len(x), x.shape[1] // 2, out.shape[2], out.shape[3])
            x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
        return (out + x).relu()


class Plain(nn.Module):
    """As akamaster's pytorch_resnet_cifar10 has it."""

    def __init__(self, depth: int, classes: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (before, width) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            rest = [PlainBlock(width, width) for _ in range(blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(PlainBlock(before, width), *rest))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


@pytest.mark.parametrize("depth", [20, 32, 56])
@pytest.mark.parametrize("training", [False, True])
def test_a_padded_resnet_computes_what_a_plain_one_does_with_its_file(depth, training, tmp_path):
    with initialising(0, "plain"):
        plain = Plain(depth, 10)
        images = torch.rand(4, 3, 32, 32)
        plain(images)  # moves the running statistics
    old = {key: value for key, value in plain.state_dict().items() if "num_batches" not in key}
    path = tmp_path / "resnet.th"
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in old.items()}, "best_prec1": 93.4}, path
    )
    own = getattr(networks, f"resnet{depth}a")(10, 3, 32)
    load_weights(own, read_weights(path), f"resnet{depth}a", path)
    with torch.no_grad():
        assert_close(own.train(training)(images), plain.train(training)(images), rtol=1e-4, atol=1e-5)
    assert list(shared_weights(own)) == list(plain.state_dict())


def test_a_padded_and_a_projected_resnet_s_files_are_told_apart(tmp_path):
    path = tmp_path / "resnet20.pt"
    torch.save(networks.resnet20(10, 3, 32).state_dict(), path)
    with pytest.raises(
        networks.checkpoints.CheckpointError, match=r"is not a resnet20a; .* 12 are not its own"
    ):
        load_weights(networks.resnet20a(10, 3, 32), read_weights(path), "resnet20a", path)
