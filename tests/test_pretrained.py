"""Weights by the name under which torchvision or timm publish them; none is fetched here."""

import pytest
import torch
import torchvision

from sakd.configuration import build, digest, prerequisites
from sakd.errors import CheckpointError, ConfigError
from sakd.networks.checkpoints import read_weights
from sakd.networks.pretrained import published

SHUFFLENET = "torchvision_shufflenet_v2_x1_0"
FILE = "shufflenetv2_x1-5666bf0f80.pth"  # as torchvision's IMAGENET1K_V1 is called


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of torch.hub that nothing can be fetched into."""
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return tmp_path / "hub/hub/checkpoints"


@pytest.fixture
def stored(hub):
    """Weights of 1000 classes, where torchvision's would be once they are fetched."""
    hub.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = torchvision.models.shufflenet_v2_x1_0().state_dict()
    torch.save(weights, hub / FILE)
    return hub / FILE


def composed(tiny, *overrides):
    return tiny("dataset=cifar10", f"teacher={SHUFFLENET}", f"student={SHUFFLENET}", *overrides)


def test_a_student_starts_from_published_weights_with_a_head_of_its_own(tiny, stored):
    config = composed(tiny, "distiller=none", "student.pretrained=IMAGENET1K_V1")
    student = build.parts(config).student
    found, expected = student.state_dict(), read_weights(stored)
    assert torch.equal(found["stem.conv1.0.weight"], expected["conv1.0.weight"])
    assert found["logits.fc.weight"].shape == (10, 1024)
    assert digest(config) != digest(composed(tiny, "distiller=none"))


def test_a_teacher_is_brought_by_name_or_trained_from_published_weights(tiny, stored):
    name = "pretrained=IMAGENET1K_V1"
    brought, trained, plain = (
        composed(tiny, "distiller=kd", *keys)
        for keys in ([f"teacher.{name}"], [f"teacher.training.{name}"], [])
    )
    assert len({digest(config) for config in (brought, trained, plain)}) == 3
    assert prerequisites(brought).teacher is None
    assert build.weights_file(brought["teacher"], "teacher") == stored
    first = prerequisites(trained).teacher
    assert first["student"]["pretrained"] == "IMAGENET1K_V1"
    assert digest(first) != digest(prerequisites(plain).teacher)


@pytest.mark.parametrize(
    ("network", "name", "message"),
    [
        (
            "torchvision.models.shufflenet_v2_x1_0",
            "IMAGENET1K_V3",
            r"V3, of shufflenet.* IMAGENET1K_V1\. Did",
        ),
        (
            "torchvision.models.shufflenet_v2_x1_0",
            "IMAGENET1K_V1",
            r"cannot fetch IMAGENET1K_V1 .* network\? Without one, .* give it as teacher\.checkpoint$",
        ),
        ("sakd.networks.resnet56", "IMAGENET1K_V1", r"neither torchvision's nor timm's"),
    ],
)
def test_what_is_not_published_or_cannot_be_fetched_is_told_by_key(hub, network, name, message):
    with pytest.raises(CheckpointError, match=rf"^teacher\.pretrained: .*{message}"):
        published(network, {}, name, "teacher.pretrained")
    assert not (hub / FILE).exists()


def test_timm_s_tags_are_known_and_fetched_from_their_place(hub, monkeypatch, capfd):
    pytest.importorskip("timm")
    arguments = {"model_name": "resnet18"}
    with pytest.raises(CheckpointError, match=r"^student\.pretrained: found a9_in1k, of resnet18 .*a1_in1k"):
        published("timm.create_model", arguments, "a9_in1k", "student.pretrained")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    with pytest.raises(CheckpointError, match=r"^student\.pretrained: cannot fetch a1_in1k of resnet18"):
        published("timm.create_model", arguments, "a1_in1k", "student.pretrained")
    assert capfd.readouterr().err == ""  # the one line is all: no word of attempts
    weights = hub / "models--timm--resnet18.a1_in1k/snapshots/abc/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (weights.parents[2] / "refs").mkdir()
    (weights.parents[2] / "refs/main").write_text("abc")
    assert published("timm.create_model", arguments, "a1_in1k", "student.pretrained") == weights


@pytest.mark.parametrize("node", ["teacher", "student"])
def test_a_file_and_a_name_are_not_both_taken(tiny, stored, node):
    with pytest.raises(
        ConfigError, match=rf"^{node}\.pretrained: found x, but {node}\.checkpoint names a file"
    ):
        composed(tiny, "distiller=kd", f"{node}.pretrained=x", f"{node}.checkpoint={stored}")
    with pytest.raises(ConfigError, match=r"^teacher\.training\.pretrained: found weights to start from"):
        composed(tiny, "distiller=kd", "teacher.pretrained=x", "teacher.training.pretrained=x")
