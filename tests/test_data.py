"""What is read from files, what is taken of it, and the batches drawn from it."""

import gzip
import hashlib
import os
import pickle
import struct
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.testing import assert_close
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms import functional as tv

from sakd.configuration import build
from sakd.data import (
    Augmentation,
    Dataset,
    ImageSet,
    assemble,
    check_promises,
    cifar10,
    cifar100,
    digits,
    evaluation_batches,
    fashion_mnist,
    steps_per_epoch,
    train_batches,
)
from sakd.data.memory import augment
from sakd.data.sets import stratified
from sakd.errors import ConfigError, DataError
from sakd.streams import stream
from tests.conftest import ROOT, compose_config

PROMISES = {
    "classes": 10,
    "channels": 1,
    "image_size": 2,
    "mean": [0.5],
    "std": [0.25],
    "crop_padding": 0,
    "flip": False,
    "val_fraction": 0.0,
    "train_samples": None,
    "test_samples": None,
}


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbered(count: int, classes: int = 10) -> ImageSet:
    """Images of 1x2x2 whose pixels spell their number; as many of each class."""
    number = torch.arange(count)
    pixels = torch.stack([number % 256, number // 256, number % 7, number % 5], dim=1)
    return ImageSet(pixels.to(torch.uint8).reshape(count, 1, 2, 2), number % classes)


def numbers(images: ImageSet) -> list[int]:
    low, high = images.images.flatten(1)[:, :2].long().unbind(1)
    return (low + 256 * high).tolist()


def assembled(train: int = 1000, test: int = 200, **changes: object) -> Dataset:
    return assemble(numbered(train), numbered(test), "numbers", **{**PROMISES, **changes})


def assert_moments_as_in_conf(images: Tensor, name: str):
    """Mean and deviation of uint8 images [N, C, H, W], to four decimals."""
    node = yaml.safe_load((ROOT / f"conf/dataset/{name}.yaml").read_text())
    pixels = images.transpose(0, 1).flatten(1).double() / 255
    assert [round(float(channel.mean()), 4) for channel in pixels] == node["mean"]
    assert [round(float(channel.std(unbiased=False)), 4) for channel in pixels] == node["std"]


# Digits


def test_digits_are_split_into_1437_and_360_disjoint_images():
    from sklearn.datasets import load_digits

    everything = load_digits()
    train, test = digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 8, 8)
    split = Counter()
    for part in (train, test):
        levels = (part.images.double() * 16 / 255).round().to(torch.uint8).flatten(1)
        split.update(zip(map(bytes, levels.tolist()), part.labels.tolist(), strict=True))
    whole = everything.images.astype("uint8").reshape(1797, 64).tolist()
    assert split == Counter(zip(map(bytes, whole), everything.target.tolist(), strict=True))


def test_digits_use_the_whole_range_of_bytes():
    train, _ = digits()
    assert train.images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]


def test_digits_test_images_are_stratified():
    train, test = digits()
    in_test, in_train = test.labels.bincount(), train.labels.bincount()
    assert ((in_test - 360 / 1797 * (in_test + in_train)).abs() <= 1).all()


def test_digits_test_images_are_always_these():
    _, test = digits()
    content = test.labels.numpy().tobytes() + test.images.numpy().tobytes()
    assert (
        hashlib.sha256(content).hexdigest()
        == "d70489a82c1482a047de3ad0524db184976cd8a32d904aaf02e58274afd54f02"
    )


def test_digits_moments_are_the_training_images():
    assert_moments_as_in_conf(digits()[0].images, "digits")


# Parts of a data set


@pytest.mark.parametrize("count", [1, 7, 33, 120, 299])
@pytest.mark.parametrize(
    "sizes", [(100, 100, 100), (150, 100, 50), (280, *[2] * 10)], ids=["even", "uneven", "dominated"]
)
def test_stratified_counts_are_within_one_of_the_exact_shares(sizes, count):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    chosen = stratified(labels, count)
    assert int(chosen.sum()) == count
    exact = torch.tensor(sizes) * count / sum(sizes)
    assert ((labels[chosen].bincount(minlength=len(sizes)) - exact).abs() <= 1).all()


