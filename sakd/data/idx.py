"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, arXiv 1708.07747), from its four idx files."""

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from sakd.data.memory import ImageSet
from sakd.data.sets import always, fetch
from sakd.errors import DataError
from sakd.ranges import Folder

UNSIGNED_BYTES = 0x08


@always(classes=10, channels=1, image_size=28)
def fashion_mnist(root: Folder, download: bool) -> tuple[ImageSet, ImageSet]:
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28x28.

    The idx files, gzipped or not, may lie in ``root`` itself or where torchvision puts them,
    ``root/FashionMNIST/raw``.

    Raises DataError naming the file that is missing or damaged.
    """
    folder = Path(root)
    raw = folder / "FashionMNIST" / "raw"
    if download and not _complete(folder):
        fetch(FashionMNIST, root)
    if not _complete(folder) and raw.is_dir():
        folder = raw
    return _read_pair(folder, "train"), _read_pair(folder, "t10k")


PARTS = tuple(f"{part}-{what}" for part in ("train", "t10k") for what in ("images", "labels"))


def _complete(folder: Path) -> bool:
    return all(_find(folder, part) is not None for part in PARTS)


def _find(folder: Path, part: str) -> Path | None:
    kind = "idx3" if part.endswith("images") else "idx1"
    paths = (folder / f"{part}-{kind}-ubyte{ending}" for ending in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _read_pair(folder: Path, part: str) -> ImageSet:
    images, labels = (_read(folder, f"{part}-{what}") for what in ("images", "labels"))
    if len(images) != len(labels):
        raise DataError(
            f"{folder}: found {len(images)} {part} images and {len(labels)} labels, expected as many of both"
        )
    return ImageSet(images[:, None], labels.long())


def _read(folder: Path, part: str) -> Tensor:
    path = _find(folder, part)
    if path is None:
        raise DataError(
            f"dataset.root={folder}: no {part}-idx*-ubyte or .gz found there or in FashionMNIST/raw; "
            "expected the four files of Fashion-MNIST (dataset.download=true fetches them)"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); expected a whole gzip file") from error
    return parse_idx(content, path)


def parse_idx(content: bytes, path: Path) -> Tensor:
    """A uint8 tensor from the idx format.

    The format: two zero bytes, a type, the number of sizes, the sizes, the values. Raises DataError naming
    ``path`` if the content is of another type or length.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTES:
        raise DataError(
            f"{path}: found a header {content[:4].hex()}, expected an idx file of unsigned bytes (000008..)"
        )
    header = 4 + 4 * content[3]
    sizes = struct.unpack(f">{content[3]}I", content[4:header]) if len(content) >= header else ()
    expected = header + int(torch.tensor(sizes, dtype=torch.int64).prod()) if sizes else header
    if not sizes or len(content) != expected or expected == header:
        raise DataError(
            f"{path}: found {len(content)} bytes, expected {expected} from its header; the file is damaged"
        )
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(sizes)
