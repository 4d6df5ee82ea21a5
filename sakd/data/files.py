"""Images in files: decoded, augmented and gathered by worker processes while the device trains."""

import hashlib
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from sakd.data.checked import are_remembered, fingerprints, remember
from sakd.data.folders import images_of, subfolders, told
from sakd.data.held_out import check_test_fraction, with_test_images
from sakd.data.memory import Augmentation
from sakd.data.pictures import MODES, decode
from sakd.data.sets import Counting, in_files
from sakd.errors import ConfigError, DataError
from sakd.ranges import BelowOne, Folder, Processes
from sakd.streams import drawing_from

log = logging.getLogger("sakd")

Transform = Callable[[Image.Image], Image.Image | Tensor]

# Workers start for every pass over the images; one that does not begin as a copy of this process imports
# PyTorch for seconds.
START = "fork" if sys.platform == "linux" else None

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

CHECKED_AT_ONCE = 64  # images
TEST_NAMES = ("test", "val", "valid", "validation")  # of a folder of test images


class Task(Protocol):
    """What workers do for each request."""

    def __getitem__(self, request: Any) -> Any: ...


@dataclass(frozen=True)
class ImageFiles:
    """Images that are read when they are needed, and become uint8 of ``shape`` by one of two transforms.

    ``paths``: [N] bytes, from ``folder`` on; an array, since worker processes would copy a list of strings
    object by object.

    What ``augmentation`` draws for a sample depends on the epoch's stream and the sample's position in the
    epoch alone, not on the number of ``workers`` (0: this process decodes). ``pin_memory``: for CUDA, to
    transfer while the device computes.

    Batches raise DataError naming the file that cannot be decoded or transformed.
    """

    folder: str
    paths: np.ndarray
    labels: Tensor
    shape: tuple[int, ...]
    augmentation: Transform
    evaluation: Transform
    workers: int
    pin_memory: bool
    size: ClassVar[int | None] = None  # pixels of a file's side, where all must have it

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> "ImageFiles":
        return replace(self, paths=self.paths[indices.numpy()], labels=self.labels[indices])

    def files(self) -> list[str]:
        """Paths of the images, in their order."""
        return [os.path.join(self.folder, os.fsdecode(path)) for path in self.paths]

    def to(self, device: torch.device) -> "ImageFiles":
        return replace(self, labels=self.labels.to(device))

    def augmented(
        self, order: Tensor, batch_size: int, stream: torch.Generator, augmentation: Augmentation
    ) -> Iterator[Tensor]:
        seeds = torch.randint(2**63 - 1, (len(self),), generator=stream)
        batches = self._decoded(
            zip(order.split(batch_size), seeds.split(batch_size), strict=False), self.augmentation
        )
        if augmentation.rand_augment is None:
            return batches
        return augmentation.rand_augment.each(batches, len(self), batch_size, stream)

    def plain(self, batch_size: int) -> Iterator[Tensor]:
        batches = torch.arange(len(self)).split(batch_size)
        return self._decoded(zip(batches, batches, strict=True), self.evaluation)

    def checksum(self) -> str:
        """Checksum of the files' names, sizes and labels, and of how they are transformed.

        To read them all would take as long as to evaluate them.
        """
        total = hashlib.sha256(self.paths.tobytes() + self.labels.cpu().numpy().tobytes())
        for path in self.paths:
            total.update(os.path.getsize(os.path.join(self.folder, os.fsdecode(path))).to_bytes(8, "big"))
        total.update(f"{self.shape} {self.evaluation}".encode())
        return total.hexdigest()

    def read(self, memory: Path, counting: Counting) -> tuple["ImageFiles", list[str]]:
        return self, self.damaged(memory, counting)

    def damaged(self, memory: Path, counting: Counting) -> list[str]:
        """A line for each file that cannot be read; those that ``memory`` has are not read again."""
        prints = fingerprints(self.folder, self.paths)
        (new,) = np.nonzero(~are_remembered(prints, memory))
        if not len(new):
            return []
        text = f"reading files of {self.folder}, whether they are whole"
        log.info("%s: %d, and not again until they change", text, len(new))
        checker, errors, whole = _Checker(self.folder, self.paths, self.shape[0], self.size), [], []
        requests = (new[first : first + CHECKED_AT_ONCE] for first in range(0, len(new), CHECKED_AT_ONCE))
        try:
            with counting(text, len(new)) as advance, closing(self.worked(checker, requests)) as answers:
                for places, found in answers:
                    errors += [error for error in found if error is not None]
                    whole += [place for place, error in zip(places, found, strict=True) if error is None]
                    advance(len(places))
        finally:
            remember(prints[whole], memory)
        return errors

    def _decoded(self, requests: Iterable[tuple[Tensor, Tensor]], transform: Transform) -> Iterator[Tensor]:
        decoder = _Decoder(self.folder, self.paths, self.shape, transform)
        for images in self.worked(decoder, ([part.tolist() for part in request] for request in requests)):
            if isinstance(images, DataError):
                raise images
            yield images.to(self.labels.device, non_blocking=True)

    def worked(self, task: Task, requests: Iterable) -> Iterator:
        """What ``task`` makes of each request, in their order; the workers do it."""
        loader = DataLoader(
            task,
            batch_size=None,  # a request is a whole batch
            sampler=requests,
            num_workers=self.workers,
            pin_memory=self.pin_memory and self.labels.is_cuda,
            multiprocessing_context=START if self.workers else None,
            worker_init_fn=_end_when_told,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        batches = None
        try:
            with _interruptions_wait():
                batches = iter(loader)
            yield from batches
        finally:
            if self.workers and batches is not None:
                with _interruptions_wait():
                    # There is no public way, and a traceback may keep the iterator from its end.
                    batches._shutdown_workers()


@contextmanager
def _interruptions_wait() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP until the block is left.

    What a handler raises inside fork's callbacks or a ``__del__`` is lost. Workers started inside get none
    at first, and SIGTERM alone later: the others are for this process, which ends its workers.
    """
    arrived, before = [], {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {
            number: signal.signal(number, lambda own, _: arrived.append(own)) for number in INTERRUPTIONS
        }
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


def _end_when_told(worker: int) -> None:
    """Let SIGTERM end a worker with 0.

    Of a worker that fails, the main process would hear before its own SIGTERM.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


@dataclass(frozen=True)
class _Decoder:
    """Images as a worker decodes them: ``decoder[places, seeds]`` is the batch of those there.

    Each is augmented from its own seed.
    """

    folder: str
    paths: np.ndarray
    shape: tuple[int, ...]
    transform: Transform

    def __getitem__(self, request: tuple[list[int], list[int]]) -> Tensor | DataError:
        """A batch of images, or the error that one of them raised.

        Raised in a worker it would arrive as the worker's traceback.
        """
        try:
            return torch.stack([self._image(place, seed) for place, seed in zip(*request, strict=True)])
        except DataError as error:
            return error

    def _image(self, place: int, seed: int) -> Tensor:
        path = os.path.join(self.folder, os.fsdecode(self.paths[place]))
        image = decode(path, self.shape[0])
        try:
            with drawing_from(seed):
                transformed = v2.functional.to_image(self.transform(image))
        except Exception as error:  # any transform may be configured
            raise DataError(
                f"{path}: found an image of {_size(image)}, which cannot be transformed ({error})"
            ) from error
        if transformed.shape != self.shape:
            raise DataError(
                f"{path}: found an image of {_size(image)}, which the transforms make "
                f"{tuple(transformed.shape)}; expected {self.shape}"
            )
        return transformed


@dataclass(frozen=True)
class _Checker:
    """Image files as a worker checks them: places come back, and for each None, or why it cannot be read."""

    folder: str
    paths: np.ndarray
    channels: int
    size: int | None

    def __getitem__(self, places: np.ndarray) -> tuple[list[int], list[str | None]]:
        return places.tolist(), [self._error(place) for place in places]

    def _error(self, place: int) -> str | None:
        try:
            decode(os.path.join(self.folder, os.fsdecode(self.paths[place])), self.channels, self.size)
        except DataError as error:
            return str(error)
        return None


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


@in_files
def image_folder(
    root: Folder,
    train: Folder,
    test: Folder | None,
    classes: int,
    channels: int,
    image_size: int,
    augmentation: Mapping[str, Transform],
    evaluation: Mapping[str, Transform],
    workers: Processes,
    pin_memory: bool,
    test_fraction: BelowOne | None = None,  # stored configurations may be without it
) -> tuple[ImageFiles, ImageFiles]:
    """Images in ``root/train/<class>/…`` and ``root/test/<class>/…``, as torchvision's ImageFolder has it.

    Classes are in the order of their folders' names. Images may differ in size. Transforms are applied in
    their order. Where there is no folder ``test``, a fixed stratified ``test_fraction`` is held out.

    Raises ConfigError for values that cannot be used, DataError if folders or classes are missing, empty or
    too many.
    """
    how = how_read(channels, image_size, augmentation, evaluation, workers, pin_memory)
    found = found_in(root, train, test, test_fraction, classes)
    return with_test_images([ImageFiles(*which, *how) for which in found], test_fraction, root)


def how_read(
    channels: int,
    image_size: int,
    augmentation: Mapping[str, Transform],
    evaluation: Mapping[str, Transform],
    workers: int,
    pin_memory: bool,
) -> tuple[tuple[int, ...], Transform, Transform, int, bool]:
    """What ``ImageFiles`` takes beside its files. Raises ConfigError for values that cannot be used."""
    workers = checked_reading(channels, workers, pin_memory)
    shape = (channels, image_size, image_size)
    transforms = composed("augmentation", augmentation, shape), composed("evaluation", evaluation, shape)
    return shape, *transforms, workers, pin_memory


def found_in(
    root: str, train: str, test: str | None, test_fraction: float | None, classes: int
) -> list[tuple[str, np.ndarray, Tensor]]:
    """Folder, paths and labels of training and test images, as ``ImageFiles`` has them, and a word of them.

    Of the training images alone where the test images are a part of them.

    Raises ConfigError for a test folder beside a ``test_fraction``, or neither, DataError if folders or
    classes are missing, empty or too many.
    """
    own = [train]
    if test is None or test_fraction:
        split = "dataset.test" if test is None else f"folder {Path(root) / test}"
        check_test_fraction(test_fraction, split, is_there=test is not None and (Path(root) / test).is_dir())
    else:
        own.append(test)
    folders = [Path(root) / name for name in own]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"dataset.root={root}: no folder {folder}; expected {' and '.join(own)}, with a folder for "
                f"each class{_instead(Path(root), test) if folder is not folders[0] else ''}"
            )
    names = subfolders(folders[0])
    if len(names) != classes:
        raise DataError(
            f"{folders[0]}: found {len(names)} folders, expected one for each of dataset.classes={classes}"
        )
    parts, left_out = [], Counter()
    for folder in folders:
        paths, labels, left_out_here = images_of(folder, names)
        relative = np.array([os.fsencode(os.path.relpath(path, folder)) for path in paths])
        parts.append((str(folder), relative, labels))
        left_out += left_out_here
    trained_on, *tested = (f"{len(labels):,}" for *_, labels in parts)
    counted = (
        f"{trained_on} images to train on and {tested[0]} test images" if tested else f"{trained_on} images"
    )
    _say_once(f"images of {root}", f"{root}: {counted} of {classes} classes{told(left_out)}")
    return parts