def test_stratified_is_fixed_and_shuffled():
    labels = torch.arange(1000) % 10
    chosen = stratified(labels, 100)
    torch.rand(3)
    assert torch.equal(stratified(labels, 100), chosen)
    assert 20 < int(chosen[:500].sum()) < 80


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.07, 0.0333])
def test_validation_images_are_a_stratified_part_of_the_training_images(fraction):
    dataset = assembled(train=5000, val_fraction=fraction)
    assert (
        abs(len(dataset.val) - Fraction(str(fraction)) * 5000) < 1
    )  # exactly, where the share is a whole number
    assert ((dataset.val.labels.bincount(minlength=10) - len(dataset.val) / 10).abs() <= 1).all()
    assert sorted(numbers(dataset.train) + numbers(dataset.val)) == list(range(5000))
    for part in (dataset.train, dataset.val):
        assert [number % 10 for number in numbers(part)] == part.labels.tolist()


def test_without_a_validation_fraction_nothing_is_taken():
    dataset = assembled()
    assert dataset.val is None
    assert numbers(dataset.train) == list(range(1000))
    assert numbers(dataset.test) == list(range(200))


def test_samples_are_stratified_parts_and_leave_the_validation_images_alone():
    dataset = assembled(val_fraction=0.1, train_samples=300, test_samples=50)
    assert dataset.train.labels.bincount().tolist() == [30] * 10
    assert dataset.test.labels.bincount().tolist() == [5] * 10
    assert numbers(dataset.val) == numbers(assembled(val_fraction=0.1).val)
    assert not set(numbers(dataset.train)) & set(numbers(dataset.val))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", 1),
        ("classes", 2.0),
        ("channels", 0),
        ("image_size", 0),
        ("crop_padding", -1),
        ("crop_padding", True),
        ("crop_padding", 3),  # more than the image
        ("mean", [0.5, 0.5]),
        ("mean", ["grey"]),
        ("mean", 0.5),
        ("std", []),
        ("std", [0.0]),
        ("std", [float("nan")]),
        ("flip", "yes"),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("val_fraction", "10%"),
        ("val_fraction", float("nan")),
        ("train_samples", 1),
        ("train_samples", 10.5),
        ("test_samples", 0),
        ("test_samples", True),
    ],
)
def test_values_that_no_images_satisfy_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=rf"dataset\.{key}: "):
        check_promises("numbers", **{**PROMISES, key: value})


@pytest.mark.parametrize(
    ("data_set", "changes", "found"),
    [
        ("digits", ["classes=11"], r"classes: found 11, expected 10"),
        ("digits", ["image_size=28"], r"image_size: found 28, expected 8"),
        ("cifar10", ["classes=100"], r"classes: found 100, expected 10"),
        ("cifar100", ["classes=20"], r"classes: found 20, expected 100"),
        ("fashion_mnist", ["channels=3", "mean=[0,0,0]", "std=[1,1,1]"], r"channels: found 3, expected 1"),
    ],
)
def test_what_a_data_set_always_has_cannot_be_changed_and_no_file_is_looked_for(data_set, changes, found):
    keys = [f"dataset.{change}" for change in changes]
    with pytest.raises(ConfigError, match=rf"^dataset\.{found}, which all images of {data_set} have"):
        build.dataset(compose_config(f"dataset={data_set}", *keys))


@pytest.mark.parametrize(("key", "value"), [("train_samples", 1001), ("test_samples", 201)])
def test_parts_larger_than_the_whole_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=rf"dataset\.{key}: "):
        assembled(**{key: value})


def test_a_validation_fraction_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ConfigError, match=r"dataset\.val_fraction: "):
        assembled(val_fraction=0.9999)


def test_training_samples_are_counted_behind_the_validation_images():
    with pytest.raises(ConfigError, match=r"dataset\.train_samples: found 901.* 900 "):
        assembled(val_fraction=0.1, train_samples=901)


