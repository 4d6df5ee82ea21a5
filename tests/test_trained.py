"""What is done with a finished run's network."""

import json
from dataclasses import replace
from math import log
from pathlib import Path
from shutil import copytree

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import sakd
from sakd.cli import main
from sakd.configuration import build
from sakd.data import ImageSet
from sakd.errors import CheckpointError, ExportError, RunError
from sakd.networks import resnet8
from sakd.networks.cost import cost
from sakd.networks.described import KEY
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.trained import cost as of_trained
from sakd.trained import read
from sakd.trained.evaluate import calibration_error, evaluate
from sakd.trained.export import FORMATS, check, export
from sakd.trained.load import _stranger
from sakd.trained.probe import probe
from tests.conftest import ROOT, TINY, compose_config, skip_without_package_of


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
        {"width": [{"_target_": "subprocess.run"}]},
        {"_target_": "sakd.networks.foreign", "build": "timm.create_model", "name_": "hf-hub:a/b"},
    ],
)
def test_a_file_that_names_others_code_is_refused_before_any_is_run(changes, taught, tmp_path):
    path = described(taught, tmp_path / "a.safetensors", **changes)
    with pytest.raises(CheckpointError, match=r"^.*/a\.safetensors: found .*, expected a network of sakd"):
        sakd.load(path)


