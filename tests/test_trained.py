"""What is done with a finished run's network."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import sakd
from sakd.configuration import build
from sakd.errors import CheckpointError, RunError
from sakd.networks import resnet8
from sakd.networks.cost import cost
from sakd.networks.described import KEY
from sakd.runs import Run
from sakd.runs.job import execute
from tests.conftest import TINY, compose_config


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Run:
    """A student with its teacher, each of one epoch, shared by the tests that only read."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    config = compose_config(*TINY[:-1], "epochs=1", f"runs={runs}", "tracking=none", "distiller=kd")
    execute(config)
    return Run(config)


@pytest.fixture(scope="module")
def digits(taught):
    return build.dataset(taught.config).test


def accuracy(module: torch.nn.Module, images) -> float:
    logits = torch.cat([module(batch) for batch in images.plain(64)])
    return 100 * (logits.argmax(1) == images.labels).float().mean().item()


# sakd.load


@torch.no_grad()
def test_a_run_is_loaded_as_a_module_that_gives_its_accuracy_by_itself(taught, digits):
    student = sakd.load(taught.folder)
    assert not student.training
    assert accuracy(student, digits) == pytest.approx(taught.result()["student"]["accuracy"])
    by_name = sakd.load(taught.name[:-3], runs=taught.folder.parent)
    images = next(digits.plain(8))
    assert_close(by_name(images), student(images), rtol=0, atol=0)


@torch.no_grad()
def test_the_weights_file_alone_is_enough(taught, digits, tmp_path):
    moved = tmp_path / "student.safetensors"
    moved.write_bytes(taught.weights.read_bytes())
    images = next(digits.plain(8))
    assert_close(sakd.load(moved)(images), sakd.load(taught.folder)(images), rtol=0, atol=0)


def described(taught: Run, path: Path, **changes) -> Path:
    """The run's weights with other words of their network."""
    header = taught.weights.read_bytes()
    length = int.from_bytes(header[:8], "little")
    about = json.loads(json.loads(header[8 : 8 + length])["__metadata__"][KEY])
    about["network"] |= changes
    save_file(load_file(taught.weights), path, {KEY: json.dumps(about)})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"_target_": "subprocess.run"},
        {"_target_": "sakd.networks.foreign", "build": "os.system"},
        {"width": {"_target_": "subprocess.run"}},
    ],
)
def test_a_file_that_names_others_code_is_refused_before_any_is_run(changes, taught, tmp_path):
    path = described(taught, tmp_path / "a.safetensors", **changes)
    with pytest.raises(CheckpointError, match=r"^.*/a\.safetensors: found .*, expected a network of sakd"):
        sakd.load(path)


def test_files_and_folders_that_are_no_trained_network_are_named(taught, tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(taught.weights), plain)
    with pytest.raises(CheckpointError, match=r"plain\.safetensors: found no word of its network"):
        sakd.load(plain)
    save_file(load_file(taught.weights), plain, {KEY: "[1]"})
    with pytest.raises(CheckpointError, match=r"plain\.safetensors: found \[1\], expected what a run writes"):
        sakd.load(plain)
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth: found a file that does not say"):
        sakd.load(tmp_path / "weights.pth")
    with pytest.raises(RunError, match="found no such run"):
        sakd.load("nothing", runs=tmp_path)


def test_the_same_run_writes_the_same_file(taught, tmp_path):
    execute({**taught.config, "runs": str(tmp_path)})
    assert (tmp_path / taught.name / "student.safetensors").read_bytes() == taught.weights.read_bytes()


# cost


def test_parameters_and_multiply_adds_are_counted_and_stored(taught):
    """A convolution of 3x3 from 16 to 16 channels over 8x8 positions takes 9 * 16 * 16 * 64 of them."""
    network = resnet8(10, 1, 8)
    by_hand = 9 * 16 * 64 + 2 * 9 * 16 * 16 * 64  # stem, stage1
    by_hand += (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32) * 16 + (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64) * 4
    found = cost(network.train())
    assert found == {
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiply_adds": by_hand + 640,
    }
    assert network.training
    assert taught.result()["cost"] == {"student": found, "teacher": found}