@pytest.mark.parametrize(
    "change", [{"image_size": 3}, {"channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}, {"classes": 9}]
)
def test_images_or_labels_not_as_promised_are_refused(change):
    with pytest.raises(DataError, match="numbers: found train"):
        assembled(**change)


def test_test_images_not_as_promised_are_refused():
    wrong = ImageSet(numbered(20).images, torch.full((20,), -1))
    with pytest.raises(DataError, match="numbers: found test labels from -1"):
        assemble(numbered(20), wrong, "numbers", **PROMISES)


# Fashion-MNIST

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(values: Tensor) -> bytes:
    """The idx format: 0, 0, 8 for unsigned bytes, the number of sizes, the sizes as big-endian uint32, the
    values."""
    return struct.pack(f">4B{values.dim()}I", 0, 0, 8, values.dim(), *values.shape) + bytes(
        values.flatten().tolist()
    )


def write_fashion(folder: Path, zipped: bool) -> list[Tensor]:
    """Twelve training and five test images with their labels, in the order of IDX_FILES."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [
        random_bytes(12, 28, 28),
        random_bytes(12) % 10,
        random_bytes(5, 28, 28, seed=1),
        random_bytes(5, seed=1) % 10,
    ]
    for name, values in zip(IDX_FILES, contents, strict=True):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))
    return contents


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_exactly(tmp_path, place, zipped):
    written = write_fashion(tmp_path / place, zipped)
    train, test = fashion_mnist(str(tmp_path), download=False)
    for part, images, labels in ((train, *written[:2]), (test, *written[2:])):
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert torch.equal(part.images, images[:, None])
        assert torch.equal(part.labels, labels.long())


@pytest.mark.parametrize("name", IDX_FILES)
def test_a_missing_fashion_mnist_file_is_named(tmp_path, name):
    write_fashion(tmp_path, zipped=True)
    (tmp_path / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=rf"{tmp_path}.*{name[: name.index('-idx')]}"):
        fashion_mnist(str(tmp_path), download=False)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"dataset\.root={tmp_path}/nowhere"):
        fashion_mnist(f"{tmp_path}/nowhere", download=False)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", IDX_FILES)
def test_a_fashion_mnist_file_cut_short_anywhere_is_named(tmp_path, name, zipped):
    write_fashion(tmp_path, zipped)
    path = tmp_path / (f"{name}.gz" if zipped else name)
    whole = path.read_bytes()
    for length in (0, 1, 3, 4, 7, 9, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=str(path)):
            fashion_mnist(str(tmp_path), download=False)


NOT_IDX = {
    "text": b"not an idx file at all",
    "no_zeros_first": struct.pack(">4BI", 1, 0, 8, 1, 5) + b"abcde",
    "signed_bytes": struct.pack(">4BI", 0, 0, 9, 1, 5) + b"abcde",
    "floats": struct.pack(">4BI", 0, 0, 13, 1, 5) + b"abcd" * 5,
    "no_sizes": struct.pack(">4B", 0, 0, 8, 0),
    "longer_than_it_says": struct.pack(">4BI", 0, 0, 8, 1, 4) + b"abcde",
    "no_values": struct.pack(">4BI", 0, 0, 8, 1, 0),
}


@pytest.mark.parametrize("content", NOT_IDX.values(), ids=NOT_IDX)
def test_content_that_is_no_idx_file_is_refused_by_name(tmp_path, content):
    write_fashion(tmp_path, zipped=False)
    path = tmp_path / IDX_FILES[3]
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        fashion_mnist(str(tmp_path), download=False)


def test_a_gzip_file_with_a_flipped_bit_is_refused_by_name(tmp_path):
    write_fashion(tmp_path, zipped=True)
    path = tmp_path / f"{IDX_FILES[0]}.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        fashion_mnist(str(tmp_path), download=False)


def test_more_images_than_labels_are_refused_with_both_numbers(tmp_path):
    write_fashion(tmp_path, zipped=False)
    (tmp_path / IDX_FILES[1]).write_bytes(idx(torch.zeros(11, dtype=torch.uint8)))
    with pytest.raises(DataError, match=rf"{tmp_path}: found 12 train images and 11 labels"):
        fashion_mnist(str(tmp_path), download=False)


def test_the_real_fashion_mnist_is_as_its_conf_says():
    folder = Path(os.environ.get("SAKD_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if not folder.is_dir():
        pytest.skip(f"no {folder}; SAKD_FASHION_MNIST names a folder with the real files")
    train, test = fashion_mnist(str(folder), download=False)
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6_000] * 10
    assert_moments_as_in_conf(train.images, "fashion_mnist")


# CIFAR


def write_cifar(
    root: Path, reader: type[CIFAR10], monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[Tensor, list[int]]]:
    """Small files as in the real archive, whose checksums the reader then expects; each file's pixels and
    labels."""
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    coarse = {"coarse_labels": [0] * 4} if reader is CIFAR100 else {}
    of_class = "fine_labels" if reader is CIFAR100 else "labels"
    md5, written = {}, {}

    def write(name: str, content: dict):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for number, (name, _) in enumerate([*reader.train_list, *reader.test_list]):
        pixels, labels = random_bytes(4, 3072, seed=number), [number, 9, 0, 5]
        write(
            name,
            {
                "data": pixels.numpy(),
                of_class: labels,
                "filenames": ["a.png"] * 4,
                "batch_label": name,
                **coarse,
            },
        )
        written[name] = pixels, labels
    write(reader.meta["filename"], {reader.meta["key"]: [f"class {number}" for number in range(10)]})
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(reader, part, [[name, md5[name]] for name, _ in getattr(reader, part)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5[reader.meta["filename"]]})
    return written


CIFARS = pytest.mark.parametrize(("read", "reader"), [(cifar10, CIFAR10), (cifar100, CIFAR100)])


@CIFARS
def test_cifar_is_read_exactly(tmp_path, monkeypatch, read, reader):
    written = write_cifar(tmp_path, reader, monkeypatch)
    for part, names in zip(
        read(str(tmp_path), download=False), (reader.train_list, reader.test_list), strict=True
    ):
        pixels = torch.cat([written[name][0] for name, _ in names])
        assert torch.equal(
            part.images, pixels.reshape(-1, 3, 32, 32)
        )  # 1024 red bytes row by row, then green, then blue
        assert part.labels.tolist() == [label for name, _ in names for label in written[name][1]]
        assert part.labels.dtype == torch.int64


@CIFARS
def test_any_missing_or_damaged_cifar_file_is_named(tmp_path, monkeypatch, read, reader):
    names = [*write_cifar(tmp_path, reader, monkeypatch), reader.meta["filename"]]
    for name in names:
        path = tmp_path / reader.base_folder / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{path}.*checksum"):
            read(str(tmp_path), download=False)
        path.unlink()
        with pytest.raises(DataError, match=rf"dataset\.root={tmp_path}.*{path}"):
            read(str(tmp_path), download=False)
        path.write_bytes(whole)
    read(str(tmp_path), download=False)


# Batches


def colourful(count: int, size: int = 6, **augmentation: object) -> Dataset:
    images = ImageSet(random_bytes(count, 3, size, size), torch.arange(count) % 10)
    moments = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return Dataset(images, images, None, 10, size, *moments, Augmentation(**augmentation))


def as_torchvision_does(images: ImageSet, dataset: Dataset) -> Tensor:
    transform = Compose([ToTensor(), Normalize(dataset.mean, dataset.std)])
    return torch.stack([transform(image.permute(1, 2, 0).numpy()) for image in images.images])


def order(dataset: Dataset, seed: int, batch_size: int = 8) -> list[int]:
    return [
        index
        for batch in train_batches(dataset, batch_size, stream(seed, "data"))
        for index in batch.indices.tolist()
    ]


def test_an_epoch_has_every_index_once_in_the_stream_s_order():
    dataset = colourful(36)
    first = order(dataset, seed=0)
    assert sorted(first) == list(range(36))
    assert order(dataset, seed=0) == first
    assert order(dataset, seed=1) != first != list(range(36))
    assert (
        order(colourful(36, crop_padding=1, flip=True), seed=0, batch_size=5) == first[:35]
    )  # one was left over


def test_a_stream_s_batches_are_the_same_again_with_their_augmentation():
    dataset = colourful(36, crop_padding=2, flip=True)
    once, again = (list(train_batches(dataset, 8, stream(3, "data", 5))) for _ in range(2))
    assert_close(once, again, rtol=0, atol=0)


def test_batches_are_normalised_as_torchvision_does():
    dataset = colourful(36)
    expected = as_torchvision_does(dataset.train, dataset)
    for batch in train_batches(dataset, 8, stream(0, "data")):
        assert_close(batch.images, expected[batch.indices], rtol=0, atol=0)
        assert torch.equal(batch.labels, dataset.train.labels[batch.indices])


@pytest.mark.parametrize("batch_size", [7, 36, 512])
def test_evaluation_covers_all_images_in_order_without_augmentation(batch_size):
    dataset = colourful(36, crop_padding=2, flip=True)
    images, labels, indices = map(
        torch.cat, zip(*evaluation_batches(dataset.test, dataset, batch_size), strict=True)
    )
    assert_close(images, as_torchvision_does(dataset.test, dataset), rtol=0, atol=0)
    assert torch.equal(labels, dataset.test.labels)
    assert indices.tolist() == list(range(36))


@pytest.mark.parametrize(
    ("samples", "batch_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (9, 4, [4, 4]),  # the one left over is dropped
        (10, 4, [4, 4, 2]),
        (3, 4, [3]),
        (1, 4, [1]),  # but not if it is all there is
        (5, 2, [2, 2]),
        (7, 100_000, [7]),  # one batch of all
    ],
)
def test_batch_sizes_and_their_number(samples, batch_size, sizes):
    batches = list(train_batches(colourful(samples), batch_size, stream(0, "data")))
    assert [len(batch.labels) for batch in batches] == sizes
    assert steps_per_epoch(samples, batch_size) == len(sizes)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (2, False), (2, True), (4, True)])
def test_augment_is_torchvision_s_crop_and_flip_image_by_image(padding, flip):
    images, draws = random_bytes(40, 3, 5, 5), torch.Generator().manual_seed(1)
    shifts = torch.randint(0, 2 * padding + 1, (40, 2), generator=draws)
    flips = torch.rand(40, generator=draws) < 0.5
    augmented = augment(images, Augmentation(padding, flip), shifts, flips)
    for image, (top, left), flipped, found in zip(images, shifts.tolist(), flips, augmented, strict=True):
        expected = tv.crop(tv.pad(image, [padding]), top, left, 5, 5)
        assert torch.equal(found, tv.hflip(expected) if flip and flipped else expected)


def test_every_shift_and_flip_occurs_equally_often_and_independently():
    """18 outcomes, told from where two marked pixels in the middle end up."""
    count = 18_000
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[..., 2, 1], image[..., 2, 3] = 100, 200
    images = ImageSet(image.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.int64))
    dataset = Dataset(images, images, None, 2, 5, (0.0,), (1.0,), Augmentation(crop_padding=1, flip=True))
    seen = Counter()
    for batch in train_batches(dataset, 1000, stream(0, "data")):
        pixels = (batch.images * 255).round().flatten(1)
        places = torch.stack([(pixels == value).int().argmax(1) for value in (100, 200)], dim=1)
        seen.update(map(tuple, places.tolist()))
    assert len(seen) == 18
    chi_squared = sum((times - 1000) ** 2 / 1000 for times in seen.values())
    assert chi_squared < 40.8  # of 17 degrees of freedom: exceeded by one stream in 1000
