"""Tiny-ImageNet (Stanford's CS231n; Le and Yang, 2015): 200 classes of ImageNet at 64x64."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from sakd.data.folders import images_of
from sakd.data.memory import ImageSet
from sakd.data.pictures import decode
from sakd.errors import DataError
from sakd.ranges import Folder

FOLDER = "tiny-imagenet-200"


def tiny_imagenet(root: Folder, classes: int, channels: int, image_size: int) -> tuple[ImageSet, ImageSet]:
    """Tiny-ImageNet: 100,000 training images, and the 10,000 official validation images as test images.

    They are in the order of their paths. Labels follow the sorted wnids, as in the field. Some of the files
    are grey; all images get three channels.

    Raises DataError naming the file or folder that is missing, damaged, too many or of another size.
    """
    folder = Path(root) / FOLDER
    if not folder.is_dir():
        raise DataError(f"dataset.root={root}: no folder {folder}; expected {FOLDER}.zip unpacked there")
    wnids = sorted(_lines(folder / "wnids.txt"))
    if len(set(wnids)) != classes:
        raise DataError(
            f"{folder / 'wnids.txt'}: found {len(set(wnids))} wnids, expected dataset.classes={classes}"
        )
    paths, labels, _ = images_of(folder / "train", wnids)
    _check_even(labels, wnids, folder / "train")
    test_paths, test_labels = _annotated(folder / "val", wnids)
    _check_even(test_labels, wnids, folder / "val")
    return tuple(
        ImageSet(_decoded(own, channels, image_size), of_those)
        for own, of_those in ((paths, labels), (test_paths, test_labels))
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a text file of Tiny-ImageNet") from error


def _annotated(folder: Path, wnids: list[str]) -> tuple[list[Path], Tensor]:
    """Paths of the images that val_annotations.txt names, sorted, and their labels."""
    path, places = folder / "val_annotations.txt", {wnid: place for place, wnid in enumerate(wnids)}
    labels = {}
    for number, line in enumerate(_lines(path), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0]
        if wnid not in places:
            raise DataError(
                f"{path}, line {number}: found {wnid!r}, expected an image and one of the wnids in wnids.txt"
            )
        if name in labels:
            raise DataError(f"{path}, line {number}: found {name} again, expected each image once")
        labels[name] = places[wnid]
    images = folder / "images"
    there = {file.name for file in images.iterdir()} if images.is_dir() else set()
    if labels.keys() - there:
        raise DataError(f"{images / min(labels.keys() - there)}: no such file, but {path} names it")
    if there - labels.keys():
        raise DataError(f"{images / min(there - labels.keys())}: found no annotation of it in {path}")
    names = sorted(labels)
    return [images / name for name in names], torch.tensor(
        [labels[name] for name in names], dtype=torch.int64
    )


def _check_even(labels: Tensor, wnids: list[str], folder: Path) -> None:
    """Raise DataError unless every class has as many images.

    An archive that was not wholly unpacked is found by it.
    """
    counts = labels.bincount(minlength=len(wnids))
    fewest, most = int(counts.argmin()), int(counts.argmax())
    if counts[fewest] < counts[most]:
        raise DataError(
            f"{folder}: found {counts[fewest]} images of {wnids[fewest]} and {counts[most]} of "
            f"{wnids[most]}, expected as many of each class"
        )


def _decoded(paths: list[str] | list[Path], channels: int, size: int) -> Tensor:
    """Images, uint8 [N, channels, size, size], by as many threads as PyTorch uses.

    Pillow lets them work side by side. Raises DataError for one that is damaged or of another size.
    """
    images = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)

    def read(place: int) -> None:
        images[place] = pil_to_tensor(decode(paths[place], channels, size))

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(read, range(len(paths))):  # raises the first error, and what waits is not begun
            pass
    return images
