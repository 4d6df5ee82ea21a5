"""Checkpoints in the names that the field shares: read into every network, written from every network, as
others' tools do.

``shared_state_dicts.json`` has names and shapes of RepDistiller's networks of 100 classes for 32x32 colour
images. What the weights of those names compute is written out plainly below, stage by stage.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sakd import networks
from sakd.cli import main as cli
from sakd.errors import CheckpointError
from sakd.networks import StagedNet, resnet8, vgg8_imagenet
from sakd.networks.checkpoints import load_weights, read_weights, shared_weights
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.streams import initialising
from sakd.trained import cost

SHARED = json.loads((Path(__file__).parent / "shared_state_dicts.json").read_text())

Weights = dict[str, Tensor]


def randomised(network: StagedNet) -> StagedNet:
    """In eval, with other batch norms than a fresh network's."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, mean in (
                (module.running_mean, 0),
                (module.running_var, 1),
                (module.weight, 1),
                (module.bias, 0),
            ):
                nn.init.trunc_normal_(values, mean, 0.2, mean - 0.5, mean + 0.5)
            module.num_batches_tracked += 7
    return network.eval()


def make(name: str, seed: int = 0, num_classes: int = 100) -> StagedNet:
    with initialising(seed, name):
        return randomised(getattr(networks, name)(num_classes, 3, 16))


class Plain:
    """Layers by the shared names of their weights."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def __contains__(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.weights)

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(
            x, weight, self.weights.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups
        )

    def norm(self, x: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self.weights[f"{name}.{key}"][:, None, None] for key in keys)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def rectified(self, x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        return self.norm(self.conv(x, conv, stride), norm).clamp_min(0)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def blocks(
        self, x: Tensor, stage: str, block: Callable[[Tensor, str, int], Tensor], stride: int
    ) -> Tensor:
        """``stage``'s blocks 0, 1, … in order; the first has the stride."""
        number = 0
        while f"{stage}.{number}" in self:
            x = block(x, f"{stage}.{number}", stride if number == 0 else 1)
            number += 1
        return x


def residual(plain: Plain, x: Tensor) -> list[Tensor]:
    def block(x: Tensor, name: str, stride: int) -> Tensor:
        beside = x
        for shortcut in ("downsample", "shortcut"):
            if f"{name}.{shortcut}" in plain:
                beside = plain.norm(plain.conv(x, f"{name}.{shortcut}.0", stride), f"{name}.{shortcut}.1")
        if f"{name}.conv3" not in plain:
            out = plain.rectified(x, f"{name}.conv1", f"{name}.bn1", stride)
            out = plain.norm(plain.conv(out, f"{name}.conv2"), f"{name}.bn2")
        else:
            out = plain.rectified(x, f"{name}.conv1", f"{name}.bn1")
            out = plain.rectified(out, f"{name}.conv2", f"{name}.bn2", stride)
            out = plain.norm(plain.conv(out, f"{name}.conv3"), f"{name}.bn3")
        return (out + beside).clamp_min(0)

    outputs = [plain.rectified(x, "conv1", "bn1")]
    for number in range(1, 5):
        if f"layer{number}" in plain:
            outputs.append(plain.blocks(outputs[-1], f"layer{number}", block, 1 if number == 1 else 2))
    embedding = outputs[-1].mean((2, 3))
    return [*outputs, embedding, plain.linear(embedding, "fc" if "fc" in plain else "linear")]


def wide_residual(plain: Plain, x: Tensor) -> list[Tensor]:
    def block(x: Tensor, name: str, stride: int) -> Tensor:
        active = plain.norm(x, f"{name}.bn1").clamp_min(0)
        out = plain.conv(active, f"{name}.conv1", stride)
        out = plain.conv(plain.norm(out, f"{name}.bn2").clamp_min(0), f"{name}.conv2")
        return out + (
            plain.conv(active, f"{name}.convShortcut", stride) if f"{name}.convShortcut" in plain else x
        )

    outputs = [plain.conv(x, "conv1")]
    for number in (1, 2, 3):
        outputs.append(plain.blocks(outputs[-1], f"block{number}.layer", block, 1 if number == 1 else 2))
    embedding = plain.norm(outputs[-1], "bn1").clamp_min(0).mean((2, 3))
    return [*outputs, embedding, plain.linear(embedding, "fc")]


