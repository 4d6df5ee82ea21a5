"""RandAugment and random erasing of images in memory: as torchvision does it, the same wherever they lie."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from sakd.configuration import build, digest
from sakd.configuration.check import check
from sakd.data import Augmentation, Dataset, ImageSet, train_batches
from sakd.data.erasing import erase, rectangles
from sakd.data.randaugment import OPERATIONS, RandAugment
from sakd.errors import ConfigError
from sakd.streams import stream
from tests.test_task import config_of


def images(channels: int = 3, size: int = 12, count: int = 6) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, size, size), generator=draws, dtype=torch.uint8)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_is_torchvision_s(channels, magnitude, monkeypatch):
    given = images(channels)
    reference = v2.RandAugment(num_ops=1, magnitude=magnitude)
    spaces = list(v2.RandAugment._AUGMENTATION_SPACE.items())
    assert len(spaces) == len(OPERATIONS)
    for place, (name, space) in enumerate(spaces):
        reference._AUGMENTATION_SPACE = {name: space}
        for minus in (False, True):
            found = RandAugment(1, magnitude)(given, torch.full((len(given), 1), 2 * place + minus))
            with monkeypatch.context() as patched:
                patched.setattr(torch, "rand", lambda *_, minus=minus: torch.tensor(0.2 if minus else 0.8))
                expected = torch.stack([reference(image) for image in given])
            assert torch.equal(found, expected), (name, minus)


def test_each_image_goes_through_its_own_operations_in_their_order():
    given, augment = images(count=40), RandAugment(3, 9)
    drawn = augment.draw(40, stream(0, "data"))
    for image, own, found in zip(given, drawn, augment(given, drawn), strict=True):
        for place in own:
            image = RandAugment(1, 9)(image[None], place.view(1, 1))[0]
        assert torch.equal(found, image)


def test_what_is_erased_has_torchvision_s_sizes():
    size, count = 32, 4000
    drawn = rectangles(count, 0.25, size, stream(0, "data"))
    top, bottom, left, right = drawn.unbind(1)
    area = (bottom - top) * (right - left)
    erased = area > 0
    assert erased.float().mean() == pytest.approx(0.25, abs=0.03)
    assert drawn.min() >= 0
    assert drawn.max() <= size
    whole = torch.zeros(1, size, size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes = [v2.RandomErasing().make_params([whole]) for _ in range(1000)]
    expected = torch.tensor([float(box["h"] * box["w"]) for box in boxes])
    own = area[erased].float()
    assert own.mean() == pytest.approx(float(expected.mean()), rel=0.06)
    assert own.std() == pytest.approx(float(expected.std()), rel=0.1)
    ratio = ((bottom - top).float() / (right - left))[erased].log()
    assert ratio.mean() == pytest.approx(0, abs=0.1)


def test_erasing_puts_the_mean_colour_in_each_rectangle_and_nowhere_else():
    given = torch.rand(2, 3, 5, 5) + 1
    found = erase(given, torch.tensor([[1, 3, 0, 2], [0, 0, 0, 0]]))
    expected = given.clone()
    expected[0, :, 1:3, 0:2] = 0
    assert torch.equal(found, expected)


def dataset(**augmentation: object) -> Dataset:
    part = ImageSet(images(count=17), torch.arange(17) % 2)
    return Dataset(
        part, part, None, 2, 12, (0.5,) * 3, (0.25,) * 3, Augmentation(crop_padding=2, **augmentation)
    )


class Nothing(RandAugment):
    """Draws as any other, but the operation that changes nothing."""

    def draw(self, count: int, stream: torch.Generator) -> Tensor:
        return torch.zeros_like(super().draw(count, stream))


def epoch(made: Dataset) -> list:
    return list(train_batches(made, 4, stream(0, "data", 1)))


def test_batches_are_the_same_again_and_order_and_crops_are_those_without():
    """But for a single image left over, which is dropped, all are there."""
    plain, augmented = epoch(dataset()), epoch(dataset(rand_augment=RandAugment(2, 9)))
    again = epoch(dataset(rand_augment=RandAugment(2, 9)))
    crops = torch.cat([batch.images for batch in plain])
    found = torch.cat([batch.images for batch in augmented])
    assert torch.equal(found, torch.cat([batch.images for batch in again]))
    for one, other in zip(plain, augmented, strict=True):
        assert torch.equal(one.indices, other.indices)
    assert not torch.equal(found, crops)
    unchanged = torch.cat([batch.images for batch in epoch(dataset(rand_augment=Nothing(2, 9)))])
    assert torch.equal(unchanged, crops)
    erased = torch.cat([batch.images for batch in epoch(dataset(erasing=1.0))])
    assert (erased == 0).flatten(1).any(1).all()


def test_off_they_are_no_part_of_a_run():
    """A data set's node of one's own may do without the keys."""
    plain, without = config_of(), config_of()
    del without["dataset"]["rand_augment"], without["dataset"]["erasing"]
    check(without)
    build.promises(without)
    assert digest(plain) == digest(without)
    augmented = config_of()
    augmented["dataset"] |= {"rand_augment": {"operations": 2, "magnitude": 9}, "erasing": 0.1}
    assert digest(augmented) != digest(plain)
    made = build.dataset(augmented).augmentation
    assert (made.rand_augment, made.erasing) == (RandAugment(2, 9), 0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rand_augment": {"operations": 0, "magnitude": 9}}, r"dataset\.rand_augment\.operations: found 0"),
        ({"rand_augment": {"operations": 2, "magnitude": 31}}, r"dataset\.rand_augment\.magnitude: found 31"),
        ({"rand_augment": {"operations": 2}}, r"dataset\.rand_augment\.magnitude: found nothing"),
        ({"rand_augment": 2}, r"dataset\.rand_augment: found 2, expected"),
        ({"erasing": 1.5}, r"dataset\.erasing: found 1\.5"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_their_key(values, message):
    config = config_of()
    config["dataset"] |= values
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_images_of_other_channels_are_refused():
    config = config_of()
    config["dataset"] |= {"rand_augment": {"operations": 2, "magnitude": 9}, "channels": 2}
    config["dataset"] |= {"mean": [0.5, 0.5], "std": [0.5, 0.5]}
    with pytest.raises(ConfigError, match=r"dataset\.rand_augment: found .* with dataset\.channels=2"):
        build.promises(config)
