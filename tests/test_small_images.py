"""Folders of small images: in memory, or decoded when they are needed, they are what CIFAR's own reader
gives."""

import hashlib
import pickle
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from torchvision.datasets import CIFAR10

from sakd.configuration import Config, build, digest
from sakd.data import Dataset, ImageSet, evaluation_batches, train_batches
from sakd.data.small import HeldImages, SmallImages
from sakd.errors import ConfigError, DataError
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.streams import stream
from tests.conftest import compose_config

CLASSES = 10
OF_EACH = {"train": 3, "test": 1}


def images_of(part: str) -> Tensor:
    """Random images, uint8 [N, 3, 32, 32], sorted by class."""
    draws = torch.Generator().manual_seed(len(part))
    return torch.randint(0, 256, (CLASSES * OF_EACH[part], 3, 32, 32), dtype=torch.uint8, generator=draws)


def write_folder(root: Path) -> Path:
    for part, count in OF_EACH.items():
        for number, pixels in enumerate(images_of(part)):
            path = root / part / f"class{number // count}" / f"{number % count}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return root


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same images as CIFAR-10's pickled batches, whose checksums the reader then expects."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def written(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part, count in OF_EACH.items():
        labels = torch.arange(CLASSES).repeat_interleave(count).tolist()
        md5 = written(part, {"data": images_of(part).flatten(1).numpy(), "labels": labels})
        monkeypatch.setattr(CIFAR10, f"{part}_list", [[part, md5]])
    md5 = written("batches.meta", {"label_names": [f"class{number}" for number in range(CLASSES)]})
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "cifar10")


def small(root: Path, *overrides: str) -> Config:
    keys = (f"dataset.root={root}", "dataset.workers=0", "tracking=none", f"runs={root}/../runs")
    return compose_config("dataset=small_images", *keys, *overrides)


@contextmanager
def uncounted(text: str, total: int):
    yield lambda more: None


def ready(config: Config) -> Dataset:
    return build.dataset(config).ready(Path(config["runs"]) / ".checked_images", uncounted)


def batches(dataset: Dataset) -> list:
    train = train_batches(dataset, 7, stream(0, "data", 1))
    return [*train, *evaluation_batches(dataset.test, dataset, 4)]


def test_cifar_as_png_folder_trains_to_the_numbers_of_its_pickled_batches(folder, tmp_path, monkeypatch):
    pickled = (f"dataset.root={write_cifar10(tmp_path / 'data', monkeypatch)}", f"runs={tmp_path}/runs")
    training = ("distiller=none", "student=resnet8", "epochs=2", "batch_size=8", "threads=1")
    moments = ready(small(folder))
    same = (f"dataset.mean={list(moments.mean)}", f"dataset.std={list(moments.std)}", "tracking=none")
    runs = [
        small(folder, *training),
        compose_config("dataset=cifar10", *pickled, *training, *same),
    ]
    own, cifars = map(execute, runs)
    assert (own["dataset"], cifars["dataset"]) == ("cifar10_folder", "cifar10")
    ours, theirs = (load_file(Run(config).weights) for config in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    told = [
        [{key: value for key, value in line.items() if key not in ("time", "seconds", "images_per_second")}
         for line in Run(config).metrics()]
        for config in runs
    ]  # fmt: skip
    assert told[0] == told[1]
    assert own["moments"] == {"mean": [*moments.mean], "std": [*moments.std]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "parts"), [(0, ("dataset.val_fraction=0.2", "dataset.train_samples=20")), (2, ())]
)
def test_batches_are_those_of_images_in_memory_wherever_the_files_are_decoded(folder, workers, parts):
    memory, files = (
        ready(small(folder, f"dataset.in_memory={held}", f"dataset.workers={workers}", *parts))
        for held in (True, False)
    )
    assert (type(memory.train), type(files.train)) == (HeldImages, SmallImages)
    assert_close(batches(memory), batches(files), rtol=0, atol=0)
    if not parts:
        plain = [ImageSet(images_of(part), getattr(memory, part).labels) for part in OF_EACH]
        alike = Dataset(*plain, None, CLASSES, 32, memory.mean, memory.std, memory.augmentation)
        assert_close(batches(memory), batches(alike), rtol=0, atol=0)