def vgg(plain: Plain, x: Tensor) -> list[Tensor]:
    outputs = []
    for number in range(5):
        for layer in range(0, 12, 3):
            if f"block{number}.{layer}" in plain:
                x = plain.rectified(x, f"block{number}.{layer}", f"block{number}.{layer + 1}")
        outputs.append(x)
        x = F.max_pool2d(x, 2) if number < 3 else x
    embedding = x.mean((2, 3))
    return [*outputs, embedding, plain.linear(embedding, "classifier")]


def mobile(plain: Plain, x: Tensor) -> list[Tensor]:
    def block(x: Tensor, name: str, stride: int) -> Tensor:
        out = plain.rectified(x, f"{name}.conv.0", f"{name}.conv.1")
        out = plain.rectified(out, f"{name}.conv.3", f"{name}.conv.4", stride)
        out = plain.norm(plain.conv(out, f"{name}.conv.6"), f"{name}.conv.7")
        return x + out if out.shape == x.shape else out

    outputs = [plain.rectified(x, "conv1.0", "conv1.1", 2)]
    for number, stride in enumerate((1, 1, 2, 2, 1, 2, 1)):
        outputs.append(plain.blocks(outputs[-1], f"blocks.{number}", block, stride))
    embedding = plain.rectified(outputs[-1], "conv2.0", "conv2.1").mean((2, 3))
    stages = [outputs[place] for place in (0, 2, 3, 5, 7)]
    return [*stages, embedding, plain.linear(embedding, "classifier.0")]


