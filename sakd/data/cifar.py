"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), through torchvision's readers."""

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from sakd.data.memory import ImageSet
from sakd.data.sets import always, fetch
from sakd.errors import DataError
from sakd.ranges import Folder


@always(classes=10, channels=3, image_size=32)
def cifar10(root: Folder, download: bool) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10: 50,000 training and 10,000 test images of 3x32x32 in 10 classes.

    Raises DataError naming the file that is missing or whose checksum is wrong.
    """
    return _read(CIFAR10, root, download)


@always(classes=100, channels=3, image_size=32)
def cifar100(root: Folder, download: bool) -> tuple[ImageSet, ImageSet]:
    """CIFAR-100: 50,000 training and 10,000 test images of 3x32x32 in 100 classes.

    Raises DataError naming the file that is missing or whose checksum is wrong.
    """
    return _read(CIFAR100, root, download)


def _read(reader: type[CIFAR10], root: str, download: bool) -> tuple[ImageSet, ImageSet]:
    if download:
        fetch(reader, root)
    folder = Path(root) / reader.base_folder
    for name, md5 in [*reader.train_list, *reader.test_list, [reader.meta["filename"], reader.meta["md5"]]]:
        path = folder / name
        if not path.is_file():
            raise DataError(
                f"dataset.root={root}: no file {path}; expected {reader.__name__}'s python version unpacked "
                "there (dataset.download=true fetches it)"
            )
        if not check_integrity(path, md5):
            raise DataError(
                f"{path}: found another MD5 checksum than {md5}, which is expected; the file is damaged"
            )
    return tuple(_image_set(reader(root, train=train)) for train in (True, False))


def _image_set(read: CIFAR10) -> ImageSet:
    return ImageSet(torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets))
