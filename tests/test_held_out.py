"""Test images of folders that have none of their own: a fixed part of the others."""

import os
from pathlib import Path

import pytest

from sakd.configuration import Config, build, digest
from sakd.data import Dataset
from sakd.errors import ConfigError, DataError
from tests.conftest import compose_config
from tests.test_data_files import write_image

FRACTION = "dataset.test_fraction=0.25"
READERS = ("image_folder", "small_images")


@pytest.fixture
def root(tmp_path) -> Path:
    """Folders of training images alone: 8 apples and 4 figs."""
    for name, count in (("apple", 8), ("fig", 4)):
        for number in range(count):
            write_image(tmp_path / f"fruit/train/{name}/{number}.png", number, (8, 8))
    return tmp_path / "fruit"


def composed(reader: str, root: Path, *overrides: str) -> Config:
    keys = (f"dataset.root={root}", "dataset.classes=2", "dataset.image_size=8", "dataset.workers=0")
    return compose_config(f"dataset={reader}", *keys, *overrides)


def read(reader: str, root: Path, *overrides: str) -> Dataset:
    return build.dataset(composed(reader, root, *overrides))


def files(dataset: Dataset, part: str) -> list[str]:
    return [os.fsdecode(path) for path in getattr(dataset, part).paths]


@pytest.mark.parametrize("reader", READERS)
def test_a_stratified_part_is_held_out_the_same_at_every_seed_and_a_line_says_so(reader, root, caplog):
    with caplog.at_level("INFO", "sakd"):
        first, another_seed = (read(reader, root, FRACTION, f"seed={seed}") for seed in range(2))
    assert first.test.labels.tolist() == [0, 0, 1]
    assert files(first, "test") == files(another_seed, "test")
    assert sorted(files(first, "train") + files(first, "test")) == sorted(
        f"{path.parent.name}/{path.name}" for path in root.rglob("*.png")
    )
    assert f"{root}: of 12 images 3 are held out as test images, in each run the same" in caplog.messages


def test_classes_may_lie_in_the_root_itself(root):
    assert len(read("image_folder", root / "train", "dataset.train=.", FRACTION).test) == 3


def test_validation_images_are_none_of_the_test_images(root):
    dataset = read("image_folder", root, FRACTION, "dataset.val_fraction=0.3")
    parts = [files(dataset, part) for part in ("train", "val", "test")]
    assert len({path for part in parts for path in part}) == sum(map(len, parts)) == 12


def test_a_folder_of_test_images_that_is_to_be_left_out_is_left_out_by_name(root):
    (root / "test").mkdir()
    assert len(read("image_folder", root, FRACTION, "dataset.test=null").test) == 3


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ([], DataError, r"no folder .*/fruit/test; .* \(dataset\.test_fraction=0\.2 holds out a fixed part"),
        (
            ["dataset.test=null"],
            ConfigError,
            r"^dataset\.test_fraction: found none, and no test split \(dataset\.test\); expected a share",
        ),
        (
            [FRACTION, "dataset.test=train"],
            ConfigError,
            r"^dataset\.test_fraction: found 0\.25 beside the test split \(folder .*/fruit/train\); expected",
        ),
        (["dataset.test_fraction=0.01"], ConfigError, r"found 0\.01, which holds out 0 of 12 images"),
        (["dataset.test_fraction=0.99"], ConfigError, r"found 0\.99, which holds out 12 of 12 images"),
        (
            ["dataset.test_fraction=1"],
            ConfigError,
            r"^dataset\.test_fraction: found 1, expected a number from",
        ),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_what_does_not_fit_is_told_by_its_key(root, reader, overrides, error, message):
    with pytest.raises(error, match=message):
        read(reader, root, *overrides)


def test_the_part_belongs_to_the_identity_of_runs_that_have_one_and_to_no_other_s(root):
    config = composed("image_folder", root)
    before = digest(config)
    assert digest(composed("image_folder", root, FRACTION)) != before
    del config["dataset"]["test_fraction"]  # as a run of an earlier version has it
    config["dataset"]["reads"].remove("test_fraction")
    assert digest(config) == before
