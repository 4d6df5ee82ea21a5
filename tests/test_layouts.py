"""Networks whose stages give tokens, or maps with their channels last: as they are uncut, and as maps to all
others."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import SwinTransformer, VisionTransformer

from sakd.configuration import build
from sakd.errors import ConfigError
from sakd.networks import StagedNet, foreign
from sakd.networks.checkpoints import load_weights
from sakd.spots import frozen_alias
from sakd.training import Cohort
from tests.conftest import ROOT, compose_config, fit
from tests.test_resume import assert_same

CPU = torch.device("cpu")
MODES = ("fixed", "adaptive", "anti", "random")
VIT = {
    "name": "small_vit",
    "_target_": "sakd.networks.foreign",
    "build": "torchvision.models.VisionTransformer",
    "arguments": {"patch_size": 8, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32},
    "passes": {"num_classes": "num_classes", "image_size": "image_size"},
    "family": "small_vit",
    "cuts": {
        "stem": "encoder.dropout",
        **{f"stage{n + 1}": f"encoder.layers.encoder_layer_{n}" for n in range(2)},
        "stage3": "encoder.ln",
        "embedding": "getitem_11",
    },
    "layouts": dict.fromkeys(("stem", "stage1", "stage2", "stage3"), "tokens"),
}
SWIN = {
    "name": "small_swin",
    "_target_": "sakd.networks.foreign",
    "build": "torchvision.models.SwinTransformer",
    "arguments": {
        "patch_size": [2, 2], "window_size": [4, 4],
        "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2],
    },
    "passes": {"num_classes": "num_classes"},
    "family": "small_swin",
    "cuts": {"stem": "features.0", "stage1": "features.1", "stage2": "features.3", "stage3": "norm",
             "embedding": "flatten"},
    "layouts": dict.fromkeys(("stem", "stage1", "stage2", "stage3"), "NHWC"),
}  # fmt: skip
WHOLE = {"small_vit": VisionTransformer, "small_swin": SwinTransformer}
SIZES = {"num_classes": 10, "in_channels": 3, "image_size": 32}


def made(node: dict, **changed: object) -> StagedNet:
    own = {key: value for key, value in (node | changed).items() if key not in ("name", "_target_")}
    return foreign(**own, **SIZES)


def uncut(node: dict) -> nn.Module:
    sizes = {argument: SIZES[key] for key, argument in node["passes"].items()}
    torch.manual_seed(0)
    whole = WHOLE[node["name"]](**node["arguments"], **sizes)
    for value in whole.parameters():  # the heads begin as zeros
        nn.init.normal_(value, std=0.3)
    return whole


def as_map(name: str, output: Tensor) -> Tensor:
    if name == "small_swin":
        return output.permute(0, 3, 1, 2)
    return output[:, 1:].transpose(1, 2).reshape(len(output), 16, 4, 4)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("node", [VIT, SWIN], ids=WHOLE)
def test_it_computes_what_it_did_uncut_and_shows_maps(node, training, images):
    """Logits and gradients bit for bit; of tokens the grid's, without the class's."""
    whole, network = uncut(node), made(node)
    load_weights(network, whole.state_dict(), node["name"], ROOT)
    outputs = {}
    for stage, place in node["cuts"].items():
        if stage in node["layouts"]:
            hook = lambda *call, stage=stage: outputs.update({stage: call[-1]})  # noqa: E731
            whole.get_submodule(place).register_forward_hook(hook)
    torch.manual_seed(2)
    expected = whole.train(training)(images)
    torch.manual_seed(2)
    features = network.train(training).features(images)
    assert torch.equal(features["logits"], expected)
    for stage, output in outputs.items():
        assert torch.equal(features[stage], as_map(node["name"], output))
    assert {stage: output.shape[1:] for stage, output in features.items()} == network.shapes
    (gradient,) = torch.autograd.grad(expected.square().sum(), next(whole.parameters()))
    (own,) = torch.autograd.grad(features["logits"].square().sum(), next(network.parameters()))
    assert torch.equal(own, gradient)


def test_slices_of_maps_with_their_channels_last_compose(images):
    network = made(SWIN).eval()
    features = network.features(images)
    for after, upto in (("stem", "stage2"), ("stage2", "embedding"), ("stage3", "logits")):
        assert torch.equal(network.between(after, upto)(features[after]), features[upto])
        assert torch.equal(frozen_alias(network).between(after, upto)(features[after]), features[upto])


def test_a_slice_that_begins_with_a_map_has_the_mean_of_its_tokens_as_class_token(images):
    network, whole = made(VIT).eval(), uncut(VIT).eval()
    load_weights(network, whole.state_dict(), "small_vit", ROOT)
    features = network.features(images)
    grid = features["stage1"].flatten(2).transpose(1, 2)
    tokens = torch.cat([grid.mean(1, keepdim=True), grid], 1)
    expected = whole.encoder.layers.encoder_layer_1(tokens)[:, 1:].transpose(1, 2).reshape(2, 16, 4, 4)
    assert_close(network.between("stage1", "stage2")(features["stage1"]), expected, rtol=0, atol=0)


def run(tiny, teacher: dict, student: str, mode: str, *overrides: str) -> dict:
    """A run whose images are the digits in the place of CIFAR-10's."""
    config = tiny(
        "dataset=cifar10", "experiment=debug", f"student={student}", f"spot_mode={mode}", *overrides
    )
    kept = {key: config["teacher"][key] for key in ("checkpoint", "min_accuracy", "training")}
    return {**config, "teacher": teacher | SIZES | kept}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("teacher", "student"), [(VIT, "resnet8"), (SWIN, "MobileNetV2_half")], ids=WHOLE)
