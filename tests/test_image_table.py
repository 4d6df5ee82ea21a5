"""Images that a CSV table names."""

import csv
from pathlib import Path

import pytest

from sakd.configuration import build
from sakd.data import Dataset, evaluation_batches
from sakd.errors import ConfigError, DataError
from tests.conftest import compose_config
from tests.test_data_files import write_image

LABELS = ("pear", "apple")
ROWS = [(f"all/{number}.png", LABELS[number % 2], ("train", "test")[number > 7]) for number in range(10)]


@pytest.fixture
def root(tmp_path) -> Path:
    for number, (file, *_) in enumerate(ROWS):
        write_image(tmp_path / "fruit" / file, number, (20, 24))
    write_table(tmp_path / "fruit", [("file", "label", "split"), *ROWS])
    return tmp_path / "fruit"


def write_table(root: Path, rows: list[tuple]) -> None:
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def read(root: Path, *overrides: str) -> Dataset:
    keys = (f"dataset.root={root}", "dataset.classes=2", "dataset.image_size=16", "dataset.workers=0")
    return build.dataset(compose_config("dataset=image_table", *keys, *overrides))


def test_files_labels_and_splits_are_the_table_s(root):
    dataset = read(root)
    assert [path.decode() for path in dataset.train.paths] == [file for file, *_ in ROWS[:8]]
    assert dataset.train.labels.tolist() == [1, 0] * 4
    assert dataset.test.labels.tolist() == [1, 0]
    (batch,) = evaluation_batches(dataset.test, dataset)
    assert batch.images.shape == (2, 3, 16, 16)


def test_without_splits_a_fixed_stratified_part_is_held_out(root):
    write_table(root, [("file", "label"), *(row[:2] for row in ROWS)])
    first, again = (read(root, "dataset.test_fraction=0.4") for _ in range(2))
    assert first.test.labels.bincount().tolist() == [2, 2]
    assert first.test.paths.tolist() == again.test.paths.tolist()
    assert not {*first.test.paths} & {*first.train.paths}
    with pytest.raises(
        ConfigError,
        match=r"^dataset\.test_fraction: found none, and no test split \(column split in .*labels\.csv\)",
    ):
        read(root)


def test_a_part_to_hold_out_beside_a_column_of_splits_is_refused(root):
    with pytest.raises(
        ConfigError, match=r"^dataset\.test_fraction: found 0\.4 beside the test split \(column split in"
    ):
        read(root, "dataset.test_fraction=0.4")


WRONG = {
    "no columns": ([("a", "b"), ("c", "d")], r"labels\.csv: found a, b; expected columns file and label"),
    "nothing": ([], r"labels\.csv: found no rows; expected columns"),
    "a value too few": (
        [("file", "label"), ("a.png",)],
        r"line 2: found \['a\.png', None\], expected a value",
    ),
    "another split": ([("file", "label", "split"), ("a", "b", "valid")], r"line 2: found split 'valid'"),
    "a file twice": ([("file", "label"), ("a", "b"), ("a", "c")], r"line 3: found a again, as in line 2"),
    "a label too few": ([("file", "label"), ("a", "b")], r"found 1 labels, expected dataset\.classes=2"),
    "no test images": (
        [("file", "label", "split"), ("a", "b", "train"), ("c", "d", "train")],
        r"found no images to test",
    ),
}


@pytest.mark.parametrize(("rows", "message"), WRONG.values(), ids=WRONG)
def test_a_table_that_is_wrong_is_told_by_its_line(root, rows, message):
    write_table(root, rows)
    with pytest.raises(DataError, match=message):
        read(root)


def test_a_missing_table_is_named(root):
    with pytest.raises(DataError, match=r"fruit/none\.csv: cannot be read .* expected a table in CSV"):
        read(root, "dataset.table=none.csv")
