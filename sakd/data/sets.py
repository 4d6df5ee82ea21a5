"""Data sets: parts with images and labels, and what is known of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sakd.data.memory import Augmentation
from sakd.data.moments import Counting, remembered_moments
from sakd.data.randaugment import RandAugment, check_channels
from sakd.errors import ConfigError, DataError, check_number
from sakd.streams import stream

Reader = Callable[..., tuple["Images", "Images"]]
NAMED = 10  # files in an error


class Images(Protocol):
    """One part of a data set, wherever its images are: they know how to become batches.

    A sample's index is its place here. ``labels``: int64 [N], on the device on which batches arrive.
    ``shape``: of each image in a batch, C, H, W.
    """

    labels: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> "Images":
        """Images that are at ``indices``, int64, or where bool [N] is true."""

    def to(self, device: torch.device) -> "Images": ...

    def augmented(
        self, order: Tensor, batch_size: int, stream: torch.Generator, augmentation: Augmentation
    ) -> Iterator[Tensor]:
        """Batches, uint8 [B, C, H, W], of the samples in ``order``, changed at random.

        All draws are from ``stream``. ``augmentation`` is that of images in memory; images in files have
        transforms of their own in the place of crop and flip.
        """

    def plain(self, batch_size: int) -> Iterator[Tensor]:
        """Batches, uint8 [B, C, H, W], of all samples as they come, for evaluation."""

    def checksum(self) -> str:
        """Checksum, hexadecimal, of images, labels and order.

        Another one for others, as far as that can be told quickly.
        """

    def read(self, memory: Path, counting: Counting) -> tuple["Images", list[str]]:
        """The images, in memory where they belong there, and a line for each file that cannot be read.

        Those that are read when they are needed are read once; the file ``memory`` holds which were found
        whole, as long as they do not change. ``counting`` shows how far this has come.
        """


@dataclass(frozen=True)
class Dataset:
    """Parts of one data set, and what it knows.

    ``mean`` and ``std``: per channel, of pixels in [0, 1]; None: those of the training images, once
    ``ready``. ``places``: where a part was taken from more images, by name, their places among these,
    int64 [N].
    """

    train: Images
    test: Images
    val: Images | None
    classes: int
    image_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    augmentation: Augmentation = field(default_factory=Augmentation)
    places: Mapping[str, Tensor] = field(default_factory=dict)

    def places_of(self, part: str) -> Tensor:
        """Places, int64 [N], of a part's images in what was read: the training or the test images."""
        return self.places.get(part, torch.arange(len(getattr(self, part))))

    @cached_property
    def checksum(self) -> str:
        """Checksum of all parts: it tells two data sets of one name and shape apart."""
        parts = [part.checksum() for part in (self.train, self.val, self.test) if part is not None]
        return sha256(" ".join(parts).encode()).hexdigest()

    def ready(self, memory: Path, counting: Counting) -> "Dataset":
        """The data set to train on: images in memory where they belong there, mean and deviation known.

        Every file is read once, but for those that the file ``memory`` says are whole. Raises DataError
        naming files that cannot be read; whatever is done then is remembered.
        """
        parts = {name: getattr(self, name) for name in ("train", "val", "test")}
        read = {name: part.read(memory, counting) for name, part in parts.items() if part is not None}
        _raise_for([error for _, errors in read.values() for error in errors])
        there = replace(self, **{name: images for name, (images, _) in read.items()})
        if self.mean is not None and self.std is not None:
            return there
        mean, std = remembered_moments(there.train, memory.with_name(".moments"), counting)
        return replace(there, mean=self.mean or mean, std=self.std or std)

    def to(self, device: torch.device) -> "Dataset":
        val = None if self.val is None else self.val.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), val=val)


def _raise_for(errors: Sequence[str]) -> None:
    """Raise DataError if there are any: the first, and the files of some more."""
    if not errors:
        return
    first, *others = errors
    names = [error.partition(": ")[0] for error in others[: NAMED - 1]]
    more = f" and {len(others) - len(names)} more" if len(others) > len(names) else ""
    likewise = f". In all {len(errors)} files cannot be read: also {', '.join(names)}{more}"
    raise DataError(f"{first}{likewise if others else ''}")


# What every data set says of its images.
PROMISES = (
    "name",
    "classes",
    "channels",
    "image_size",
    "mean",
    "std",
    "val_fraction",
    "train_samples",
    "test_samples",
)
# And what those do whose reader does not augment them itself.
PROMISES_IN_MEMORY = ("crop_padding", "flip")
OPTIONAL_IN_MEMORY = ("rand_augment", "erasing")


def always(**facts: int) -> Callable[[Reader], Reader]:
    """Say of a reader what its images always are, such as ``classes=10``: other promises are refused."""

    def told(reader: Reader) -> Reader:
        reader.always = facts
        return reader

    return told


def in_files(reader: Reader) -> Reader:
    """Say of a reader that each of its images is in a file of its own, which ``ImageFiles.files`` names."""
    reader.in_files = True
    return reader


def calling(calls: Callable[..., dict[str, dict[str, Any]]]) -> Callable[[Reader], Reader]:
    """Say of a reader what it calls with which keys, so that these are held to it before any data is read.

    ``calls`` gets the reader's own keys, and gives nodes with a ``_target_`` by the key that they are from;
    what stands before a node's keys is one argument, the root. It raises ConfigError for what it cannot know.
    """

    def told(reader: Reader) -> Reader:
        reader.calls = calls
        return reader

    return told


