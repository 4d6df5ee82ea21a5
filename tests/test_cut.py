"""Networks of other packages, cut into stages: they compute what they did uncut, and what cannot be cut is named."""

from copy import deepcopy
from pkgutil import resolve_name

import pytest
import torch
import yaml
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sakd import build
from sakd.data import assemble
from sakd.data.sets import ImageSet
from sakd.errors import CheckpointError, ConfigError
from sakd.grafts import frozen_alias
from sakd.job import execute
from sakd.networks import StagedNet
from sakd.networks.checkpoints import load_weights
from sakd.networks.cut import foreign
from sakd.runs import Run
from tests.conftest import ROOT, compose_config, skip_without_package_of

FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "conf/network").glob("*.yaml"))}
OFFERED = {name: node for name, node in FILES.items() if "build" in node}
SMALL = "torchvision_shufflenet_v2_x1_0"
# Dropout and stochastic depth that the networks' own forward, not a layer, switches on in training.
DROPPING = {
    "torchvision_vgg11_bn": {"dropout": 0.3},
    "timm_resnet18": {"drop_rate": 0.5, "drop_path_rate": 0.3},
    "timm_mobilenetv3_small_050": {"drop_rate": 0.5, "drop_path_rate": 0.3},
}


def make(name: str, num_classes: int = 7, in_channels: int = 3, image_size: int = 32, **changed) -> StagedNet:
    skip_without_package_of(name)
    node = {key: value for key, value in OFFERED[name].items() if key != "name"} | changed
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    return instantiate(node, **sizes, _convert_="all")


