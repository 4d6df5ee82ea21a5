"""Weights files: what is read back is what was written, and nothing else is let in."""

import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from sakd.errors import CheckpointError
from sakd.networks import StagedNet, resnet8, resnet8x4, resnet14, vgg8, wrn_16_1
from sakd.networks.checkpoints import load_weights, read_weights
from sakd.streams import initialising

Weights = dict[str, Tensor]

WRITERS: dict[str, Callable[[Weights, Path], None]] = {
    "weights.safetensors": save_file,
    "weights.pt": torch.save,
    "model.pth": lambda weights, path: torch.save({"epoch": 240, "model": weights}, path),
}


def network(seed: int = 0, classes: int = 10) -> StagedNet:
    with initialising(seed, "weights"):
        made = resnet8(classes, 1, 8)
        made(torch.rand(4, 1, 8, 8))  # moves the running statistics
    return made


@pytest.fixture(params=WRITERS)
def written(request, tmp_path) -> Path:
    path = tmp_path / request.param
    WRITERS[request.param](network().state_dict(), path)
    return path


def test_what_is_read_is_what_was_written(written):
    prefix = "model." if written.name == "model.pth" else ""
    expected = {f"{prefix}{name}": value for name, value in network().state_dict().items()}
    assert_close(read_weights(written), expected, rtol=0, atol=0)


def test_loading_replaces_every_weight_and_statistic(written):
    other = network(seed=1)
    load_weights(other, read_weights(written), "resnet8", written)
    assert_close(dict(other.state_dict()), dict(network().state_dict()), rtol=0, atol=0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/none\.pt: no such file"):
        read_weights(tmp_path / "none.pt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_weights(tmp_path)


def test_a_file_cut_short_anywhere_is_named(written):
    whole = written.read_bytes()
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        written.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"{written}: cannot be read"):
            read_weights(written)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_text_file_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("accuracy 0.73\n" * 20)
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
        read_weights(path)


@pytest.mark.parametrize("text", ["", "hello", "accuracy"])
def test_what_pickle_stumbles_over_is_told_in_words(tmp_path, text):
    (tmp_path / "weights.pt").write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be read as weights \(it is damaged or holds more"):
        read_weights(tmp_path / "weights.pt")


class WritesWhenUnpickled:
    """Pickles as a call that writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def write_plain_pickle(content: object, path: Path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, write_plain_pickle])
def test_a_pickle_that_would_execute_something_is_refused_and_does_not(tmp_path, write):
    trap, path = tmp_path / "trap", tmp_path / "weights.pt"
    write({**network().state_dict(), "extra": WritesWhenUnpickled(trap)}, path)
    with pytest.raises(CheckpointError, match=rf"{path}: cannot be read as weights \(") as refusal:
        read_weights(path)
    assert "weights_only" not in str(refusal.value)  # no advice to load it all the same
    assert not trap.exists()
    with suppress(RuntimeError):  # what is no torch file fails, but too late
        torch.load(path, weights_only=False)
    assert trap.read_text() == "executed"


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {}, {"epoch": 3}, {"model": {"lr": 0.1}}, {"model": {}}]
)
def test_a_file_without_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"{path}: found .*; expected weights"):
        read_weights(path)


@pytest.mark.parametrize(
    "other",
    [resnet14(10, 1, 8), resnet8x4(10, 1, 8), vgg8(10, 1, 8), wrn_16_1(10, 1, 8), resnet8(10, 3, 8)],
    ids=["deeper", "wider", "vgg", "wrn", "of_colour_images"],
)
def test_another_network_s_weights_are_refused_and_change_nothing(other):
    own = network()
    with pytest.raises(CheckpointError, match=r"^/a/b\.pt: is not (a|this) resnet8; "):
        load_weights(own, other.state_dict(), "resnet8", Path("/a/b.pt"))
    assert_close(dict(own.state_dict()), dict(network().state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["missing", "stray"])
def test_loading_is_strict(change):
    weights = dict(network().state_dict())
    if change == "missing":
        del weights["stage3.0.bn2.running_var"]
    else:
        weights["stage3.0.bn3.running_var"] = torch.ones(64)
    with pytest.raises(CheckpointError, match=r"^/a/b\.pt: .*stage3\.0\.bn\d\.running_var"):
        load_weights(network(), weights, "resnet8", Path("/a/b.pt"))


def test_another_number_of_classes_is_refused_with_both_numbers():
    with pytest.raises(CheckpointError, match=r"^/a/b\.pt: found 100 classes, expected 10$"):
        load_weights(network(), network(classes=100).state_dict(), "resnet8", Path("/a/b.pt"))


UNFIT: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda weight: weight.clone().index_fill_(0, torch.tensor(1), float("nan")),
    "infinite": lambda weight: weight.double() * 1e300,
    "complex64": lambda weight: weight.to(torch.complex64),
    "int64": lambda weight: weight.to(torch.int64),
    "meta": lambda weight: weight.to("meta"),
    "not dense": lambda weight: weight.to_sparse(),
    "quantised": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # PyTorch is about to have none
@pytest.mark.parametrize("told", UNFIT)
def test_weights_that_are_no_finite_numbers_are_refused_by_tensor_and_change_nothing(told, tmp_path):
    path, own, name = tmp_path / "weights.pt", network(), "stage2.0.conv1.weight"
    weights = dict(network(seed=1).state_dict())
    weights[name] = UNFIT[told](weights[name])
    with pytest.raises(CheckpointError, match=rf"^{path}: found .*{told}.* in {name}, expected finite"):
        load_weights(own, weights, "resnet8", path)
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=rf"^{path}: "):  # some PyTorch itself does not read
        load_weights(own, read_weights(path), "resnet8", path)
    assert_close(dict(own.state_dict()), dict(network().state_dict()), rtol=0, atol=0)


def test_a_count_that_is_no_whole_number_is_refused():
    weights = dict(network().state_dict())
    name = next(name for name in weights if name.endswith("num_batches_tracked"))
    told = rf"^/a/b\.pt: found torch.float32 in {name}, expected finite whole numbers$"
    with pytest.raises(CheckpointError, match=told):
        load_weights(network(), weights | {name: torch.tensor(1.5)}, "resnet8", Path("/a/b.pt"))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken(kind):
    own = network()
    weights = {
        name: value.to(kind) if value.is_floating_point() else value
        for name, value in network(seed=1).state_dict().items()
    }
    load_weights(own, weights, "resnet8", Path("/a/b.pt"))
    assert_close(own.state_dict()["logits.bias"], weights["logits.bias"].float(), rtol=0, atol=0)
