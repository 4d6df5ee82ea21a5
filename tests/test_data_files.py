"""Data sets of image files: Tiny-ImageNet's archive, and folders of classes that are decoded while
training."""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from sakd.configuration import Config, build, digest
from sakd.configuration.compose import compose_one
from sakd.data import Augmentation, Dataset, ImageSet, evaluation_batches, tiny_imagenet, train_batches
from sakd.data.files import ImageFiles
from sakd.data.folders import images_of
from sakd.errors import ConfigError, DataError
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.streams import stream
from sakd.training import Cohort
from tests.conftest import ROOT, compose_config
from tests.test_resume import KILLED, assert_same_runs, in_a_process


def write_image(path: Path, seed: int, size: tuple[int, int], mode: str = "RGB") -> None:
    """Smooth noise around a colour of its own, as ``path``'s ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    colour, noise = draws.integers(40, 216, 3), draws.integers(-40, 40, (4, 4, 3))
    Image.fromarray((colour + noise).astype("uint8")).resize(size, Image.Resampling.BICUBIC).convert(
        mode
    ).save(path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


# Tiny-ImageNet

WNIDS = ("n02124075", "n01443537", "n04067472")  # not sorted, as in the real wnids.txt
TRAIN_IMAGES, TEST_IMAGES = 6, 4  # of each class


def write_tiny_imagenet(root: Path) -> Path:
    """A small archive in the real layout, every fifth image grey."""
    folder = root / "tiny-imagenet-200"
    seeds = iter(range(1000))

    def write(path: Path) -> None:
        seed = next(seeds)
        write_image(path, seed, (64, 64), "L" if seed % 5 == 0 else "RGB")

    for wnid in WNIDS:
        for number in range(TRAIN_IMAGES):
            write(folder / f"train/{wnid}/images/{wnid}_{number}.JPEG")
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    annotations = []
    for number in range(len(WNIDS) * TEST_IMAGES):
        write(folder / f"val/images/val_{number}.JPEG")
        annotations.append(f"val_{number}.JPEG\t{WNIDS[(number * 7) % len(WNIDS)]}\t0\t32\t44\t62\n")
    (folder / "val/val_annotations.txt").write_text("".join(annotations))
    write(folder / "test/images/test_0.JPEG")  # without a label, in the real archive too
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    return folder


def read_tiny(root: Path, **changes: int) -> tuple[ImageSet, ImageSet]:
    return tiny_imagenet(str(root), **{"classes": len(WNIDS), "channels": 3, "image_size": 64, **changes})


def test_tiny_imagenet_is_read_exactly_with_labels_by_sorted_wnids(tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    train, test = read_tiny(tmp_path)
    expected = ImageFolder(str(folder / "train"))  # converts grey to RGB, sorts classes and paths
    assert train.labels.tolist() == expected.targets == [0] * 6 + [1] * 6 + [2] * 6
    assert torch.equal(
        train.images, torch.stack([v2.functional.pil_to_tensor(image) for image, _ in expected])
    )
    annotations = dict(
        line.split("\t")[:2] for line in (folder / "val/val_annotations.txt").read_text().splitlines()
    )
    assert [sorted(WNIDS)[label] for label in test.labels] == [
        annotations[name] for name in sorted(annotations)
    ]
    for image, name in zip(test.images, sorted(annotations), strict=True):
        stored = Image.open(folder / "val/images" / name).convert("RGB")
        assert torch.equal(image, torch.from_numpy(np.array(stored)).permute(2, 0, 1))
    for part in (train, test):
        assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
        grey = (part.images[:, 0] == part.images[:, 2]).flatten(1).all(1)
        assert 0 < int(grey.sum()) < len(part)


def test_tiny_imagenet_is_the_same_by_any_number_of_threads(tmp_path):
    write_tiny_imagenet(tmp_path)
    threads = torch.get_num_threads()
    try:
        parts = []
        for number in (1, 3):
            torch.set_num_threads(number)
            parts += [read_tiny(tmp_path)]
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*parts, strict=True):
        assert torch.equal(a.images, b.images)


def rewrite(path: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_text(change((folder / path).read_text()))


TINY_DAMAGES = {
    "no folder": (shutil.rmtree, r"dataset\.root=.*: no folder .*/tiny-imagenet-200; "),
    "no wnids": (lambda folder: (folder / "wnids.txt").unlink(), r"wnids\.txt: cannot be read"),
    "a wnid too few": (
        rewrite("wnids.txt", lambda text: text[10:]),
        r"wnids\.txt: found 2 wnids, .*dataset\.classes=3",
    ),
    "no train folder": (lambda folder: shutil.rmtree(folder / "train"), r"/train: no such folder"),
    "no class folder": (
        lambda folder: shutil.rmtree(folder / f"train/{WNIDS[1]}"),
        rf"train: found no folder {WNIDS[1]}",
    ),
    "an unknown class folder": (
        lambda folder: (folder / "train/n0").mkdir(),
        r"train: found one more folder n0",
    ),
    "no images of a class": (
        lambda folder: shutil.rmtree(folder / f"train/{WNIDS[0]}/images"),
        rf"train/{WNIDS[0]}: found no images",
    ),
    "an image too few": (
        lambda folder: (folder / f"train/{WNIDS[0]}/images/{WNIDS[0]}_3.JPEG").unlink(),
        rf"train: found 5 images of {WNIDS[0]} and 6 of ",
    ),
    "no annotations": (
        lambda folder: (folder / "val/val_annotations.txt").unlink(),
        r"val_annotations\.txt: cannot be read",
    ),
    "annotations cut short": (
        rewrite("val/val_annotations.txt", lambda text: "".join(text.splitlines(keepends=True)[:-3])),
        r"val/images/val_10\.JPEG: found no annotation",
    ),
    "an annotation cut short": (
        rewrite("val/val_annotations.txt", lambda text: text[:-20]),
        r"txt, line 12: found 'n",
    ),
    "an annotation twice": (
        rewrite("val/val_annotations.txt", lambda text: text + text.splitlines()[0]),
        r"val_annotations\.txt, line 13: found val_0\.JPEG again",
    ),
    "an unknown wnid": (
        rewrite("val/val_annotations.txt", lambda text: text.replace(WNIDS[0], "n99999999", 1)),
        r"val_annotations\.txt, line 1: found 'n99999999'",
    ),
    "an annotated image missing": (
        lambda folder: (folder / "val/images/val_7.JPEG").unlink(),
        r"val/images/val_7\.JPEG: no such file, but .*val_annotations\.txt names it",
    ),
    "no test images": (
        lambda folder: shutil.rmtree(folder / "val/images"),
        r"val/images/val_0\.JPEG: no such file",
    ),
    "uneven test classes": (
        rewrite("val/val_annotations.txt", lambda text: text.replace(WNIDS[0], WNIDS[1], 1)),
        rf"val: found 3 images of {WNIDS[0]} and 5 of {WNIDS[1]}",
    ),
    "an image cut short": (
        lambda folder: cut_short(folder / f"train/{WNIDS[2]}/images/{WNIDS[2]}_1.JPEG"),
        rf"{WNIDS[2]}_1\.JPEG: cannot be read \(.*(?i:truncated)",
    ),
    "no image": (
        lambda folder: (folder / "val/images/val_2.JPEG").write_text("html"),
        r"val_2\.JPEG: cannot be read",
    ),
    "an empty file": (
        lambda folder: (folder / "val/images/val_2.JPEG").write_bytes(b""),
        r"val_2\.JPEG: cannot be read",
    ),
    "another size": (
        lambda folder: write_image(folder / "val/images/val_3.JPEG", 0, (64, 32)),
        r"val_3\.JPEG: found an image of 64x32, expected 64x64",
    ),
}


@pytest.mark.parametrize(("damage", "message"), TINY_DAMAGES.values(), ids=TINY_DAMAGES)
def test_a_damaged_tiny_imagenet_is_refused_by_name(tmp_path, damage, message):
    damage(write_tiny_imagenet(tmp_path))
    with pytest.raises(DataError, match=message):
        read_tiny(tmp_path)


def test_an_adaptive_run_on_tiny_imagenet(tmp_path, tiny, caplog):
    write_tiny_imagenet(tmp_path)
    config = tiny(
        "dataset=tiny_imagenet",
        f"dataset.root={tmp_path}",
        "dataset.classes=3",
        "dataset.train_samples=12",
        "epochs=1",
        "batch_size=6",
    )
    result = execute(config)
    assert result["dataset"] == "tiny_imagenet"
    assert list(result["kept"])[-1] == "logits"
    teacher_s = "batch_size: found 64, more than the 12 images to train tiny_imagenet-none-resnet8-none"
    assert teacher_s in caplog.text


# Folders of classes

CLASSES = ("apple", "pear", "fig")


def write_image_folder(root: Path, train: int = 8, test: int = 4) -> Path:
    """Images of many sizes and kinds, some deeper than others, with files beside that are none."""
    seed = 0
    for part, count in (("train", train), ("test", test)):
        for name in CLASSES:
            for number in range(count):
                seed += 1
                deeper = "more/" if number % 4 == 1 else ""
                ending = ("jpg", "JPEG", "png")[seed % 3]
                size = (20 + 7 * (seed % 5), 20 + 5 * (seed % 7))
                write_image(
                    root / part / name / f"{deeper}{number}.{ending}",
                    seed,
                    size,
                    "L" if seed % 4 == 0 else "RGB",
                )
            (root / part / name / "notes.txt").write_text("none")
    (root / "train" / "README").write_text("none")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "fruit")


def folder_config(root: Path, *overrides: str) -> Config:
    keys = (
        f"dataset.root={root}",
        "dataset.classes=3",
        "dataset.image_size=16",
        "dataset.workers=0",
        "tracking=none",
    )
    return compose_config("dataset=image_folder", *keys, *overrides)


def read(root: Path, *overrides: str) -> Dataset:
    return build.dataset(folder_config(root, *overrides))


def epoch(dataset: Dataset, number: int = 1, batch_size: int = 7) -> list:
    return list(train_batches(dataset, batch_size, stream(0, "data", number)))


def test_files_are_found_and_labelled_as_by_torchvision(folder):
    dataset = read(folder)
    for part, name in ((dataset.train, "train"), (dataset.test, "test")):
        expected = ImageFolder(str(folder / name))
        assert [
            (os.path.join(part.folder, os.fsdecode(path)), label)
            for path, label in zip(part.paths, part.labels, strict=False)
        ] == (expected.samples)
    assert len(dataset.train) == 24


@pytest.mark.parametrize("batch_size", [5, None])
def test_evaluation_is_torchvision_s_resize_centre_crop_and_normalisation(folder, batch_size):
    dataset = read(folder)
    transform = v2.Compose(
        [v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )  # fmt: skip
    expected = ImageFolder(str(folder / "test"), transform)
    images, labels, indices = map(
        torch.cat, zip(*evaluation_batches(dataset.test, dataset, batch_size), strict=True)
    )
    assert_close(images, torch.stack([image for image, _ in expected]), rtol=0, atol=1e-6)
    assert labels.tolist() == expected.targets
    assert indices.tolist() == list(range(12))


def test_grey_images_are_read_as_such(folder):
    dataset = read(folder, "dataset.channels=1", "dataset.mean=[0.5]", "dataset.std=[0.5]")
    assert next(evaluation_batches(dataset.test, dataset)).images.shape == (12, 1, 16, 16)


def test_validation_images_are_held_out_and_not_augmented(folder):
    whole, dataset = (
        read(folder),
        read(folder, "dataset.val_fraction=0.25", "dataset.train_samples=9", "dataset.test_samples=6"),
    )
    assert dataset.val.labels.bincount().tolist() == [2, 2, 2]
    assert dataset.train.labels.bincount().tolist() == [3, 3, 3]
    assert dataset.test.labels.bincount().tolist() == [2, 2, 2]
    assert not {*dataset.val.paths} & {*dataset.train.paths}
    places = [whole.train.paths.tolist().index(path) for path in dataset.val.paths]
    (plain,) = evaluation_batches(whole.train, whole)
    (held_out,) = evaluation_batches(dataset.val, dataset)
    assert torch.equal(held_out.images, plain.images[places])
    assert held_out.labels.tolist() == plain.labels[places].tolist()


def test_batches_do_not_depend_on_the_number_of_workers(folder):
    before = torch.get_rng_state()
    expected = [epoch(read(folder)), list(evaluation_batches(read(folder).test, read(folder), 5))]
    for workers in (1, 2):
        dataset = read(folder, f"dataset.workers={workers}")
        assert_close(
            [epoch(dataset), list(evaluation_batches(dataset.test, dataset, 5))], expected, rtol=0, atol=0
        )
        assert multiprocessing.active_children() == []
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn from the global generator


def test_an_epoch_has_each_sample_once_with_its_label_and_is_a_function_of_its_stream(folder):
    dataset = read(folder)
    first, again, second = epoch(dataset), epoch(dataset), epoch(dataset, 2)
    assert_close(first, again, rtol=0, atol=0)
    indices = torch.cat([batch.indices for batch in first])
    assert indices.sort().values.tolist() == list(range(24)) != indices.tolist()
    assert torch.equal(torch.cat([batch.labels for batch in first]), dataset.train.labels[indices])
    assert [len(batch.labels) for batch in first] == [7, 7, 7, 3]
    assert [len(batch.labels) for batch in epoch(dataset, batch_size=23)] == [
        23
    ]  # the one left over is dropped
    assert not any(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_each_image_is_transformed_by_draws_of_its_own_place_in_the_epoch(folder):
    """Against torchvision's transforms, called one by one."""
    dataset = read(folder)
    draws = stream(0, "data", 1)
    order, seeds = torch.randperm(24, generator=draws), torch.randint(2**63 - 1, (24,), generator=draws)
    transform = v2.Compose(
        [v2.RandomResizedCrop(16, (0.08, 1.0), (0.75, 4 / 3)), v2.RandomHorizontalFlip(0.5), v2.PILToTensor()]
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    source = ImageFolder(str(folder / "train"))
    found = torch.cat([batch.images for batch in epoch(dataset)])
    for image, place, seed in zip(found, order.tolist(), seeds.tolist(), strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assert_close(image, (transform(source[place][0]) / 255 - mean) / std)


def test_crops_and_flips_are_spread_as_they_should_be(tmp_path):
    """Told from an image whose red is its column and whose green is its row."""
    write_image_folder(tmp_path, 2, 1)
    ramp = np.arange(0, 256, 2).astype("uint8")
    image = np.stack([*np.meshgrid(ramp, ramp), np.zeros((128, 128), "uint8")], axis=2)
    Image.fromarray(image).save(tmp_path / "train/apple/0.png")
    dataset = read(tmp_path)
    place = [os.fsdecode(path) for path in dataset.train.paths].index("apple/0.png")
    count = 600
    repeated = dataset.train[torch.full((count,), place)]
    images = torch.cat(
        list(repeated.augmented(torch.arange(count), 100, stream(0, "data"), Augmentation()))
    ).float()
    red, green = images[:, 0].mean(1), images[:, 1].mean(2)  # along columns, along rows
    flipped = red[:, 0] > red[:, -1]
    assert abs(float(flipped.float().mean()) - 0.5) < 4 * 0.5 / count**0.5
    width, height = ((values[:, -1] - values[:, 0]).abs() * 16 / 15 / 256 for values in (red, green))
    area, ratio = width * height, width / height
    assert 0.07 < float(area.min()) < 0.1
    assert 0.93 < float(area.max()) < 1.02
    assert 0.7 < float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) < 1.42
    middle = (red[:, 0] + red[:, -1]) / 2, (green[:, 0] + green[:, -1]) / 2
    for values in middle:
        assert abs(float(values.mean()) - 127) < 4 * float(values.std()) / count**0.5 + 1
    assert len(images.flatten(1).unique(dim=0)) > 0.99 * count


def test_workers_can_be_started_afresh(folder):
    """Where processes are not forked, what a worker gets is pickled."""
    dataset = pickle.loads(pickle.dumps(read(folder)))
    assert_close(epoch(dataset), epoch(read(folder)), rtol=0, atol=0)


# What is wrong with them


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.workers=-1", r"dataset\.workers: found -1"),
        ("dataset.workers=many", r"dataset\.workers: found 'many'"),
        ("dataset.pin_memory=3", r"dataset\.pin_memory: found 3"),
        (
            "dataset.channels=2 dataset.mean=[0,0] dataset.std=[1,1]",
            r"dataset\.channels: found 2, expected 1 \(grey\) or 3",
        ),
        (
            "dataset.augmentation=null",
            r"dataset\.augmentation: found None, expected keys, each with keys and values with a _target_",
        ),
        ("dataset.augmentation.flip=3", r"dataset\.augmentation\.flip: found 3, expected .* with a _target_"),
        (
            "dataset.augmentation.crop.size=12",
            r"dataset\.augmentation: found .*\(3, 12, 12\).* expected \(3, 16, 16\)",
        ),
        ("~dataset.evaluation.crop", r"dataset\.evaluation: found .*\(3, 26, 18\).* expected \(3, 16, 16\)"),
        (
            "dataset.augmentation.flip.p=2",
            r"dataset\.augmentation\.flip\.p: found 2, expected a number from 0 to 1",
        ),
        (
            "+dataset.augmentation.crop.scal=3",
            r"dataset\.augmentation\.crop\.scal: no such key; .*Did you mean 'scale'",
        ),
        (
            "dataset.evaluation.crop._target_=torchvision.transforms.v2.CentreCrop",
            r"evaluation\.crop\._target_: .*'CenterCrop'",
        ),
        ("+dataset.crop_padding=4", r"dataset\.crop_padding: no such key"),
        ("+dataset.worker=4", r"dataset\.worker: no such key; .*Did you mean 'workers'"),
        ("~dataset.workers", r"dataset\.workers: found nothing"),
        ("~dataset.image_size", r"image_size"),
        ("dataset.mean=[0.5]", r"dataset\.mean: "),
    ],
)
def test_mistakes_are_told_before_any_folder_is_looked_at(override, message):
    with pytest.raises(ConfigError, match=message):
        read(Path("/nowhere"), *override.split())