def test_it_teaches_in_every_mode_and_goes_on_bit_for_bit_alone_and_in_a_cohort(tiny, teacher, student, mode):
    keys = ("dataset.train_samples=24", "dataset.test_samples=12")
    configs = {d: run(tiny, teacher, student, mode, f"distiller={d}", *keys) for d in ("at", "fitnet")}
    dataset = build.dataset(configs["at"])

    def trainers(together: bool = False) -> dict:
        teacher, made = None, {}
        for d, config in configs.items():
            parts = build.parts(config, None if teacher is None else teacher.network)
            made[d] = build.trainer(config, parts, CPU, teacher)
            teacher = made[d].teacher if together else None
        return made

    whole, first, second, together = (trainers(together) for together in (False, False, False, True))
    for d in configs:
        fit(whole[d], dataset, 2, 12)
        fit(first[d], dataset, 1, 12)
        saved = io.BytesIO()
        torch.save(first[d].state_dict(), saved)
        saved.seek(0)
        second[d].prepare(dataset)
        second[d].load_state_dict(torch.load(saved, weights_only=True))
        fit(second[d], dataset, 2, 12)
        assert_same(second[d].state_dict(), whole[d].state_dict())
        together[d].prepare(dataset)
    list(Cohort(together["at"].teacher, together).fit(dataset, 2, 12))
    for d in configs:
        assert_same(together[d].state_dict(), whole[d].state_dict())


def test_a_vit_is_a_student_too(tiny):
    config = run(tiny, VIT, "resnet8", "adaptive", "distiller=at", "dataset.train_samples=24")
    teacher = compose_config("teacher=resnet8", "dataset=cifar10")["teacher"]
    config |= {"student": VIT | SIZES, "teacher": teacher}
    trainer = build.trainer(config, build.parts(config), CPU)
    (measured,) = fit(trainer, build.dataset(config), 1, 24)
    assert measured["loss/at"] > 0


class Several(nn.Module):
    """Returns its logits among others."""

    def __init__(self, num_classes: int, kind: str):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, num_classes)
        self.other, self.kind = nn.Linear(4, num_classes), kind

    def forward(self, images: Tensor) -> object:
        pooled = self.b(self.a(images)).mean((2, 3))
        logits, other = self.head(pooled), self.other(pooled)
        kinds = {"dict": {"aux": other, "logits": logits}, "tuple": (other, logits), "sum": logits + other}
        return kinds[self.kind]


@pytest.mark.parametrize(("kind", "output"), [("dict", "logits"), ("tuple", 1), ("sum", "head")])
def test_a_network_that_returns_several_tensors_gives_the_one_that_is_asked_for(kind, output, images):
    keys = {
        "build": "tests.test_layouts.Several",
        "arguments": {"kind": kind},
        "passes": {"num_classes": "num_classes"},
        "family": "several",
        "cuts": {"stem": "a", "stage1": "b", "embedding": "mean"},
    }
    network = foreign(**keys, output=output, **SIZES)
    whole = Several(10, kind)
    load_weights(network, whole.state_dict(), "several", ROOT)
    expected = whole.head(whole.b(whole.a(images)).mean((2, 3)))
    for mode in (True, False):
        assert torch.equal(network.train(mode)(images), expected)
    if kind != "sum":
        with pytest.raises(ConfigError, match=r"^build: .* expected logits alone, or `output`"):
            foreign(**keys, **SIZES)
        with pytest.raises(ConfigError, match=r"^output: .* found 'logit', which is none of them"):
            foreign(**keys, output="logit", **SIZES)


@pytest.mark.parametrize(
    ("node", "layouts", "message"),
    [
        (
            VIT,
            {"stage1": "NHWC"},
            r"^layouts\.stage1: found NHWC, but .* \(1, 17, 16\); expected maps \[B, H,",
        ),
        (SWIN, {"stage1": "tokens"}, r"^layouts\.stage1: found tokens, but .* expected tokens \[B, N, C\]"),
        (SWIN, {"stage9": "NHWC"}, r"^layouts\.stage9: no such stage; expected some of stem"),
        (SWIN, {}, r"not channels x height x width"),
    ],
)
def test_a_layout_that_is_not_the_stage_s_is_refused_by_its_key(node, layouts, message):
    with pytest.raises(ConfigError, match=message):
        made(node, layouts=layouts)