def dealt(x: Tensor, groups: int) -> Tensor:
    """Channel i of the result is channel i // groups of group i % groups."""
    size = x.shape[1] // groups
    return x[:, [i % groups * size + i // groups for i in range(x.shape[1])]]


def shuffle_v1(plain: Plain, x: Tensor) -> list[Tensor]:
    def block(x: Tensor, name: str, stride: int) -> Tensor:
        out = plain.rectified(x, f"{name}.conv1", f"{name}.bn1")
        out = dealt(out, 1 if x.shape[1] == 24 else 3)
        out = plain.rectified(out, f"{name}.conv2", f"{name}.bn2", stride)
        out = plain.norm(plain.conv(out, f"{name}.conv3"), f"{name}.bn3")
        beside = F.avg_pool2d(x, 3, stride=2, padding=1) if stride == 2 else x
        return (torch.cat([out, beside], 1) if stride == 2 else out + beside).clamp_min(0)

    outputs = [plain.rectified(x, "conv1", "bn1")]
    for number in (1, 2, 3):
        outputs.append(plain.blocks(outputs[-1], f"layer{number}", block, 2))
    embedding = outputs[-1].mean((2, 3))
    return [*outputs, embedding, plain.linear(embedding, "linear")]


def shuffle_v2(plain: Plain, x: Tensor) -> list[Tensor]:
    def block(x: Tensor, name: str, stride: int) -> Tensor:
        if stride == 1:
            half = x.shape[1] // 2
            left, right = x[:, :half], plain.rectified(x[:, half:], f"{name}.conv1", f"{name}.bn1")
            right = plain.norm(plain.conv(right, f"{name}.conv2"), f"{name}.bn2")
            right = plain.rectified(right, f"{name}.conv3", f"{name}.bn3")
        else:
            left = plain.norm(plain.conv(x, f"{name}.conv1", 2), f"{name}.bn1")
            left = plain.rectified(left, f"{name}.conv2", f"{name}.bn2")
            right = plain.rectified(x, f"{name}.conv3", f"{name}.bn3")
            right = plain.norm(plain.conv(right, f"{name}.conv4", 2), f"{name}.bn4")
            right = plain.rectified(right, f"{name}.conv5", f"{name}.bn5")
        return dealt(torch.cat([left, right], 1), 2)

    outputs = [plain.rectified(x, "conv1", "bn1")]
    for number in (1, 2, 3):
        outputs.append(plain.blocks(outputs[-1], f"layer{number}", block, 2))
    embedding = plain.rectified(outputs[-1], "conv2", "bn2").mean((2, 3))
    return [*outputs, embedding, plain.linear(embedding, "linear")]


FORMULAS = {
    "resnet": residual,
    "resnet_x4": residual,
    "ResNet": residual,
    "wrn": wide_residual,
    "vgg": vgg,
    "mobilenetv2": mobile,
    "shufflenetv1": shuffle_v1,
    "shufflenetv2": shuffle_v2,
}


# Every network that the field shares


@pytest.mark.parametrize("name", SHARED)
def test_shared_weights_go_in_and_out_without_loss_and_compute_what_they_should(name, tmp_path):
    path = tmp_path / "ckpt_epoch_240.pth"
    network = make(name)
    written = {key: value.clone() for key, value in shared_weights(network).items()}
    torch.save({"epoch": 240, "model": written}, path)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = network.features(images)
        expected = FORMULAS[network.family](Plain(written), images)
        for value in network.state_dict().values():
            value.zero_()
        load_weights(network, read_weights(path), name, path)
        after = network.features(images)

    assert {key: list(value.shape) for key, value in written.items()} == SHARED[name]
    assert_close(shared_weights(network), written, rtol=0, atol=0)
    assert_close(after, before, rtol=0, atol=0)
    for stage, output in zip(after.values(), expected, strict=True):
        assert_close(stage, output, rtol=0, atol=2e-5 * float(output.abs().max()))


def test_a_vgg_for_large_images_computes_what_its_weights_names_say():
    network = randomised(vgg8_imagenet(10, 3, 64, hidden=8, dropout=0.5))
    plain = Plain(shared_weights(network))
    x = images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = []
        for number in range(5):
            x = plain.rectified(x, f"block{number}.0", f"block{number}.1")
            expected.append(x)
            x = F.max_pool2d(x, 2)
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)
        expected.append(
            plain.linear(plain.linear(x, "classifier.0").clamp_min(0), "classifier.3").clamp_min(0)
        )
        expected.append(plain.linear(expected[-1], "classifier.6"))
        for stage, output in zip(network.features(images).values(), expected, strict=True):
            assert_close(stage, output, rtol=0, atol=2e-5 * float(output.abs().max()))


# Files as others write them


def saved(path: Path, weights: Weights, **beside: object) -> Path:
    torch.save({"epoch": 240, "model": weights, **beside}, path)
    return path


@pytest.fixture
def shared() -> Weights:
    return shared_weights(make("resnet8", num_classes=10))


def assert_loads(path: Path, expected: Weights):
    network = make("resnet8", seed=1, num_classes=10)
    load_weights(network, read_weights(path), "resnet8", path)
    assert_close(shared_weights(network), expected, rtol=0, atol=0)


def test_a_file_with_a_training_script_s_options_and_optimizer_loads(tmp_path, shared):
    options = argparse.Namespace(
        model="resnet8", lr_decay_epochs=[150, 180, 210], learning_rate=0.05, rotate=None
    )
    network = resnet8(10, 3, 32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    beside = {"opt": options, "optimizer": optimizer.state_dict(), "accuracy": torch.tensor(72.5)}
    assert_loads(saved(tmp_path / "resnet8_last.pth", shared, **beside), shared)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_file_in_the_format_of_old_pytorch_loads(tmp_path, shared):
    options = argparse.Namespace(model="resnet8")
    path = tmp_path / "old.pth"
    torch.save({"opt": options, "model": shared}, path, _use_new_zipfile_serialization=False)
    assert_loads(path, shared)


def test_weights_of_data_parallel_load(tmp_path, shared):
    assert_loads(
        saved(tmp_path / "a.pth", {f"module.{name}": value for name, value in shared.items()}), shared
    )


class Options(argparse.Namespace):
    """Not argparse's own: its class would have to be imported."""


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    "options", [Options(), argparse.Namespace(hook=Runs())], ids=["other_class", "code_inside"]
)
def test_options_that_could_execute_something_are_refused(tmp_path, shared, options):
    path = saved(tmp_path / "a.pth", shared, opt=options)
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
        read_weights(path)


# What does not fit


@pytest.mark.parametrize("change", ["missing", "stray"])
def test_loading_shared_names_is_strict_and_speaks_of_them(shared, change):
    if change == "missing":
        del shared["layer3.0.downsample.1.weight"]
    else:
        shared["layer3.0.downsample.2.weight"] = torch.ones(64)
    with pytest.raises(
        CheckpointError, match=r"^/a/b\.pth: .* (1|0) are missing.*layer3\.0\.downsample\.\d\.weight"
    ):
        load_weights(make("resnet8", num_classes=10), shared, "resnet8", Path("/a/b.pth"))


def test_another_number_of_classes_is_refused_with_both_numbers(shared):
    with pytest.raises(CheckpointError, match=r"^/a/b\.pth: found 10 classes, expected 100$"):
        load_weights(make("resnet8"), shared, "resnet8", Path("/a/b.pth"))


@pytest.mark.parametrize("other", ["resnet14", "resnet8x4", "vgg8", "wrn_16_1"])
def test_another_network_s_shared_weights_are_refused_and_change_nothing(other):
    own = make("resnet8")
    with pytest.raises(CheckpointError, match=r"^/a/b\.pth: is not (a|this) resnet8; .*(conv1|layer|block0)"):
        load_weights(own, shared_weights(make(other)), "resnet8", Path("/a/b.pth"))
    assert_close(shared_weights(own), shared_weights(make("resnet8")), rtol=0, atol=0)


def test_a_network_without_shared_names_loads_by_its_own():
    plain = StagedNet(dict(resnet8(10, 1, 8).named_children()), "own", (1, 8, 8))
    assert plain.shared_names() == shared_weights(plain) == {}
    load_weights(plain, resnet8(10, 1, 8).state_dict(), "own", Path("/a/b.pt"))


# sakd export --to checkpoint


def export(*arguments: object):
    return CliRunner().invoke(cli, ["export", "--to", "checkpoint", *map(str, arguments)])


@pytest.fixture
def finished(tiny, monkeypatch) -> Run:
    monkeypatch.setattr(cost, "SECONDS", 0.0)  # its latency is no matter here
    config = tiny("distiller=none", "epochs=1")
    execute(config)
    return Run(config)


def test_a_finished_run_s_student_is_written_for_others(finished, tmp_path):
    done = export(finished.folder)
    path = finished.folder / "student.pth"
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{path}: ")
    content = torch.load(path, weights_only=True)
    result = finished.result()
    expected = {"name": "resnet8", "epoch": 1, "accuracy": result["student"]["accuracy"]}
    assert {key: value for key, value in content.items() if key != "model"} == expected
    assert set(content["model"]) == set(SHARED["resnet8"])
    assert_close(content["model"]["fc.bias"], read_weights(finished.weights)["logits.bias"], rtol=0, atol=0)
    network = resnet8(10, 1, 8)
    load_weights(network, read_weights(path), "resnet8", path)
    assert_close(dict(network.state_dict()), read_weights(finished.weights), rtol=0, atol=0)

    elsewhere = tmp_path / "for_others.pth"
    assert export(finished.folder, "--output", elsewhere).exit_code == 0
    assert elsewhere.read_bytes() == path.read_bytes()


def test_a_shared_file_teaches_with_the_accuracy_that_its_network_had(finished, tiny):
    path = finished.folder / "student.pth"
    export(finished.folder)
    taught = execute(tiny("distiller=kd", f"teacher.checkpoint={path}", "epochs=1"))
    assert taught["teacher"]["accuracy"] == finished.result()["student"]["accuracy"]


def assert_refused(done, folder: Path, message: str):
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert not list(folder.rglob("*.pth*"))


def test_what_cannot_be_exported_is_named_and_nothing_is_written(finished, tmp_path, monkeypatch):
    folder = finished.folder
    assert_refused(
        export(tmp_path / "none"), tmp_path, f"{tmp_path}/none: found no such run, expected a run's folder"
    )
    assert_refused(
        export(folder, "--output", tmp_path / "no/such.pth"),
        tmp_path,
        f"--output: found no folder '{tmp_path}/no', expected one for such.pth",
    )
    with monkeypatch.context() as patched:
        patched.setattr(StagedNet, "shared_names", lambda network: {})
        assert_refused(
            export(folder),
            tmp_path,
            f"{folder}: found resnet8 of sakd.networks.resnet8, expected a network whose weights have names",
        )
    weights = finished.weights.read_bytes()
    finished.weights.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert_refused(export(folder), tmp_path, f"{finished.weights}: expected checksum")
    finished.weights.unlink()
    assert_refused(export(folder), tmp_path, f"{finished.weights}: no such file")
    for content, told in {
        "a: [": "found no valid YAML",
        "student: 3": "is not a run's configuration",
    }.items():
        (folder / "config.yaml").write_text(content)
        assert_refused(export(folder), tmp_path, f"{folder / 'config.yaml'}: {told}")
    (folder / "result.json").unlink()
    assert_refused(export(folder), tmp_path, f"{folder}: found no result.json, expected a finished run")