@pytest.mark.parametrize("path", sorted((ROOT / "conf/network").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_network_of_conf_is_taken_for_others_code(path):
    assert _stranger(yaml.safe_load(path.read_text())) is None


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


@pytest.mark.slow
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


# sakd evaluate


def sakd_cli(*arguments: object):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_a_run_is_evaluated_as_it_was_when_it_finished(taught, digits):
    done = sakd_cli("evaluate", taught.folder, "--format", "json", "--device", "cpu")
    assert done.exit_code == 0, done.output
    found, stored = json.loads(done.output), taught.result()
    assert found["top1"] == pytest.approx(stored["student"]["accuracy"])
    assert found["teacher_accuracy"] == pytest.approx(stored["teacher"]["accuracy"])
    assert found["loss"] == pytest.approx(taught.metrics()[-1]["test/loss"], rel=1e-5)
    assert found["images"] == len(digits) == sum(one["images"] for one in found["classes"])
    assert len(found["classes"]) == 10
    by_class = [one["images"] * one["accuracy"] for one in found["classes"]]
    assert sum(by_class) / len(digits) == pytest.approx(found["top1"])


@torch.no_grad()
def test_what_is_measured_is_what_its_words_say():
    """By hand: four images of six classes, with probabilities that are known."""
    probabilities = torch.tensor(
        [
            [0.50, 0.10, 0.10, 0.10, 0.10, 0.10],  # right, sure by 0.5
            [0.10, 0.50, 0.10, 0.10, 0.15, 0.05],  # its class, 5, is the last one
            [0.05, 0.05, 0.70, 0.10, 0.05, 0.05],  # right
            [0.05, 0.05, 0.70, 0.10, 0.05, 0.05],  # a 3, taken for a 2
        ]
    )
    images = ImageSet(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([0, 5, 2, 3]))

    class Known(torch.nn.Module):
        def forward(self, images):
            return probabilities[images.view(-1).long()].log()

    class Teacher(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.tensor([0, 5, 2, 2]), 6).float()

    found = evaluate(Known(), images, torch.device("cpu"), Teacher())
    assert (found.top1, found.top5, found.agreement, found.teacher_accuracy) == (50, 75, 75, 75)
    assert found.loss == pytest.approx(-sum(map(log, (0.5, 0.05, 0.7, 0.1))) / 4)
    # Two bins: half of each is right, with mean confidences 0.5 and 0.7.
    assert found.calibration_error == pytest.approx(100 * (0.5 * 0 + 0.5 * 0.2))
    assert [(one.label, one.accuracy, one.most_taken_for) for one in found.classes] == [
        (0, 100, None), (2, 100, None), (3, 0, 2), (5, 0, 1)
    ]  # fmt: skip
    assert found.classes[1].precision == 50


def test_calibration_of_a_network_that_knows_how_sure_it_may_be_is_right():
    confidence = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    correct = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < confidence
    assert calibration_error(confidence, correct) < 0.01
    assert calibration_error(torch.ones(4), torch.tensor([True, True, False, False])) == 0.5


def test_what_cannot_be_evaluated_is_named(taught, tmp_path):
    file = tmp_path / "student.safetensors"
    file.write_bytes(taught.weights.read_bytes())
    for arguments, told in (
        ((file,), "dataset: found none, expected dataset=NAME"),
        ((taught.folder, "epochs=3"), "epochs=3: found no key of a data set"),
        ((taught.folder, "dataset.rot=3"), "dataset.rot: no such key of digits"),
        ((taught.folder, "--split", "val"), "--split: found val, expected train or test"),
        ((taught.folder, "dataset=digits", "dataset.classes=11"), "dataset.classes: found 11"),
        ((taught.folder, "dataset.train_samples=100"), "found images with checksum"),
        ((taught.folder, "--linear-probe", "--split", "test"), "--split: found test beside --linear-probe"),
    ):
        done = sakd_cli("evaluate", *arguments)
        assert (done.exit_code, told in done.output) == (1, True), done.output
        assert "Traceback" not in done.output


def test_a_student_whose_teacher_is_gone_is_evaluated_without_it(taught, tmp_path):
    copy = tmp_path / "runs" / taught.name
    copytree(taught.folder, copy)
    result = json.loads((copy / "result.json").read_text())
    result["teacher"]["source"] = "nowhere.safetensors"
    del result["sha256"]
    (copy / "result.json").write_text(json.dumps(result))
    done = sakd_cli("evaluate", copy)
    assert done.exit_code == 0
    assert "nothing of the teacher: nowhere.safetensors: no such file" in done.output
    assert "top-1" in done.output
    assert "agrees with" not in done.output


def test_a_probe_learns_other_classes_from_features_and_changes_nothing_of_the_network(taught):
    trained = read(taught.folder)
    before = {name: value.clone() for name, value in trained.network.state_dict().items()}
    dataset = build.dataset(taught.config)
    tens = replace(
        dataset, train=ImageSet(*halves(dataset.train)), test=ImageSet(*halves(dataset.test)), classes=2
    )
    found = probe(trained, tens, torch.device("cpu"))
    assert found.features == 64
    assert found.test_accuracy > 75  # below or from 5 on: a chance of a half
    assert_close(trained.network.state_dict(), before, rtol=0, atol=0)
    assert probe(trained, tens, torch.device("cpu")) == found


def halves(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in twice their size, and whether the digit is 5 or more."""
    larger = images.images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return larger, (images.labels >= 5).long()


# sakd export


@pytest.fixture(autouse=True)
def _hardly_timed(monkeypatch):
    monkeypatch.setattr(of_trained, "SECONDS", 0.0)


@pytest.mark.slow
def test_a_program_gives_what_the_network_gives_and_takes_images_as_they_are_stored(taught, digits, tmp_path):
    output = tmp_path / "student.pt2"
    done = sakd_cli("export", taught.folder, "--to", "torch.export", "--output", output)
    assert done.exit_code == 0, done.output
    program = torch.export.load(output).module()
    with torch.no_grad():
        assert accuracy(program, digits) == pytest.approx(taught.result()["student"]["accuracy"])
    student = taught.result()["cost"]["student"]
    for told in (
        f"{student['parameters']:,}",
        f"{student['multiply_adds']:,}",
        "ms for 64 images",
        "100.0 %",
    ):
        assert told in done.output


def test_weights_alone_are_read_by_sakd_load_and_say_the_same(taught, digits, tmp_path):
    output = tmp_path / "a.safetensors"
    assert sakd_cli("export", taught.folder, "--to", "safetensors", "--output", output).exit_code == 0
    images = next(digits.plain(8))
    with torch.no_grad():
        assert_close(sakd.load(output)(images), sakd.load(taught.folder)(images), rtol=0, atol=0)


def test_what_gives_other_numbers_than_the_network_is_refused_and_not_written(taught, digits, tmp_path):
    trained = read(taught.folder)
    with torch.no_grad():
        for runs, told in (
            (lambda images: trained.network(images) * 1.001, "found logits that differ by"),
            (lambda images: trained.network(images) * float("nan"), "found logits that differ by nan"),
        ):
            with pytest.raises(ExportError, match=told):
                check(trained, runs, False, digits)
    for arguments, told in (
        (("--to", "checkpoint", "--normalise"), "--normalise: checkpoint holds weights alone"),
        (("--to", "safetensors", "--output", taught.weights), "is the run's own file"),
        (("--to", "safetensors", "--output", tmp_path / "no" / "a"), "--output: found no folder"),
        (("--to", "safetensors", "dataset.root=3"), "dataset.root: no such key of digits"),
    ):
        done = sakd_cli("export", taught.folder, *arguments)
        assert (done.exit_code, told in done.output) == (1, True), done.output
        assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())
    assert taught.result() is not None  # its file is as it was


class Sorted(torch.nn.Module):
    """A layer whose forward depends on its values, which no program can hold."""

    def forward(self, x):
        return x if x.sum().item() > 1e9 else x + 0


@pytest.mark.slow
def test_a_layer_that_a_format_cannot_hold_is_named(taught, digits, tmp_path):
    trained = read(taught.folder)
    trained.network.stage2.add_module("odd", Sorted())
    for to in ("torch.export", "onnx"):
        with pytest.raises(ExportError, match=rf"{to} cannot hold stage2\.odd, a Sorted"):
            export(trained, to, tmp_path / "a", None, digits)
    assert not list(tmp_path.iterdir())


FAMILIES = (
    "MobileNetV1", "MobileNetV2_half", "ResNet18", "ShuffleNetV1", "ShuffleNetV2", "resnet8", "resnet8x4",
    "vgg8", "vgg8_imagenet", "wrn_16_1", "timm_resnet18", "timm_mobilenetv3_small_050",
    "timm_vit_tiny_patch16_224", "timm_deit_tiny_distilled_patch16_224", "torchvision_resnet18",
    "torchvision_mobilenet_v2", "torchvision_shufflenet_v2_x1_0", "torchvision_vgg11_bn",
    "torchvision_swin_t", "torchvision_vit_b_16",
)  # fmt: skip


def family(network: str) -> str:
    """Of which design a network is; of another package's, its YAML says it."""
    node = yaml.safe_load((ROOT / "conf/network" / f"{network}.yaml").read_text())
    if "build" in node:
        return node["family"]
    with torch.device("meta"):
        return build.make(node | {"num_classes": 10, "in_channels": 3, "image_size": 32}, "student").family


@pytest.mark.slow
def test_every_family_of_networks_is_exported():
    every = {family(path.stem) for path in (ROOT / "conf/network").glob("*.yaml")}
    assert {family(network) for network in FAMILIES} == every


@pytest.mark.slow
@pytest.mark.parametrize("network", FAMILIES)
def test_students_of_every_family_give_the_run_s_accuracy_in_every_format(network, tmp_path):
    skip_without_package_of(network)
    pytest.importorskip("onnxscript")
    config = compose_config(
        "dataset=cifar10", "experiment=debug", "distiller=none", f"student={network}", "epochs=1",
        "dataset.train_samples=64", "dataset.test_samples=64", f"runs={tmp_path}/runs", "tracking=none",
    )  # fmt: skip
    result = execute(config)
    trained = read(Run(config).folder)
    test = build.dataset(config).test
    for to in FORMATS:
        output = tmp_path / f"student.{to}"
        found = export(trained, to, output, None, test)
        assert found.accuracy == pytest.approx(result["student"]["accuracy"]), to
        assert found.images == 64
        assert output.stat().st_size > 4 * result["cost"]["student"]["parameters"]
    assert export(trained, "onnx", tmp_path / "b", False, test).accuracy == found.accuracy