def uncut(name: str, num_classes: int = 7, **more) -> nn.Module:
    """What the other package makes of the same arguments, with weights and running statistics drawn here."""
    skip_without_package_of(name)
    with torch.device("meta"):  # drawing 129 million weights twice takes longer than all tests
        node = OFFERED[name]
        network = resolve_name(node["build"])(**node["arguments"], num_classes=num_classes, **more)
    draws = torch.Generator().manual_seed(0)
    for key, value in network.to_empty(device="cpu").state_dict().items():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=draws)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=draws)
        else:
            value.zero_()
        assert value.is_leaf, key
    return network


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def original_weights(network: StagedNet) -> dict[str, Tensor]:
    own = network.state_dict()
    return {original: own[name] for name, original in network.shared_names().items()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", OFFERED)
def test_it_computes_what_it_did_uncut(name, training, images):
    """Logits, first gradients and moved statistics, bit for bit, with the same random numbers, and the maps at the cuts."""
    more = DROPPING.get(name, {})
    whole = uncut(name, **more).train(training)
    with torch.device("meta"):
        network = make(name, arguments=OFFERED[name]["arguments"] | more)
    network = network.to_empty(device="cpu").train(training)
    load_weights(network, whole.state_dict(), name, ROOT)
    outputs = {}
    for stage, place in OFFERED[name]["cuts"].items():
        module = dict(whole.named_modules()).get(place)
        if module is not None:
            module.register_forward_hook(lambda *call, stage=stage: outputs.update({stage: call[-1].clone()}))
    torch.manual_seed(2)
    expected = whole(images)
    torch.manual_seed(2)
    features = network.features(images)

    assert torch.equal(features["logits"], expected)
    assert len(outputs) > 3
    for stage, output in outputs.items():
        assert torch.equal(features[stage], output)
    assert {stage: output.shape[1:] for stage, output in features.items()} == network.shapes
    assert_close(original_weights(network), dict(whole.state_dict()), rtol=0, atol=0)
    first, own_first = next(whole.parameters()), next(network.parameters())
    (gradient,) = torch.autograd.grad(expected.square().sum(), first)
    (own_gradient,) = torch.autograd.grad(features["logits"].square().sum(), own_first)
    assert torch.equal(own_gradient, gradient)


def test_files_are_named_as_their_networks():
    assert {file: node["name"] for file, node in OFFERED.items()} == {file: file for file in OFFERED}


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("name", OFFERED)
def test_stages_are_maps_then_vectors(name, image_size):
    with torch.device("meta"):
        network = make(name, image_size=image_size)
    assert network.names == [*OFFERED[name]["cuts"], "logits"]
    assert [len(shape) for shape in network.shapes.values()] == [3] * (len(network.maps) + 1) + [1, 1]
    sizes = [shape[-1] for stage, shape in network.shapes.items() if stage in ("stem", *network.maps)]
    assert sizes == sorted(sizes, reverse=True)


def test_stages_use_the_network_s_own_weights_under_its_names():
    network = make(SMALL)
    assert original_weights(network).keys() == uncut(SMALL).state_dict().keys()
    assert network.shared_names()["stage1.stage2.0.branch1.0.weight"] == "stage2.0.branch1.0.weight"


def test_slices_compose(images):
    network = make(SMALL).eval()
    features = network.features(images)
    for middle, end in (("stem", "stage2"), ("stage3", "embedding"), ("embedding", "logits")):
        assert torch.equal(network.between(None, middle)(images), features[middle])
        assert torch.equal(network.between(middle, end)(features[middle]), features[end])


def test_a_frozen_alias_shares_memory_and_lets_gradients_through(images):
    network = make(SMALL).train()
    alias = frozen_alias(network)
    for (name, value), own in zip(alias.state_dict().items(), network.state_dict().values(), strict=True):
        assert value.data_ptr() == own.data_ptr(), name
    assert not any(parameter.requires_grad for parameter in alias.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    alias(images.requires_grad_()).sum().backward()
    assert images.grad.abs().sum() > 0
    with torch.no_grad():
        network.logits.fc.weight += 1
    assert torch.equal(alias(images), network.eval()(images))


def test_a_copy_has_weights_of_its_own(images):
    network = make(SMALL).eval()
    before = network(images)
    for parameter in deepcopy(network).parameters():
        parameter.data.zero_()
    assert torch.equal(network(images), before)


# Weights files


@pytest.mark.parametrize("own_names", [True, False])
def test_weights_go_in_by_either_names(own_names):
    network, other = make(SMALL), make(SMALL)
    weights = network.state_dict() if own_names else original_weights(network)
    load_weights(other, weights, SMALL, ROOT)
    assert_close(dict(other.state_dict()), dict(network.state_dict()), rtol=0, atol=0)


def test_another_class_count_is_refused_with_both_numbers():
    with pytest.raises(CheckpointError, match=r"^/a\.pt: found 5 classes, expected 7$"):
        load_weights(make(SMALL), uncut(SMALL, num_classes=5).state_dict(), SMALL, "/a.pt")


@pytest.mark.parametrize("change", ["missing", "stray"])
def test_loading_original_names_is_strict(change):
    weights = dict(uncut(SMALL).state_dict())
    if change == "missing":
        del weights["conv5.0.weight"]
    else:
        weights["conv6.0.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"^/a\.pt: is not a .*conv\d\.0\.weight"):
        load_weights(make(SMALL), weights, SMALL, "/a.pt")


def test_a_foreign_pair_distils_and_its_student_teaches(tmp_path):
    """Adaptively, with the teacher's weights from a file in its package's names; the student's own file then teaches."""
    torch.save(uncut("torchvision_mobilenet_v2", num_classes=10).state_dict(), tmp_path / "teacher.pth")
    overrides = [f"runs={tmp_path}", "dataset=cifar10", f"student={SMALL}", "tracking=none", "epochs=1", "batch_size=8"]
    draws = torch.Generator().manual_seed(0)
    part = ImageSet(
        torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=draws), torch.arange(16, dtype=torch.int64) % 10
    )
    teacher = ("torchvision_mobilenet_v2", tmp_path / "teacher.pth")
    for distiller in ("at", "pkt"):
        config = compose_config(
            *overrides, f"teacher={teacher[0]}", f"teacher.checkpoint={teacher[1]}", f"distiller={distiller}"
        )
        result = execute(config, assemble(part, part, **build.promises(config)))
        assert result["teacher"]["name"] == teacher[0]
        assert list(result["kept"])[-1] == "logits"
        teacher = (SMALL, Run(config).weights)
    assert load_file(teacher[1]).keys() == make(SMALL).state_dict().keys()


# Networks made for the purpose


class Plain(nn.Module):
    """Two convolutions with ``between`` them, and what a forward may do by itself: dropout, and a branch on the mode."""

    def __init__(self, num_classes: int, between=lambda x: x):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.between = between
        self.second = nn.Conv2d(4, 4, 3)
        self.rectify = nn.ReLU(inplace=True)
        self.classify = nn.Linear(4, num_classes)
        self.register_buffer("scale", torch.tensor(3.0))
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.between(self.norm(self.first(x)))
        x = self.rectify(self.second(x)) * self.scale
        x = F.dropout(x, 0.5, self.training)
        if self.training:
            x = x + torch.ones(1)
        x = self.classify(F.dropout(x.mean((2, 3)), 0.5, self.training, inplace=True))
        return x * 2 if twice else x


CUTS = {"stem": "norm", "stage1": "second", "stage2": "dropout", "embedding": "mean"}


def cut(network: type[nn.Module] = Plain, cuts: dict[str, str] = CUTS, in_channels: int = 3, **arguments) -> StagedNet:
    target, passes = f"{__name__}.{network.__name__}", {"num_classes": "num_classes"}
    return foreign(target, arguments, passes, "plain", cuts, num_classes=7, in_channels=in_channels, image_size=8)


def doubled(x: Tensor) -> Tensor:
    x *= 2
    return x


class Branch(nn.Module):
    """What it does depends on values, so that it can only be kept whole."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -100 else x


# Each begins a stage; most overwrite what they get.
BETWEEN = {
    "nothing": nn.Identity(),
    "module": nn.ReLU(inplace=True),
    "function": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.mul_(2),
    "operator": doubled,
    "view": lambda x: x.flatten(1).relu_().view_as(x),
    "result_unused": lambda x: (x.mul_(3), x)[1],
    "training_alone": nn.Dropout(0.5, inplace=True),
    "untraceable": Branch(),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("between", BETWEEN)
def test_stages_do_the_same_and_overwrite_no_output(between, training):
    whole, network = Plain(7, BETWEEN[between]).train(training), cut(between=BETWEEN[between]).train(training)
    load_weights(network, whole.state_dict(), "plain", ROOT)
    images = torch.randn(5, 3, 8, 8)

    def stage_by_stage() -> dict[str, Tensor]:
        outputs, x = {}, images
        for name, stage in network.named_children():
            x = stage(x.clone())
            outputs[name] = x.clone()
        return outputs

    results = []
    for run in (whole, network.features, lambda _: stage_by_stage()):
        load_weights(network, whole.state_dict(), "plain", ROOT)
        torch.manual_seed(0)
        results.append(run(images.clone()))
        if run is whole:
            moved = {key: value.clone() for key, value in whole.state_dict().items()}
            whole.norm.reset_running_stats()
    expected, features, separate = results
    assert torch.equal(features["logits"], expected)
    assert_close(features, separate, rtol=0, atol=0)
    assert_close(original_weights(network), moved, rtol=0, atol=0)
    assert training == (not torch.equal(moved["norm.running_mean"], torch.zeros(4)))
    features["logits"].sum().backward() if training else None


def test_images_are_not_overwritten():
    class_of_its_own = cut(StartsInPlace, {"stem": "first", "stage1": "second", "embedding": "mean"}).eval()
    images = torch.randn(2, 3, 8, 8)
    before = images.clone()
    class_of_its_own(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", [SMALL, "torchvision_mobilenet_v2"])
def test_nothing_is_copied_where_nothing_is_overwritten(name, images, monkeypatch):
    network = make(name)
    monkeypatch.delattr(Tensor, "clone")
    network.features(images)


class StartsInPlace(Plain):
    def forward(self, x):
        return self.classify(self.second(self.first(x.mul_(2))).mean((2, 3)))


class Skip(Plain):
    def forward(self, x):
        x = self.first(x)
        return self.classify((self.second(F.pad(x, [1, 1, 1, 1])) + x).mean((2, 3)))


class SeesImagesAgain(Plain):
    def forward(self, images):
        return self.classify(self.second(self.first(images)).mean((2, 3)) + images.mean())


class Tied(Plain):
    def forward(self, x):
        return self.classify(self.second(F.relu(self.second(self.first(x)))).mean((2, 3)))


class Halves(Plain):
    def forward(self, x):
        a, b = self.first(x).chunk(2, 1)
        return self.classify(self.second(torch.cat([b, a], 1)).mean((2, 3)))


class LooksAtValues(Plain):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Counts(Plain):
    def forward(self, x):
        self.scale.add_(1)
        return super().forward(x)


class Rebinds(Plain):
    def forward(self, x):
        self.scale = self.scale + 1
        return super().forward(x)


class Draws(Plain):
    def forward(self, x):
        return super().forward(x) * torch.rand(1)


class ReturnsTwo(Plain):
    def forward(self, x):
        x = super().forward(x)
        return x, x


class WantsMore(Plain):
    def forward(self, x, labels):
        return super().forward(x) + labels


CUT_AT_SECOND = {"stem": "first", "stage1": "second", "embedding": "mean"}


@pytest.mark.parametrize(
    ("network", "cuts", "error"),
    [
        (Plain, {"stage1": "secnd"}, r"^cuts\.stage1: .*\.Plain .*no 'secnd'\. Did you mean 'second'\? .*: first, .*, mean"),
        (Plain, {"embedding": "idle"}, r"^cuts\.embedding: .* no 'idle'.* first, norm, second"),
        (Plain, {"stage1": "first"}, r"^cuts\.stem: 'norm' does not run before 'first', where stage1 ends"),
        (Plain, {"stage1": "norm"}, r"^cuts\.stem: 'norm' does not run before 'norm'"),
        (Plain, {"embedding": "classify"}, r"^cuts\.embedding: 'classify' does not run before the logits"),
        (Plain, {"stage2": "mean", "embedding": "dropout_1"}, r"^stage2: found a tensor of \(4,\) .*, expected a map"),
        (Plain, {"stage2": "rectify", "embedding": "dropout"}, r"^embedding: found a tensor of \(4, 4, 4\) .* a vector"),
        (Skip, CUT_AT_SECOND, r"^cuts\.stage1: more than one tensor runs through a cut behind 'second': first, second$"),
        (SeesImagesAgain, CUT_AT_SECOND, r"^cuts\.stem: more than one tensor .* behind 'first': images, first$"),
        (Tied, CUT_AT_SECOND, r"^cuts\.stage1: 'second' stands for several tensors: second, second_1"),
        (Tied, CUT_AT_SECOND | {"stage1": "relu"}, r"^cuts: second\.weight would belong to stage1 and embedding"),
        (Halves, CUT_AT_SECOND | {"stem": "chunk"}, r"^stem: found a tuple .*, expected a map"),
        (LooksAtValues, {}, r"^build: torch\.fx cannot trace .*LooksAtValues .*control flow"),
        (WantsMore, {}, r"^build: torch\.fx cannot trace .*WantsMore .*labels"),
        (Counts, {}, r"^build: torch\.fx cannot trace .*Counts .*changes scale"),
        (Rebinds, {}, r"^build: torch\.fx cannot trace .*Rebinds .*changes scale"),
        (Draws, {}, r"^build: torch\.fx cannot trace .*Draws .*random numbers"),
        (ReturnsTwo, {}, r"^build: .*ReturnsTwo .*returns \(.*\); expected logits alone"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(network, cuts, error):
    with pytest.raises(ConfigError, match=error):
        cut(network, cuts if cuts.keys() == CUT_AT_SECOND.keys() else CUTS | cuts)


def test_a_cut_in_what_cannot_be_traced_is_refused_with_the_reason():
    with pytest.raises(
        ConfigError, match=r"^cuts\.stage1: 'between\.inner' lies in 'between', .* cannot trace \(.*control flow"
    ):
        cut(cuts=CUTS | {"stage1": "between.inner"}, between=Branch())


@pytest.mark.parametrize(
    "names", [[], ["stem", "embedding"], ["stem", "stage2", "embedding"], ["stage1", "stem", "embedding"], ["stem", "stage1"]]
)
def test_stages_other_than_the_usual_are_refused(names):
    with pytest.raises(ConfigError, match=rf"^cuts: found {', '.join(names) or 'none'}, expected stem, stage1, "):
        cut(cuts=dict.fromkeys(names, "norm"))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"in_channels": 1}, r"in_channels: found 1, torchvision\.models\.shufflenet_v2_x1_0 takes 3 "),
        ({"passes": {}}, r"num_classes: found 7, torchvision\.models\.shufflenet_v2_x1_0 has 1000 outputs"),
        ({"passes": {"num_clases": "n"}}, r"passes: found num_clases, .*Did you mean 'num_classes'"),
        ({"passes": {"num_classes": "classes"}}, r"arguments: torchvision\.models\.shuffl.* does not take .*classes"),
        ({"build": "torchvision.models.shufle"}, r"build: cannot import torchvision\.models\.shufle"),
        ({"build": "no_such_package.net"}, r"build: cannot import no_such_package\.net \(No module named"),
        ({"build": "builtins.dict"}, r"build: builtins\.dict made a dict, expected a network"),
    ],
)
def test_builders_are_refused_by_key(changed, error):
    node = {"name": SMALL, **OFFERED[SMALL], "num_classes": 7, "in_channels": 3, "image_size": 32, **changed}
    with pytest.raises(ConfigError, match=rf"^student: {error}"):
        build.make(node, "student")


@pytest.mark.parametrize("in_channels", [1, 3])
def test_timm_takes_grey_images(in_channels):
    with torch.device("meta"):
        assert make("timm_resnet18", in_channels=in_channels).stem.conv1.in_channels == in_channels


def test_cutting_keeps_the_mode_and_the_random_stream():
    torch.manual_seed(0)
    Plain(7)
    expected = torch.rand(1)
    torch.manual_seed(0)
    network = cut()
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in network.modules())
    assert int(network.stem.norm.num_batches_tracked) == 0
