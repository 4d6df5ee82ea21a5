"""Which files of a folder are images of a data set: a folder for each class, images at any depth in it."""

import os
from collections import Counter, deque
from pathlib import Path

import torch
from torch import Tensor

from sakd.errors import DataError

# What Pillow reads wherever it is installed.
ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in ``folder`` that are not hidden, sorted. Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a folder for each class")
    names = [entry.name for entry in _entries(folder) if _is_folder(entry) and not _is_hidden(entry.name)]
    if not names:
        raise DataError(f"{folder}: found no folders, expected one for each class")
    return names


def images_of(folder: Path, names: list[str]) -> tuple[list[str], Tensor, Counter[str]]:
    """Paths of the images in the folder of each class, at any depth; their labels; what was left out.

    Labels: int64 [N], places in ``names``. What is left out is counted by why it is: by its ending, hidden
    (the name begins with a dot), a link to what was counted before, or to a folder around it, a pipe or a
    device, or in no class's folder. Links are followed; a file counts once in a class. The order is that of
    torchvision's ImageFolder.

    Raises DataError unless ``folder`` has exactly those folders, with images in each.
    """
    found = subfolders(folder)
    for wrong, what in ((set(names) - set(found), "no"), (set(found) - set(names), "one more")):
        if wrong:
            raise DataError(
                f"{folder}: found {what} folder {min(wrong)}, expected one for each of the {len(names)} "
                "classes"
            )
    paths, counts, left_out = [], [], Counter()
    for name in names:
        of_class, left_out_here = _images_in(folder / name)
        if not of_class:
            raise DataError(
                f"{folder / name}: found no images, expected some ({', '.join(ENDINGS)}){told(left_out_here)}"
            )
        paths += of_class
        counts.append(len(of_class))
        left_out += left_out_here
    left_out["in no class's folder"] = sum(
        not _is_folder(entry) and not _is_hidden(entry.name) and _ending(entry.name) in ENDINGS
        for entry in _entries(folder)
    )
    return paths, torch.arange(len(names)).repeat_interleave(torch.tensor(counts)), +left_out


def told(left_out: Counter[str]) -> str:
    """What was left out, as the end of a sentence: ``"; left out: 6 .txt, 2 hidden"``, or nothing."""
    counted = ", ".join(f"{count} {why}" for why, count in left_out.most_common())
    return f"; left out: {counted}" if counted else ""


def _images_in(folder: Path) -> tuple[list[str], Counter[str]]:
    """Paths of the images of one class, sorted by their folders, then by their names; what is left out."""
    found = _Class(str(folder))
    while found.folders or found.links:
        if found.folders:
            found.look_into(found.folders.popleft())
        else:  # once all is known that is there by itself
            found.follow(found.links.popleft())
    return sorted(found.images, key=os.path.split), found.left_out


class _Class:
    """What has been found of a class: its images, and folders and links that are still to be looked at."""

    def __init__(self, folder: str):
        self.images: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.folders, self.links = deque([folder]), deque()
        self.seen = {os.path.realpath(folder)}  # folders and images, where they are without any link

    def look_into(self, folder: str) -> None:
        real_folder = os.path.realpath(folder)
        for entry in _entries(folder):
            if _is_hidden(entry.name):
                self.left_out["hidden"] += 1
            elif not _is_folder(entry) and _ending(entry.name) not in ENDINGS:
                self.left_out[_ending(entry.name) or "without an ending"] += 1
            elif entry.is_symlink():
                self.links.append(entry)
            else:
                self._take(entry, os.path.join(real_folder, entry.name))

    def follow(self, link: os.DirEntry) -> None:
        real, inside = os.path.realpath(link.path), os.path.realpath(os.path.dirname(link.path))
        if os.path.commonpath([real, inside]) == real:  # a folder around the link
            self.left_out["linking back"] += 1
        else:
            self._take(link, real)

    def _take(self, entry: os.DirEntry, real: str) -> None:
        if real in self.seen:
            self.left_out["linked again"] += 1
        elif _is_special(entry):
            self.left_out["a pipe or device"] += 1
        else:
            self.seen.add(real)
            (self.folders if _is_folder(entry) else self.images).append(entry.path)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    """What is in a folder, sorted by name. Raises DataError if it cannot be looked into."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); expected a folder of images"
        ) from error


def _is_folder(entry: os.DirEntry) -> bool:
    """True for a folder and for a link to one; asking a link that leads to itself would raise."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_special(entry: os.DirEntry) -> bool:
    """True for a pipe or a device, which may be waited for without end; a link to nothing is damaged."""
    return not _is_folder(entry) and not os.path.isfile(entry.path) and os.path.exists(entry.path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