def test_only_images_in_memory_are_cropped_with_padding():
    config = compose_config("dataset=cifar10")
    config["dataset"]["augmentation"] = {}
    with pytest.raises(ConfigError, match=r"dataset\.augmentation: no such key"):
        build.promises(config)


FOLDER_DAMAGES = {
    "no root": (shutil.rmtree, r"dataset\.root=.*/fruit: no folder .*/fruit/train; expected train and test"),
    "no test folder": (
        lambda root: shutil.rmtree(root / "test"),
        r"dataset\.root=.*: no folder .*/fruit/test; ",
    ),
    "no classes": (
        lambda root: [shutil.rmtree(root / "train" / name) for name in CLASSES],
        r"fruit/train: found no folders",
    ),
    "a class too many": (
        lambda root: write_image(root / "train/lime/0.png", 0, (20, 20)),
        r"fruit/train: found 4 folders, expected one for each of dataset\.classes=3",
    ),
    "a test class missing": (
        lambda root: shutil.rmtree(root / "test/fig"),
        r"fruit/test: found no folder fig",
    ),
    "a test class too many": (
        lambda root: (root / "test/lime").mkdir(),
        r"fruit/test: found one more folder lime",
    ),
    "test images under another name": (
        lambda root: (root / "test").rename(root / "val"),
        r"no folder .*/fruit/test; .*\(dataset\.test=val takes val, which is there\)",
    ),
    "an empty class": (
        lambda root: [path.unlink() for path in (root / "train/fig").rglob("*.*")],
        r"fruit/train/fig: found no images, expected some \(\.jpg",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FOLDER_DAMAGES.values(), ids=FOLDER_DAMAGES)
def test_a_damaged_image_folder_is_refused_by_name(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        read(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_when_its_batch_is_due_and_no_worker_is_left(folder, workers):
    (damaged,) = (folder / "train/pear").glob("2.*")
    cut_short(damaged)
    dataset = read(folder, f"dataset.workers={workers}")
    with pytest.raises(DataError) as raised:
        epoch(dataset)
    assert str(raised.value).startswith(f"{damaged}: cannot be read (")
    assert "Traceback" not in str(raised.value)
    assert multiprocessing.active_children() == []  # although the traceback is still held
    assert len(list(evaluation_batches(dataset.test, dataset, 5))) == 3


def test_a_file_that_vanished_is_named(folder):
    dataset = read(folder)
    gone = Path(dataset.train.folder) / os.fsdecode(dataset.train.paths[4])
    gone.unlink()
    with pytest.raises(DataError, match=rf"{gone}: cannot be read"):
        epoch(dataset)


# Which files count


def files(dataset: Dataset) -> list[str]:
    return [os.fsdecode(path) for path in dataset.train.paths]


def listed(root: Path, only: str = "") -> list[str]:
    """The training images, from their folder on."""
    paths, _, _ = images_of(root / "train", sorted(CLASSES))
    found = [os.path.relpath(path, root / "train") for path in paths]
    return [path for path in found if path.startswith(only)]


@pytest.mark.parametrize("target", [".", "..", "../..", "more", "loop"])
def test_a_link_to_a_folder_around_it_or_within_adds_nothing(folder, target):
    before = listed(folder)
    (folder / "train/apple/loop").symlink_to(target)
    assert listed(folder) == before


def test_folders_that_link_to_each_other_come_to_an_end(folder):
    """Each class has the other's images, too: that is what the links say."""
    (folder / "train/apple/loop").symlink_to("../pear")
    (folder / "train/pear/loop").symlink_to("../apple")
    for name in ("apple", "pear"):
        assert len(listed(folder, f"{name}/")) == 16


def test_a_link_to_an_image_or_a_folder_counts_as_what_it_leads_to_and_once(folder, tmp_path):
    before = listed(folder)
    (image,) = (folder / "train/apple").glob("2.*")
    (folder / "train/apple/again.png").symlink_to(image)
    write_image(tmp_path / "elsewhere/new.png", 99, (20, 20))
    (folder / "train/fig/new.png").symlink_to(tmp_path / "elsewhere/new.png")
    (folder / "train/fig/others").symlink_to(tmp_path / "elsewhere")
    write_image(tmp_path / "around/within/newer.png", 98, (20, 20))
    (folder / "train/pear/1").symlink_to(tmp_path / "around/within")
    (folder / "train/pear/2").symlink_to(tmp_path / "around")
    assert len([path for path in listed(folder, "apple") if path.endswith(("again.png", image.name))]) == 1
    assert len(listed(folder)) == len(before) + 2
    assert (len(listed(folder, "fig/")), len(listed(folder, "pear/"))) == (9, 9)


def test_what_is_hidden_is_no_class_and_no_image(folder):
    before = listed(folder)
    write_image(folder / "train/.ipynb_checkpoints/0.png", 0, (20, 20))
    write_image(folder / "train/fig/.ipynb_checkpoints/0.png", 0, (20, 20))
    (folder / "train/fig/._0.png").write_bytes(b"a Mac's notes")
    assert listed(folder) == before == files(read(folder))


def test_images_of_every_usual_kind_are_read(folder):
    image = Image.new("RGB", (20, 20), (200, 10, 90))
    endings = ("gif", "jfif", "WEBP", "bmp", "tiff", "ppm")
    for ending in endings:
        image.save(folder / f"test/fig/9.{ending}", "JPEG" if ending == "jfif" else None)
    dataset = read(folder)
    found = {os.fsdecode(path) for path in dataset.test.paths}
    assert {f"fig/9.{ending}" for ending in endings} <= found
    assert len(torch.cat([batch.labels for batch in evaluation_batches(dataset.test, dataset)])) == 18


def test_what_is_used_and_what_is_left_out_is_said(folder, caplog):
    write_image(folder / "test/9.png", 0, (20, 20))
    (folder / "train/fig/.DS_Store").touch()
    (folder / "train/fig/LICENCE").touch()
    (folder / "train/fig/again").symlink_to("more")
    (folder / "train/fig/loop").symlink_to(".")
    os.mkfifo(folder / "train/fig/pipe.png")  # to open it would wait for a writer
    with caplog.at_level("INFO", "sakd"):
        read(folder)
    (line,) = (message for message in caplog.messages if "images to train on" in message)
    head, _, left_out = line.partition("; left out: ")
    assert head == f"{folder}: 24 images to train on and 12 test images of 3 classes"
    assert sorted(left_out.split(", ")) == [
        "1 a pipe or device", "1 hidden", "1 in no class's folder", "1 linked again", "1 linking back",
        "1 without an ending", "6 .txt",
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_cannot_be_looked_into_is_named(folder):
    (folder / "train/fig/more").chmod(0)
    with pytest.raises(DataError, match=r"train/fig/more: cannot be read \(Permission denied\)"):
        read(folder)


def test_no_more_workers_than_cores_and_no_warning(folder, caplog):
    cores = len(os.sched_getaffinity(0))
    with caplog.at_level("INFO", "sakd"):
        dataset = read(folder, "dataset.workers=999")
    assert dataset.train.workers == cores
    assert f"dataset.workers: found 999, this process has {cores} cores" in caplog.text
    assert len(epoch(dataset)) == 4


@pytest.mark.parametrize("root", ["~/fruit", "'~/fruit'"])
def test_the_root_may_begin_with_a_tilde(folder, monkeypatch, root):
    """As it is typed, and as a YAML file has it."""
    monkeypatch.setenv("HOME", str(folder.parent))
    node = compose_one(["dataset=image_folder", f"dataset.root={root}"])["dataset"]
    assert (node["root"], node["name"]) == (str(folder), "fruit")


@pytest.mark.slow
def test_paths_at_home_are_found_by_command(folder, monkeypatch, launch):
    monkeypatch.setenv("HOME", str(folder.parent))
    keys = ["dataset=image_folder", "dataset.root=~/fruit", "dataset.classes=2", "runs=~/runs"]
    done = launch(*keys, "tracking=none", "distiller=none", expect=1)
    assert f"error: {folder}/train: found 3 folders, expected one for each of dataset.classes" in done.stderr


# Files are read once before a training


def check(dataset: Dataset, memory: Path) -> list[int]:
    """How many files were looked at, part by part."""
    looked_at = []

    @contextmanager
    def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
        done = []
        yield done.append
        assert sum(done) == total
        looked_at.append(total)

    dataset.ready(memory, counting)
    return looked_at


def test_each_file_is_read_once_and_again_only_when_it_has_changed(folder, tmp_path):
    memory = tmp_path / "runs/.checked"
    assert check(read(folder, "dataset.val_fraction=0.25"), memory) == [18, 6, 12]
    assert check(read(folder), memory) == []
    (changed,) = (folder / "test/fig").glob("2.*")
    os.utime(changed, (1, 1))
    assert check(read(folder), memory) == [1]
    assert check(read(write_image_folder(tmp_path / "other")), memory) == [24, 12]
    memory.write_bytes(memory.read_bytes()[:-3])
    assert sum(check(read(folder), memory) + check(read(tmp_path / "other"), memory)) == 1
    memory.unlink()
    os.mkfifo(memory)  # others may write where it lies
    assert check(read(folder), memory) == [24, 12]
    assert check(read(folder), memory) == []


def test_all_damaged_files_are_told_in_one_line_and_whole_ones_remembered(folder, tmp_path):
    damaged = [folder / "train" / name for name in listed(folder)[3:15]]
    for path in damaged:
        cut_short(path)
    (folder / "train/fig/nowhere.png").symlink_to("gone.png")
    dataset = read(folder, "dataset.workers=2")
    with pytest.raises(DataError) as raised:
        check(dataset, tmp_path / "checked")
    message = str(raised.value)
    assert message.startswith(f"{damaged[0]}: cannot be read (")
    assert "\n" not in message
    assert "In all 13 files cannot be read: also " in message
    assert message.endswith(f"{damaged[9]} and 3 more")
    assert multiprocessing.active_children() == []
    with pytest.raises(DataError, match="In all 13 files"):
        check(dataset, tmp_path / "checked")
    (folder / "train/fig/nowhere.png").unlink()
    for path in damaged:
        write_image(path, 5, (20, 20))
    assert check(read(folder), tmp_path / "checked") == [12]


def test_a_run_finds_a_damaged_test_image_before_it_trains(folder, tmp_path):
    (damaged,) = (folder / "test/pear").glob("2.*")
    cut_short(damaged)
    with pytest.raises(DataError, match=rf"^{damaged}: cannot be read"):
        execute(tiny_run(folder, f"runs={tmp_path}/runs"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".checked_images"]


def test_a_file_that_the_transforms_cannot_take_is_named(folder):
    write_image(folder / "test/pear/0.png", 0, (9, 30))
    evaluation = [
        "dataset.evaluation.resize._target_=torchvision.transforms.v2.RandomCrop",
        "dataset.evaluation.resize.size=16",
    ]
    dataset = read(folder, *evaluation)
    with pytest.raises(
        DataError, match=r"test/pear/0\.png: found an image of 9x30, which cannot be transformed"
    ):
        list(evaluation_batches(dataset.test, dataset))


def test_a_file_of_which_the_transforms_make_another_size_is_named(folder):
    """Widths are kept where nothing crops, so that only some files are wrong."""
    write_image(folder / "test/pear/0.png", 0, (33, 99))
    overrides = ["~dataset.evaluation.crop", "dataset.evaluation.resize.size=16", "dataset.image_size=16"]
    config = folder_config(folder, *overrides)
    config["dataset"]["evaluation"]["resize"] |= {"_target_": "tests.test_data_files.HalveTall", "size": 16}
    dataset = build.dataset(config)
    with pytest.raises(
        DataError, match=r"test/pear/0\.png: found an image of 33x99, which the transforms make \(3, 8, 16\)"
    ):
        list(evaluation_batches(dataset.test, dataset))


class HalveTall:
    """To ``size``, but tall images to half of it."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize((self.size, self.size // 2 if image.height > 2 * image.width else self.size))


def test_no_worker_is_left_where_training_ends_early(folder):
    config = folder_config(folder, "dataset.workers=2", "distiller=none", "student=resnet8")
    trainer = build.trainer(config, build.parts(config), torch.device("cpu"))

    def interrupt(*arguments: object) -> None:
        assert multiprocessing.active_children() != []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        list(Cohort(trainer.teacher, {"": trainer}).fit(build.dataset(config), 1, 7, interrupt))
    assert raised.traceback  # which holds the frames
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_script_that_fails_amid_an_epoch_ends(folder):
    """Its traceback keeps the batches, and so their workers, to the very end."""
    script = (
        "import torch, numpy as np\nfrom sakd.data.files import ImageFiles\nfrom torchvision.transforms "
        "import v2\n"
        f"paths, crop = np.array([b'apple/0.jpg'] * 9), v2.RandomCrop(16)\nroot = {str(folder / 'train')!r}\n"
        "files = ImageFiles(root, paths, torch.zeros(9), (3, 16, 16), crop, crop, 2, False)\n"
        "for batch in files.plain(2):\n    kept = files.plain(3)\n    next(kept)\n    raise "
        "SystemError('amid')\n"
    )
    write_image(folder / "train/apple/0.jpg", 0, (20, 20))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "SystemError: amid" in done.stderr


def test_workers_last_for_an_epoch(folder):
    with closing(train_batches(read(folder, "dataset.workers=2"), 2, stream(0, "data"))) as batches:
        processes = set()
        for _ in batches:
            processes |= {process.pid for process in multiprocessing.active_children()}
    assert len(processes) == min(2, len(os.sched_getaffinity(0)))


# Runs


def tiny_run(root: Path, *overrides: str) -> Config:
    keys = (
        "teacher=resnet8",
        "student=resnet8",
        "epochs=2",
        "batch_size=8",
        "threads=1",
        "dataset.val_fraction=0.25",
    )
    return folder_config(root, *keys, *overrides)


@pytest.mark.slow
def test_a_killed_adaptive_run_goes_on_with_other_workers_bit_for_bit(folder, tmp_path):
    undisturbed = tiny_run(folder, f"runs={tmp_path}/undisturbed")
    result = execute(undisturbed)
    assert result["dataset"] == "fruit"
    assert result["student"]["val_accuracy"] is not None
    disturbed = tiny_run(folder, f"runs={tmp_path}/runs", "dataset.workers=1")
    # In the midst of the student's.
    assert in_a_process(disturbed, "sakd.runs:Run.save_checkpoint", 3, "after") == KILLED
    resumed = tiny_run(folder, f"runs={tmp_path}/runs", "dataset.workers=2")
    execute(resumed)
    assert_same_runs(Run(resumed), Run(undisturbed))


def test_a_run_is_the_same_wherever_its_folder_lies_and_whoever_decodes(folder):
    own = digest(folder_config(folder))
    assert digest(folder_config("/elsewhere/fruit", "dataset.workers=3", "dataset.pin_memory=false")) == own
    for other in (
        "dataset.root=/data/vegetables",
        "dataset.augmentation.crop.scale=[0.5,1]",
        "dataset.test=val",
    ):
        assert digest(folder_config(folder, other)) != own
    assert digest(compose_config("dataset=imagenet")) == digest(
        compose_config("dataset=imagenet", "dataset.root=/elsewhere")
    )


def test_imagenet_is_the_folder_of_its_name():
    node = compose_config("dataset=imagenet")["dataset"]
    folder = compose_config("dataset=image_folder")["dataset"]
    assert {key for key in node if node[key] != folder[key]} == {"name", "root", "test", "classes", "recipe"}
    assert [node[key] for key in ("train", "test", "classes", "image_size")] == ["train", "val", 1000, 224]
    assert node["evaluation"]["resize"]["size"] == [256]


@pytest.mark.slow
def test_a_signal_to_the_whole_group_ends_as_an_interruption(folder, tmp_path):
    """A cluster's SIGTERM and a terminal's Ctrl-C reach the workers too."""
    overrides = (
        f"dataset.root={folder}",
        "dataset.classes=3",
        "dataset.image_size=16",
        "dataset.workers=2",
        "tracking=none",
    )
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "dataset=image_folder",
        *overrides,
        "distiller=none",
        "student=resnet8",
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [*command, "epochs=100000"], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        epochs = 0
        while epochs < 2:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
            epochs = sum(
                len(path.read_text().splitlines()) for path in (tmp_path / "runs").glob("*/metrics.jsonl")
            )
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
        assert f"interrupted ({signal.Signals(number).name})" in output
        with pytest.raises(ProcessLookupError):  # none of the group is left
            os.killpg(process.pid, 0)
        shutil.rmtree(tmp_path / "runs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_the_cpu_s(folder, workers):
    dataset = read(folder, f"dataset.workers={workers}").to(torch.device("cuda"))
    assert isinstance(dataset.train, ImageFiles)
    for found, expected in zip(epoch(dataset), epoch(read(folder)), strict=True):
        assert found.images.is_cuda
        assert found.labels.is_cuda
        assert found.indices.is_cuda
        assert_close([part.cpu() for part in found], list(expected))