def checked_reading(channels: int, workers: int, pin_memory: bool) -> int:
    """The number of workers, at most one a core. Raises ConfigError for values that cannot be used."""
    if channels not in MODES:
        raise ConfigError(f"dataset.channels: found {channels}, expected 1 (grey) or 3 (RGB)")
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise ConfigError(f"dataset.workers: found {workers!r}, expected a whole number of at least 0")
    if not isinstance(pin_memory, bool):
        raise ConfigError(f"dataset.pin_memory: found {pin_memory!r}, expected true or false")
    return _at_most_cores(workers)


def _instead(root: Path, test: str) -> str:
    """What else may give test images: a folder of another name that is there, or a part of the images."""
    there = [name for name in TEST_NAMES if name != test and (root / name).is_dir()]
    if there:
        return f" (dataset.test={there[0]} takes {there[0]}, which is there)"
    return " (dataset.test_fraction=0.2 holds out a fixed part of the others)"


def _at_most_cores(workers: int) -> int:
    """As many workers as there are cores for this process, where more are asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cores:
        _say_once(
            "dataset.workers",
            f"dataset.workers: found {workers}, this process has {cores} cores; {cores} decode images",
        )
    return min(workers, cores)


def _say_once(topic: str, text: str) -> None:
    log.info("%s", text, extra={"news": (topic, text)})


def composed(key: str, transforms: Mapping[str, Transform], shape: tuple[int, ...]) -> Transform:
    """One transform of all.

    Raises ConfigError unless it makes an image of another size ``shape``, in bytes.
    """
    if not isinstance(transforms, Mapping) or not transforms or not all(map(callable, transforms.values())):
        raise ConfigError(
            f"dataset.{key}: found {transforms!r}, expected torchvision's transforms, each under a name"
        )
    composed = v2.Compose(list(transforms.values()))
    probe = Image.new(MODES[shape[0]], (2 * shape[2] + 1, 3 * shape[1]))
    try:
        with drawing_from(0):
            found = v2.functional.to_image(composed(probe))
    except Exception as error:  # any transform may be configured
        raise ConfigError(f"dataset.{key}: fails on an image of {_size(probe)} ({error})") from error
    if found.shape != shape or found.dtype != torch.uint8:
        raise ConfigError(
            f"dataset.{key}: found that it makes {tuple(found.shape)} of {found.dtype} of an image, "
            f"expected {shape} of torch.uint8, as dataset.channels and dataset.image_size say"
        )
    return composed
