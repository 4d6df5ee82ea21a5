"""Images in files: decoded, augmented and gathered by worker processes while the device trains."""

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from sakd.errors import ConfigError, DataError
from sakd.ranges import Folder, Processes
from sakd.streams import drawing_from

Transform = Callable[[Image.Image], Image.Image | Tensor]

# Workers start for every pass over the images; one that does not begin as a copy of this process imports
# PyTorch for seconds.
START = "fork" if sys.platform == "linux" else None

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)

MODES = {1: "L", 3: "RGB"}  # Pillow's names, by channels


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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> "ImageFiles":
        return replace(self, paths=self.paths[indices.numpy()], labels=self.labels[indices])

    def to(self, device: torch.device) -> "ImageFiles":
        return replace(self, labels=self.labels.to(device))

    def augmented(
        self, order: Tensor, batch_size: int, stream: torch.Generator, augmentation: object
    ) -> Iterator[Tensor]:
        seeds = torch.randint(2**63 - 1, (len(self),), generator=stream)
        return self._decoded(
            zip(order.split(batch_size), seeds.split(batch_size), strict=False), self.augmentation
        )

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

    def _decoded(self, requests: Iterable[tuple[Tensor, Tensor]], transform: Transform) -> Iterator[Tensor]:
        loader = DataLoader(
            _Decoder(self.folder, self.paths, self.shape, transform),
            batch_size=None,  # a request is a whole batch
            sampler=([part.tolist() for part in request] for request in requests),
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
            for images in batches:
                if isinstance(images, DataError):
                    raise images
                yield images.to(self.labels.device, non_blocking=True)
        finally:
            if self.workers and batches is not None:
                with _interruptions_wait():
                    # There is no public way, and a traceback may keep the iterator from its end.
                    batches._shutdown_workers()


@contextmanager
def _interruptions_wait() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the block is left.

    What a handler raises inside fork's callbacks or a ``__del__`` is lost. Workers started inside get neither
    at first, and Ctrl-C never: it is for this process, which ends its workers.
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


def decode(path: str | Path, channels: int) -> Image.Image:
    """The image, converted to grey (1) or RGB (3).

    Raises DataError naming the file if it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert(MODES[channels])
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise DataError(f"{path}: cannot be read ({error}); expected a whole image file") from error


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def image_folder(
    root: Folder,
    train: Folder,
    test: Folder,
    classes: int,
    channels: int,
    image_size: int,
    augmentation: Mapping[str, Transform],
    evaluation: Mapping[str, Transform],
    workers: Processes,
    pin_memory: bool,
) -> tuple[ImageFiles, ImageFiles]:
    """Images in ``root/train/<class>/…`` and ``root/test/<class>/…``, as torchvision's ImageFolder has it.

    Classes are in the order of their folders' names. Images may differ in size. Transforms are applied in
    their order.

    Raises ConfigError for values that cannot be used, DataError if folders or classes are missing, empty or
    too many.
    """
    if channels not in MODES:
        raise ConfigError(f"dataset.channels: found {channels}, expected 1 (grey) or 3 (RGB)")
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise ConfigError(f"dataset.workers: found {workers!r}, expected a whole number of at least 0")
    if not isinstance(pin_memory, bool):
        raise ConfigError(f"dataset.pin_memory: found {pin_memory!r}, expected true or false")
    shape = (channels, image_size, image_size)
    transforms = [_composed("augmentation", augmentation, shape), _composed("evaluation", evaluation, shape)]
    folders = [Path(root) / own for own in (train, test)]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"dataset.root={root}: no folder {folder}; expected {train} and {test}, with a folder "
                "for each class"
            )
    names = subfolders(folders[0])
    if len(names) != classes:
        raise DataError(
            f"{folders[0]}: found {len(names)} folders, expected one for each of dataset.classes={classes}"
        )
    parts = []
    for folder in folders:
        paths, labels = images_of(folder, names)
        relative = np.array([os.fsencode(os.path.relpath(path, folder)) for path in paths])
        parts.append(ImageFiles(str(folder), relative, labels, shape, *transforms, workers, pin_memory))
    return tuple(parts)


def _composed(key: str, transforms: Mapping[str, Transform], shape: tuple[int, ...]) -> Transform:
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


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted. Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a folder for each class")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise DataError(f"{folder}: found no folders, expected one for each class")
    return names


def images_of(folder: Path, names: list[str]) -> tuple[list[str], Tensor]:
    """Paths of the images in the folder of each class, at any depth, and their labels.

    Labels: int64 [N], places in ``names``. Raises DataError unless ``folder`` has exactly those folders, with
    images in each.
    """
    found = subfolders(folder)
    for wrong, what in ((set(names) - set(found), "no"), (set(found) - set(names), "one more")):
        if wrong:
            raise DataError(
                f"{folder}: found {what} folder {min(wrong)}, expected one for each of the {len(names)} "
                "classes"
            )
    labelled = make_dataset(
        str(folder), {name: label for label, name in enumerate(names)}, IMG_EXTENSIONS, allow_empty=True
    )
    labels = torch.tensor([label for _, label in labelled], dtype=torch.int64)
    for name, count in zip(names, labels.bincount(minlength=len(names)).tolist(), strict=True):
        if not count:
            raise DataError(f"{folder / name}: found no images, expected some ({', '.join(IMG_EXTENSIONS)})")
    return [path for path, _ in labelled], labels