def test_a_run_may_go_on_with_its_images_elsewhere(folder):
    """They are told from others by their files."""
    configs = [small(folder, f"dataset.in_memory={held}") for held in ("auto", "true", "false")]
    assert len({digest(config) for config in configs}) == 1
    assert len({ready(config).checksum for config in configs} | {build.dataset(configs[0]).checksum}) == 1
    (folder / "train/class3/0.png").write_bytes((folder / "train/class3/1.png").read_bytes() + b"\0")
    assert ready(configs[0]).checksum != build.dataset(small(write_folder(folder.parent / "other"))).checksum


@pytest.mark.parametrize("limit", [40 * 3 * 32 * 32, 40 * 3 * 32 * 32 - 1])
def test_images_are_held_in_memory_by_themselves_where_all_are_small(folder, limit, monkeypatch):
    monkeypatch.setattr("sakd.data.small.MOST_BYTES", limit)
    assert build.dataset(small(folder)).train.held is (limit == 40 * 3 * 32 * 32)


def test_name_and_classes_follow_the_folder_and_are_no_other_data_set_s(folder):
    node = small(folder)["dataset"]
    assert (node["name"], node["classes"]) == ("cifar10_folder", CLASSES)
    assert small("/nowhere/photos")["dataset"]["classes"] == 10  # the reader misses the folder
    with pytest.raises(DataError, match=r"dataset\.root=/nowhere/photos: no folder"):
        build.dataset(small("/nowhere/photos"))
    with pytest.raises(ConfigError, match=r"^dataset\.name: found cifar100, as which sakd\.data\.cifar100's"):
        build.dataset(small(folder, "dataset.name=cifar100"))


def test_mean_and_deviation_are_those_of_the_images_that_are_trained_on_and_are_remembered(folder):
    config = small(folder, "dataset.val_fraction=0.2")
    dataset = ready(config)
    pixels = dataset.train.images.transpose(0, 1).flatten(1).double() / 255
    assert dataset.mean == tuple(round(float(channel.mean()), 4) for channel in pixels)
    assert dataset.std == tuple(round(float(channel.std(unbiased=False)), 4) for channel in pixels)
    (kept,) = Path(config["runs"], ".moments").iterdir()
    kept.write_text(kept.read_text().replace(str(dataset.mean[0]), "0.1"))
    with pytest.raises(Exception, match=rf"{kept.name}: found checksum"):
        ready(config)
    given = ready(small(folder, "dataset.mean=[0,0,0]", "dataset.std=[1,1,1]"))
    assert (given.mean, given.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("held", ["true", "false"])
def test_files_that_cannot_be_used_are_named_before_training(folder, held):
    damaged = folder / "train/class4/1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    Image.new("RGB", (32, 33)).save(folder / "test/class7/0.png")
    with pytest.raises(DataError) as raised:
        execute(small(folder, f"dataset.in_memory={held}", "distiller=none", "student=resnet8"))
    assert str(raised.value).startswith(f"{damaged}: cannot be read (")
    assert str(raised.value).endswith(f"In all 2 files cannot be read: also {folder}/test/class7/0.png")
    damaged.unlink()
    with pytest.raises(DataError, match=r"0\.png: found an image of 32x33, expected 32x32"):
        ready(small(folder, f"dataset.in_memory={held}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.in_memory=yess", r"^dataset\.in_memory: found 'yess'"),
        ("dataset.mean=[0.5]", r"^dataset\.mean: found \[0\.5\], expected a list of 3: .* or null"),
        ("+dataset.augmentation={}", r"^dataset\.augmentation: no such key"),
        ("dataset.crop_padding=33", r"^dataset\.crop_padding: found 33"),
    ],
)
def test_mistakes_are_told_before_any_folder_is_looked_at(override, message):
    with pytest.raises(ConfigError, match=message):
        build.dataset(small("/nowhere", override))


def test_a_channel_that_is_the_same_everywhere_has_no_deviation(tmp_path):
    for part in OF_EACH:
        for name in ("a", "b"):
            path = tmp_path / part / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (9, 9, 9)).save(path)
    with pytest.raises(DataError, match=r"^dataset\.std: found 0 for a channel"):
        ready(small(tmp_path))
