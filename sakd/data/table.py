"""Images in files that a table names: a CSV file with columns file, label and perhaps split."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from sakd.data.files import ImageFiles, Transform, how_read
from sakd.data.held_out import check_test_fraction, with_test_images
from sakd.data.sets import in_files
from sakd.errors import DataError
from sakd.ranges import BelowOne, File, Folder, Processes

SPLITS = ("train", "test")


@in_files
def image_table(
    root: Folder,
    table: File,
    test_fraction: BelowOne,
    classes: int,
    channels: int,
    image_size: int,
    augmentation: Mapping[str, Transform],
    evaluation: Mapping[str, Transform],
    workers: Processes,
    pin_memory: bool,
) -> tuple[ImageFiles, ImageFiles]:
    """Images in the files that ``root/table`` names, from ``root`` on, in its order.

    Its labels are names, numbered in their sorted order. Where it has no column ``split`` (``train`` or
    ``test``), a fixed stratified ``test_fraction`` is held out. Images may differ in size, and are
    transformed as those of `image_folder`.

    Raises ConfigError for values that cannot be used, DataError naming the table's line that is wrong.
    """
    how = how_read(channels, image_size, augmentation, evaluation, workers, pin_memory)
    path = Path(root) / table
    rows = _rows(path)
    names = sorted({row["label"] for row in rows})
    if len(names) != classes:
        raise DataError(f"{path}: found {len(names)} labels, expected dataset.classes={classes}")
    labels = torch.tensor([names.index(row["label"]) for row in rows], dtype=torch.int64)
    files = np.array([os.fsencode(row["file"]) for row in rows])
    everything = ImageFiles(root, files, labels, *how)
    has_splits = "split" in rows[0]
    check_test_fraction(test_fraction, f"column split in {path}", is_there=has_splits)
    if not has_splits:
        return with_test_images([everything], test_fraction, str(path))
    is_test = torch.tensor([row["split"] == "test" for row in rows])
    for split, chosen in zip(SPLITS, (~is_test, is_test), strict=True):
        if not chosen.any():
            raise DataError(f"{path}: found no images to {split}, expected some")
    return everything[~is_test], everything[is_test]


def _rows(path: Path) -> list[dict[str, str]]:
    """The table's rows by column. Raises DataError, naming the line, for one that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a table in CSV") from error
    for column in ("file", "label"):
        if not rows or column not in rows[0]:
            found = ", ".join(filter(None, rows[0])) if rows else "no rows"
            raise DataError(f"{path}: found {found}; expected columns file and label, and perhaps split")
    seen: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values() or not row["file"] or not row["label"]:
            raise DataError(
                f"{path}, line {line}: found {list(row.values())}, expected a value for each column"
            )
        if row.get("split", "train") not in SPLITS:
            raise DataError(f"{path}, line {line}: found split {row['split']!r}, expected train or test")
        if row["file"] in seen:
            before = f"as in line {seen[row['file']]}"
            raise DataError(f"{path}, line {line}: found {row['file']} again, {before}; expected it once")
        seen[row["file"]] = line
    return rows
