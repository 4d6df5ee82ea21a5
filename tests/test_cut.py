"""Networks of other packages, cut into stages: they compute what they did uncut, and what cannot be cut is
named."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import yaml
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sakd.configuration import build
from sakd.data import ImageSet, assemble
from sakd.errors import CheckpointError, ConfigError
from sakd.networks import StagedNet
from sakd.networks.checkpoints import load_weights, read_weights
from sakd.networks.cut import foreign
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.spots import frozen_alias
from tests.conftest import ROOT, compose_config, skip_without_package_of

FILES = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "conf/network").glob("*.yaml"))
}
OFFERED = {name: node for name, node in FILES.items() if "build" in node and "layouts" not in node}
SMALL = "torchvision_shufflenet_v2_x1_0"
HUGE = ("torchvision_vgg11_bn",)  # to draw 129 million weights takes seconds; what is made has none yet
# Dropout and stochastic depth that the networks' own forward, not a layer, switches on in training.
DROPPING = {
    "torchvision_vgg11_bn": {"dropout": 0.3},
    "timm_resnet18": {"drop_rate": 0.5, "drop_path_rate": 0.3},
    "timm_mobilenetv3_small_050": {"drop_rate": 0.5, "drop_path_rate": 0.3},
}


def make(name: str, **changed) -> StagedNet:
    skip_without_package_of(name)
    node = {key: value for key, value in OFFERED[name].items() if key != "name"}
    node |= {"num_classes": 7, "in_channels": 3, "image_size": 32} | changed
    if name not in HUGE:
        return instantiate(node, _convert_="all")
    with torch.device("meta"):
        network = instantiate(node, _convert_="all")
    return network.to_empty(device="cpu")


def uncut(name: str, num_classes: int = 7, **more) -> nn.Module:
    """What the other package makes of the same arguments, with weights and running statistics drawn here."""
    skip_without_package_of(name)
    node = OFFERED[name]
    with torch.device("meta"):
        network = resolve_name(node["build"])(**node["arguments"], num_classes=num_classes, **more)
    draws = torch.Generator().manual_seed(0)
    for value in network.to_empty(device="cpu").state_dict().values():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=draws)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=draws)
        else:
            value.zero_()
    return network


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def original_weights(network: StagedNet) -> dict[str, Tensor]:
    own = network.state_dict()
    return {original: own[name] for name, original in network.shared_names().items()}


@pytest.mark.parametrize("name", OFFERED)
def test_it_computes_what_it_did_uncut(name, images):
    """Logits, the first gradient, moved statistics and the maps at the cuts, bit for bit, with the same
    random numbers."""
    more = DROPPING.get(name, {})
    whole, network = uncut(name, **more), make(name, arguments=OFFERED[name]["arguments"] | more)
    load_weights(network, whole.state_dict(), name, ROOT)
    assert network.names == [*OFFERED[name]["cuts"], "logits"]
    outputs = {}
    for stage, place in OFFERED[name]["cuts"].items():
        module = dict(whole.named_modules()).get(place)
        if module is not None:
            module.register_forward_hook(lambda *call, stage=stage: outputs.update({stage: call[-1].clone()}))
    logits = []
    for training in (False, True):
        torch.manual_seed(2)
        expected = whole.train(training)(images)
        torch.manual_seed(2)
        features = network.train(training).features(images)
        logits.append(expected)
        assert torch.equal(features["logits"], expected)
        assert len(outputs) > 3
        for stage, output in outputs.items():
            assert torch.equal(features[stage], output)
        assert {stage: output.shape[1:] for stage, output in features.items()} == network.shapes
    assert not torch.equal(*logits)
    assert_close(original_weights(network), dict(whole.state_dict()), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(expected.square().sum(), next(whole.parameters()))
    (own_gradient,) = torch.autograd.grad(features["logits"].square().sum(), next(network.parameters()))
    assert torch.equal(own_gradient, gradient)


def test_files_are_named_as_their_networks():
    assert {file: node["name"] for file, node in OFFERED.items()} == {file: file for file in OFFERED}


def test_slices_compose():
    network, images = cut().eval(), torch.randn(2, 3, 8, 8)
    features = network.features(images)
    for middle, end in (("stem", "stage2"), ("stage2", "embedding"), ("embedding", "logits")):
        assert torch.equal(network.between(None, middle)(images), features[middle])
        assert torch.equal(network.between(middle, end)(features[middle]), features[end])


def test_a_foreign_pair_distils_and_the_student_s_file_loads(tmp_path):
    """Adaptively, with a teacher whose weights come from a file in its package's names."""
    checkpoint = tmp_path / "teacher.pth"
    torch.save(uncut("torchvision_mobilenet_v2", num_classes=10).state_dict(), checkpoint)
    config = compose_config(
        *(f"runs={tmp_path}", "dataset=cifar10", "tracking=none", "distiller=at", "epochs=1", "batch_size=4"),
        *(f"student={SMALL}", "teacher=torchvision_mobilenet_v2", f"teacher.checkpoint={checkpoint}"),
    )
    images = torch.randint(
        0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    part = ImageSet(images, torch.arange(8))
    result = execute(config, assemble(part, part, **build.promises(config)))
    assert list(result["kept"]) == ["stage1", "stage2", "stage3", "logits"]
    path = Run(config).weights
    student = make(SMALL, num_classes=10)
    load_weights(student, read_weights(path), SMALL, path)
    assert_close(dict(student.state_dict()), load_file(path), rtol=0, atol=0)


# Networks made for the purpose


class Norm(nn.BatchNorm2d):
    """A layer derived from PyTorch's, which counts batches by itself."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Plain(nn.Module):
    """Two convolutions with ``between`` them, and what a forward may do by itself: dropout, and a branch on
    the mode."""

    def __init__(self, num_classes: int, between=lambda x: x):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = Norm(4)
        self.between = between
        self.second = nn.Conv2d(4, 4, 3)
        self.rectify = nn.ReLU(inplace=True)
        self.classify = nn.Linear(4, num_classes)
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("offset", torch.tensor(0.5), persistent=False)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.between(self.norm(self.first(x)))
        x = self.rectify(self.second(x)) * self.scale + self.offset
        x = F.dropout(x, 0.5, self.training)
        if self.training:
            x = x + torch.ones(1)
        x = self.classify(F.dropout(x.mean((2, 3)), 0.5, self.training, inplace=True))
        return x * 2 if twice else x


CUTS = {"stem": "norm", "stage1": "second", "stage2": "dropout", "embedding": "mean"}


def cut(
    network: type[nn.Module] = Plain, cuts: dict[str, str] = CUTS, in_channels: int = 3, **arguments
) -> StagedNet:
    target, passes = f"{__name__}.{network.__name__}", {"num_classes": "num_classes"}
    return foreign(
        target, arguments, passes, "plain", cuts, num_classes=7, in_channels=in_channels, image_size=8
    )


def doubled(x: Tensor) -> Tensor:
    x *= 2
    return x


class Branch(nn.Module):
    """What it does depends on values, so that it can only be kept whole."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x.mul_(2))
        return x + 1 if x.sum() > -1e6 else x


class RectifiesInEval(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x.relu_()


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
    "evaluation_alone": RectifiesInEval(),
    "untraceable": nn.Sequential(Branch()),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("between", BETWEEN)
def test_stages_do_the_same_and_overwrite_no_output(between, training):
    whole, network = Plain(7, BETWEEN[between]), cut(between=deepcopy(BETWEEN[between]))
    whole.train(training), network.train(training)
    start = deepcopy(whole.state_dict())
    images = torch.randn(5, 3, 8, 8)

    def stage_by_stage() -> dict[str, Tensor]:
        outputs, x = {}, images
        for name, stage in network.named_children():
            x = stage(x.clone())
            outputs[name] = x.clone()
        return outputs

    torch.manual_seed(0)
    expected = whole(images.clone())
    load_weights(network, start, "plain", ROOT)
    torch.manual_seed(0)
    features = network.features(images)
    moved = original_weights(deepcopy(network))
    torch.manual_seed(0)
    separate = stage_by_stage()

    assert torch.equal(features["logits"], expected)
    assert_close(features, separate, rtol=0, atol=0)
    assert_close(moved, dict(whole.state_dict()), rtol=0, atol=0)
    assert training == bool(moved["norm.running_mean"].any())
    features["logits"].sum().backward()
    assert network.stem.first.weight.grad is not None


def test_cuts_may_be_given_in_any_order():
    assert cut(cuts=dict(reversed(CUTS.items()))).names == ["stem", "stage1", "stage2", "embedding", "logits"]


def test_images_are_not_overwritten():
    class_of_its_own = cut(StartsInPlace, {"stem": "first", "stage1": "second", "embedding": "mean"}).eval()
    images = torch.randn(2, 3, 8, 8)
    before = images.clone()
    class_of_its_own(images)
    assert torch.equal(images, before)


def test_nothing_is_copied_where_nothing_is_overwritten(images, monkeypatch):
    network = make(SMALL)
    monkeypatch.setattr(Tensor, "clone", None)
    network.features(images)


def test_stages_use_the_network_s_weights_under_its_names():
    names = cut().shared_names()
    assert names["stage1.second.weight"] == "second.weight"
    assert sorted(names.values()) == sorted(Plain(7).state_dict())


def test_a_frozen_alias_shares_memory_and_lets_gradients_through():
    network, images = cut(), torch.randn(5, 3, 8, 8, requires_grad=True)
    alias = frozen_alias(network)
    for (name, value), own in zip(alias.state_dict().items(), network.state_dict().values(), strict=True):
        assert value.data_ptr() == own.data_ptr(), name
    assert not any(parameter.requires_grad for parameter in alias.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    alias(images).sum().backward()
    assert images.grad.abs().sum() > 0
    network(images)  # in training
    assert network.training
    assert not alias.training
    with torch.no_grad():
        network.logits.classify.weight += 1
    assert torch.equal(alias(images), network.eval()(images))


def test_a_copy_has_weights_of_its_own():
    network, images = cut().eval(), torch.randn(2, 3, 8, 8)
    before = network(images)
    for parameter in deepcopy(network).parameters():
        parameter.data.zero_()
    assert torch.equal(network(images), before)


# Weights files


@pytest.mark.parametrize("own_names", [True, False])
def test_weights_go_in_by_either_names(own_names):
    network, other = cut(), cut()
    load_weights(other, network.state_dict() if own_names else original_weights(network), "plain", ROOT)
    assert_close(dict(other.state_dict()), dict(network.state_dict()), rtol=0, atol=0)


def test_another_class_count_is_refused_with_both_numbers():
    with pytest.raises(CheckpointError, match=r"^/a\.pt: found 5 classes, expected 7$"):
        load_weights(cut(), Plain(5).state_dict(), "plain", Path("/a.pt"))


@pytest.mark.parametrize("change", ["missing", "stray"])
def test_loading_original_names_is_strict(change):
    weights = dict(Plain(7).state_dict())
    if change == "missing":
        del weights["second.weight"]
    else:
        weights["second.scale"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"^/a\.pt: is not a plain; .*\(second\.\w+\)"):
        load_weights(cut(), weights, "plain", Path("/a.pt"))


# What a stage may not change, and what cannot be cut


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
        (
            Plain,
            {"stage1": "secnd"},
            r"^cuts\.stage1: .*\.Plain .*no 'secnd'\. Did you mean 'second'\? .*: first, norm, .*, dropout, ",
        ),
        (Plain, {"embedding": "idle"}, r"^cuts\.embedding: .* no 'idle'.* first, norm, second"),
        (Plain, {"stage1": "first"}, r"^cuts\.stem: 'norm' does not run before 'first', where stage1 ends"),
        (Plain, {"stage1": "norm"}, r"^cuts\.stem: 'norm' does not run before 'norm'"),
        (Plain, {"embedding": "classify"}, r"^cuts\.embedding: 'classify' does not run before the logits"),
        (
            Plain,
            {"stage2": "mean", "embedding": "dropout_1"},
            r"^stage2: found a tensor of \(4,\) .*, expected a map",
        ),
        (
            Plain,
            {"stage2": "rectify", "embedding": "dropout"},
            r"^embedding: found a tensor of \(4, 4, 4\) .* a vector",
        ),
        (
            Skip,
            CUT_AT_SECOND,
            r"^cuts\.stage1: more than one tensor runs through a cut behind 'second': first, second$",
        ),
        (
            SeesImagesAgain,
            CUT_AT_SECOND,
            r"^cuts\.stem: more than one tensor .* behind 'first': images, first$",
        ),
        (Tied, CUT_AT_SECOND, r"^cuts\.stage1: 'second' stands for several tensors: second, second_1"),
        (
            Tied,
            CUT_AT_SECOND | {"stage1": "relu"},
            r"^cuts: second\.weight would belong to stage1 and embedding",
        ),
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


def test_what_cannot_be_traced_stays_whole_and_may_end_a_stage():
    network = cut(cuts=CUTS | {"stem": "between.0"}, between=nn.Sequential(Branch()))
    assert isinstance(network.stem.between.get_submodule("0"), Branch)


def test_what_lies_in_it_is_not_offered():
    with pytest.raises(
        ConfigError, match=r"Some that it has: first, norm, between, second, rectify, classify, "
    ):
        cut(cuts=CUTS | {"stage1": "nowhere"}, between=Branch())


def test_a_cut_in_what_cannot_be_traced_is_refused_with_the_reason():
    with pytest.raises(
        ConfigError,
        match=r"^cuts\.stage1: 'between\.0\.inner' lies in 'between\.0', .* cannot trace \(.*control flow",
    ):
        cut(cuts=CUTS | {"stage1": "between.0.inner"}, between=nn.Sequential(Branch()))


# Which axes of a map are which

SWIN_CUTS = {
    "stem": "features.0", "stage1": "features.1", "stage2": "features.3", "embedding": "flatten",
}  # fmt: skip


def test_swin_s_maps_with_channels_last_are_refused_by_stage():
    with torch.device("meta"), pytest.raises(ConfigError) as told:
        foreign("torchvision.models.swin_t", {}, {"num_classes": "num_classes"}, "swin", SWIN_CUTS, 7, 3, 32)
    found = "cuts.stem: found maps of 8x8x96 in torchvision.models.swin_t, not channels x height x width"
    assert str(told.value).startswith(found)


class Axes(nn.Module):
    """A network with maps of any axes. ``order``: of channels (1), height (2) and width (3)."""

    def __init__(
        self, order: tuple[int, ...], channels: int, kernel: list[int], size: int | None, classes: int
    ):
        super().__init__()
        self.order, self.size = order, size
        pool = nn.Identity() if kernel else nn.AdaptiveAvgPool2d(3)
        self.first = nn.Sequential(nn.Conv2d(3, channels, kernel or 1, stride=kernel or 1), pool)
        self.last = nn.Identity()
        self.classify = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        if self.size is not None:  # as a position embedding takes one size alone
            x = x + torch.zeros(self.size, self.size, device=x.device)
        x = self.last(x.permute(0, *self.order))
        return self.classify(x.mean([1 + self.order.index(2), 1 + self.order.index(3)]))


AXES = {  # order, channels, kernel or none, whether it takes one size alone; for images of 8x8
    "usual": ((1, 2, 3), 6, [2, 2], False),
    "as many channels as rows": ((1, 2, 3), 4, [2, 2], False),
    "as many as columns alone": ((1, 2, 3), 8, [2, 1], False),
    "a pixel": ((1, 2, 3), 4, [8, 8], False),
    "one size alone": ((1, 2, 3), 6, [2, 2], True),
    "one size, lengths alike": ((1, 2, 3), 4, [2, 2], True),
    "channels last": ((2, 3, 1), 6, [2, 2], False),
    "channels last, lengths alike": ((2, 3, 1), 4, [2, 2], False),
    "channels last, a pixel": ((2, 3, 1), 4, [8, 8], False),
    "channels last, one size alone": ((2, 3, 1), 6, [2, 2], True),
    "pooled to a size": ((1, 2, 3), 6, [], False),
    "channels last, pooled to a size": ((2, 3, 1), 6, [], False),
    "channels amid": ((2, 1, 3), 6, [2, 2], False),
    "width first": ((3, 2, 1), 6, [2, 1], False),
}


@pytest.mark.parametrize(("order", "channels", "kernel", "one_size"), AXES.values(), ids=AXES)
def test_a_map_passes_where_its_last_axes_are_height_and_width(order, channels, kernel, one_size):
    arguments = {"order": order, "channels": channels, "kernel": kernel, "size": 4 if one_size else None}
    cuts = {"stem": "first", "stage1": "last", "embedding": "mean"}
    make_it = partial(
        foreign, f"{__name__}.Axes", arguments, {"num_classes": "classes"}, "axes", cuts, 7, 3, 8
    )
    if order == (1, 2, 3):
        network = make_it()
        assert network.training
        height, width = (8 // length for length in kernel) if kernel else (3, 3)
        assert network.shapes["stage1"] == (channels, height, width)
    else:
        with pytest.raises(ConfigError, match=r"^cuts\.stage1: found maps of .* in tests\.test_cut\.Axes"):
            make_it()


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["stem", "embedding"],
        ["stem", "stage2", "embedding"],
        ["stem", "stage1"],
        ["stem", "stage1", "logits"],
    ],
)
def test_stages_other_than_the_usual_are_refused(names):
    with pytest.raises(
        ConfigError,
        match=rf"^cuts(: found {', '.join(names) or 'none'}|.logits: no such stage), expected stem, ",
    ):
        cut(cuts=dict.fromkeys(names, "norm"))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"in_channels": 1}, r"in_channels: found 1, torchvision\.models\.shufflenet_v2_x1_0 takes 3 "),
        ({"passes": {}}, r"num_classes: found 7, torchvision\.models\.shufflenet_v2_x1_0 has 1000 outputs"),
        ({"passes": {"num_clases": "n"}}, r"passes\.num_clases: no such key; .*Did you mean 'num_classes'"),
        (
            {"passes": {"num_classes": "classes"}},
            r"arguments\S*: torchvision\.models\.shuffl.* does not take .*classes",
        ),
        ({"build": "torchvision.models.shufle"}, r"build: cannot import torchvision\.models\.shufle"),
        (
            {"build": "no_such_package.net"},
            r"build: cannot import no_such_package\.net: there is no 'no_such_package'",
        ),
        ({"build": "builtins.dict"}, r"build: builtins\.dict made a dict, expected a network"),
    ],
)
def test_builders_are_refused_by_key(changed, error):
    node = {"name": SMALL, **OFFERED[SMALL], "num_classes": 7, "in_channels": 3, "image_size": 32, **changed}
    with pytest.raises(ConfigError, match=rf"^student\.{error}"):
        build.make(node, "student")


def test_timm_takes_grey_images():
    network = make("timm_mobilenetv3_small_050", in_channels=1)
    assert network.stem.conv_stem.in_channels == 1
    assert network.input_shape == (1, 32, 32)


def test_cutting_keeps_the_mode_and_the_random_stream():
    torch.manual_seed(0)
    Plain(7)
    expected = torch.rand(1)
    torch.manual_seed(0)
    network = cut()
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in network.modules())
    assert int(network.stem.norm.num_batches_tracked) == 0