def check_reader(reader: Reader, promised: Mapping[str, object]) -> None:
    """Raise ConfigError where something is promised that the reader's images never are."""
    for key, expected in getattr(reader, "always", {}).items():
        if promised[key] != expected:
            raise ConfigError(
                f"dataset.{key}: found {promised[key]}, expected {expected}, which all images of "
                f"{reader.__name__} have"
            )


def check_promises(
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    val_fraction: float,
    train_samples: int | None,
    test_samples: int | None,
    crop_padding: int = 0,
    flip: bool = False,
    rand_augment: Mapping[str, int] | None = None,
    erasing: float = 0.0,
) -> None:
    """Raise ConfigError for values that no images could satisfy. Keys as in ``assemble``."""
    for key, count, least in (
        ("classes", classes, 2),
        ("channels", channels, 1),
        ("image_size", image_size, 1),
        ("crop_padding", crop_padding, 0),
    ):
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ConfigError(f"dataset.{key}: found {count!r}, expected a whole number of at least {least}")
    if crop_padding > image_size:
        raise ConfigError(
            f"dataset.crop_padding: found {crop_padding}, expected at most dataset.image_size={image_size}: "
            "crops beyond it show nothing of the image"
        )
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and (not isinstance(values, (list, tuple)) or len(values) != channels):
            raise ConfigError(
                f"dataset.{key}: found {values!r}, expected a list of {channels}: a number for each channel, "
                "or null for that of the training images"
            )
    for value in mean or ():
        check_number("dataset.mean", value)
    for value in std or ():
        check_number("dataset.std", value, least=0, above=True)
    if not isinstance(flip, bool):
        raise ConfigError(f"dataset.flip: found {flip!r}, expected true or false")
    if rand_augment is not None:
        check_channels("dataset.rand_augment", dict(rand_augment), channels)
    check_number("dataset.erasing", erasing, least=0)
    check_number("dataset.val_fraction", val_fraction, least=0)
    if val_fraction >= 1:
        raise ConfigError(f"dataset.val_fraction: found {val_fraction}, expected a number from 0 to below 1")
    for key, count in (("train_samples", train_samples), ("test_samples", test_samples)):
        if count is not None and (not isinstance(count, int) or count < 2):
            raise ConfigError(
                f"dataset.{key}: found {count!r}, expected a whole number of at least 2, or null for all"
            )


def assemble(
    train: Images,
    test: Images,
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    crop_padding: int = 0,
    flip: bool = False,
    rand_augment: Mapping[str, int] | None = None,
    erasing: float = 0.0,
    val_fraction: float = 0.0,
    train_samples: int | None = None,
    test_samples: int | None = None,
) -> Dataset:
    """A Dataset from what was read and what its config promises.

    Validation images are a stratified ``val_fraction`` of the training images; ``train_samples`` and
    ``test_samples`` take a stratified part (null: all); the choice is the same at every seed.

    Raises ConfigError for an impossible part, DataError if images or labels are not as promised.
    """
    for part, images in (("train", train), ("test", test)):
        expected = (channels, image_size, image_size)
        if images.shape != expected:
            raise DataError(f"{name}: found {part} images of {images.shape}, expected {expected}")
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= classes:
            raise DataError(f"{name}: found {part} labels from {low} to {high}, expected 0 to {classes - 1}")
    val = None
    places = {"train": torch.arange(len(train)), "test": torch.arange(len(test))}
    if val_fraction > 0:
        held_out = round(val_fraction * len(train))
        if not 0 < held_out < len(train) - 1:
            raise ConfigError(
                f"dataset.val_fraction: found {val_fraction}, which holds out {held_out} of {len(train)} "
                "images; expected some, and some to train on"
            )
        chosen = stratified(train.labels, held_out)
        val, train = train[chosen], train[~chosen]
        places |= {"val": places["train"][chosen], "train": places["train"][~chosen]}
    train, places["train"] = _part(train, places["train"], train_samples, "dataset.train_samples")
    test, places["test"] = _part(test, places["test"], test_samples, "dataset.test_samples")
    operations = None if rand_augment is None else RandAugment(**rand_augment)
    augmentation = Augmentation(crop_padding, flip, operations, erasing)
    moments = [values if values is None else tuple(values) for values in (mean, std)]
    return Dataset(train, test, val, classes, image_size, *moments, augmentation, places)


def fetch(reader: Callable[..., object], root: str) -> None:
    """Download with torchvision's ``reader``.

    Raises DataError if that fails; an empty folder made for it is removed.
    """
    try:
        reader(root, download=True)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            Path(root).rmdir()
        raise DataError(
            f"dataset.download: cannot fetch {reader.__name__} into {root} ({error}); is there a network?"
        ) from error


def _part(images: Images, places: Tensor, count: int | None, key: str) -> tuple[Images, Tensor]:
    """A stratified part of images, and their places likewise."""
    if count is None:
        return images, places
    if count > len(images):
        raise ConfigError(f"{key}: found {count}, expected at most the {len(images)} images there are")
    chosen = stratified(images.labels, count)
    return images[chosen], places[chosen]


def stratified(labels: Tensor, count: int) -> Tensor:
    """A fixed random choice of ``count`` samples: bool [N].

    Each class is within one sample of its share in the whole.
    """
    shuffled = torch.randperm(len(labels), generator=stream(0, "data/split"))
    in_turn = labels[shuffled]
    classes, sizes = labels.unique(return_counts=True)
    shares = sizes.double() * count / len(labels)
    counts = shares.floor().long()
    largest_remainders = (shares - counts).argsort(descending=True, stable=True)[: count - int(counts.sum())]
    counts[largest_remainders] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, wanted in zip(classes, counts.tolist(), strict=True):
        chosen[shuffled[in_turn == label][:wanted]] = True
    return chosen
