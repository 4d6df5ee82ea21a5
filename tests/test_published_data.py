"""Data sets of torchvision, by the name of their class, from small archives in their layout."""

import pytest
import torch
from torchvision.datasets import Country211, EuroSAT

from sakd.configuration import Config, build
from sakd.data import Dataset
from sakd.errors import ConfigError, DataError
from tests.conftest import compose_config
from tests.test_data_files import cut_short, write_image


def composed(root, source: str, *overrides: str) -> Config:
    keys = (f"dataset.source={source}", f"dataset.root={root}", f"dataset.name={source}", "dataset.classes=3")
    return compose_config("dataset=svhn", *keys, *overrides)


def read(root, source: str, *overrides: str) -> Dataset:
    return build.dataset(composed(root, source, *overrides))


@pytest.fixture
def root(tmp_path):
    """Country211 with splits, EuroSAT without; images of 32x32 but for one."""
    for seed, name in enumerate(("AD", "AE", "AF")):
        for part, count in (("train", 4), ("test", 2)):
            for number in range(count):
                size = (40, 20) if (seed, number) == (0, 1) else (32, 32)
                write_image(tmp_path / f"country211/{part}/{name}/{number}.png", 10 * seed + number, size)
        for number in range(5):
            write_image(tmp_path / f"eurosat/2750/{name}/{number}.jpg", 50 + 10 * seed + number, (32, 32))
    return tmp_path


def test_splits_are_those_that_the_keys_name_and_images_are_as_torchvision_gives_them(root):
    dataset = read(root, "Country211")
    for part, split in ((dataset.train, "train"), (dataset.test, "test")):
        expected = Country211(str(root), split)
        assert part.labels.tolist() == [label for _, label in expected]
        for image, (original, _) in zip(part.images, expected, strict=True):
            resized = original.convert("RGB").resize((32, 32), 2)
            assert image.permute(1, 2, 0).flatten().tolist() == list(resized.tobytes())


def test_without_a_test_split_a_fixed_stratified_part_is_held_out(root):
    first, again = (
        read(root, "EuroSAT", "~dataset.train.split", "dataset.test=null", "dataset.test_fraction=0.2")
        for _ in range(2)
    )
    assert first.train.labels.bincount().tolist() == [4] * 3
    assert first.test.labels.bincount().tolist() == [1] * 3
    assert torch.equal(first.test.images, again.test.images)
    assert len(first.train) + len(first.test) == len(EuroSAT(str(root)))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["dataset.source=SVNH"], ConfigError, r"^dataset\.source: found 'SVNH', .* Did you mean 'SVHN'"),
        (
            ["+dataset.train.splitt=train"],
            ConfigError,
            r"^dataset\.train\.splitt: no such key; expected split, .* Did you mean 'split'",
        ),
        (["dataset.train.split=tain"], ConfigError, r"^dataset\.train: Country211 does not take .*tain"),
        (["dataset.test=null"], ConfigError, r"^dataset\.test_fraction: found none, and no test split"),
        (["dataset.test_fraction=0.2"], ConfigError, r"^dataset\.test_fraction: found 0\.2 beside the test"),
        (["dataset.classes=2"], DataError, r"found train labels from 0 to 2, expected 0 to 1"),
        (["dataset.root=/nowhere"], DataError, r"^dataset\.root=/nowhere: cannot open Country211 there"),
    ],
)
def test_what_does_not_fit_is_told_by_its_key(root, overrides, error, message):
    with pytest.raises(error, match=message):
        read(root, "Country211", *overrides)


def test_an_image_that_cannot_be_read_is_told(root):
    cut_short(root / "country211/train/AE/2.png")
    with pytest.raises(DataError, match=r"^Country211: image 6 cannot be read \(.*(?i:truncated)"):
        read(root, "Country211")
