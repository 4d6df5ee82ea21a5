"""Further views of a batch: the same samples, changed by draws of their own, seen in passes of their own."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from sakd.configuration import Config, build
from sakd.data import RandAugment, View, train_batches, view_batches
from sakd.errors import ConfigError
from sakd.runs.job import check_before_work
from sakd.streams import stream
from sakd.training import Trainer
from tests.conftest import fit
from tests.test_cohort import assert_as_alone, small, together
from tests.test_data_files import folder, folder_config  # noqa: F401, a fixture
from tests.test_randaugment import dataset
from tests.test_resume import assert_same

CPU = torch.device("cpu")
PLAIN, STRONG = View(None, 0.0), View(RandAugment(2, 10), 0.5)
NODE = {"_target_": "sakd.data.View", "rand_augment": None, "erasing": 0.0}


def images(batches) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def in_view(view: View, epoch: int = 1, place: int = 0, seed: int = 0) -> list:
    return list(view_batches(dataset(), 4, seed, epoch, (place, view)))


@cache
def composed(*overrides: str) -> Config:
    return small("teacher=resnet14", "batch_size=24", *overrides)


def mlkd(*overrides: str, **own: object) -> Config:
    """MLKD with values of its own, in a small run."""
    config = deepcopy(composed("distiller=mlkd", *overrides))
    config["distiller"]["losses"]["mlkd"] |= own
    return config


def trainer_of(config: Config) -> Trainer:
    return build.trainer(config, build.parts(config), CPU)


def test_a_view_has_the_samples_of_the_batch_and_draws_of_its_own():
    plain = list(train_batches(dataset(), 4, stream(0, "data", 1)))
    for own, batch in zip(in_view(STRONG), plain, strict=True):
        assert torch.equal(own.indices, batch.indices)
        assert torch.equal(own.labels, batch.labels)
        assert own.images.shape == batch.images.shape
    assert torch.equal(images(in_view(STRONG)), images(in_view(STRONG)))
    others = [
        in_view(STRONG, epoch=2),
        in_view(STRONG, place=1),
        in_view(STRONG, seed=1),
        in_view(PLAIN),
        plain,
    ]
    for other in others:
        assert not torch.equal(images(other), images(in_view(STRONG)))
    assert not torch.equal(images(in_view(PLAIN)), images(plain))  # it is cropped anew


def test_a_view_has_its_own_in_the_place_of_the_data_set_s_augmentation():
    strong = dataset(rand_augment=RandAugment(2, 30), erasing=1.0)
    found = view_batches(strong, 4, 0, 1, (0, PLAIN))
    assert torch.equal(images(found), images(in_view(PLAIN)))


def test_images_in_files_go_through_their_transforms_and_then_the_view_s_operations(folder):  # noqa: F811
    made = build.dataset(folder_config(folder))
    made = replace(made, mean=(0.5,) * 3, std=(0.25,) * 3)
    plain, strong = (
        list(view_batches(made, 7, 0, 1, (0, view))) for view in (PLAIN, View(RandAugment(2, 20), 0.0))
    )
    assert torch.equal(torch.cat([b.indices for b in plain]), torch.cat([b.indices for b in strong]))
    same = [torch.equal(a, b) for a, b in zip(images(plain), images(strong), strict=True)]
    assert 0 <= sum(same) < len(same) / 2  # some draw what changes nothing
    assert not torch.equal(images(plain), images(train_batches(made, 7, stream(0, "data", 1))))


def test_members_get_the_batches_that_they_get_without_views():
    plain, viewed = composed("distiller=kd"), mlkd()
    cohort, _ = together({"plain": plain, "viewed": viewed})
    of_data = build.dataset(plain).to(CPU)
    members = list(cohort.members.values())
    for member in members:
        member.begin_epoch()
    both, alone = (list(cohort.batches(some, of_data, 24)) for some in (members, members[:1]))
    assert [len(views) for *_, views in both] == [1, 1]
    assert [len(views) for *_, views in alone] == [0, 0]
    expected = images(train_batches(of_data, 24, stream(0, "data", 1)))
    for drawn in (both, alone):
        assert torch.equal(images(batch for batch, *_ in drawn), expected)


def test_members_see_a_view_s_images_and_what_the_teacher_makes_of_them():
    cohort, trainers = together({"plain": composed("distiller=kd"), "viewed": mlkd()})
    members, given = list(cohort.members.values()), {}
    for member in members:
        step = member.train_step
        member.train_step = lambda *own, name=member.name, step=step: (
            given.setdefault(name, own) and step(*own)
        )
        member.begin_epoch()
        member.trainer.prepare(build.dataset(mlkd()), 24)
    batch, mixing, views = next(cohort.batches(members, build.dataset(mlkd()), 24))
    cohort.take_step(members, batch, mixing, views)
    ((asked, view),) = views.items()
    for name in trainers:
        found, features = given[name][-1][asked]
        assert torch.equal(found, view.images)
        assert torch.equal(features["logits"], cohort.teacher.features(view.images)["logits"])


def test_cross_entropy_is_of_all_views_and_batch_norm_sees_each_apart():
    config = mlkd("spot_mode=adaptive")
    config["task"]["weight"] = 0.1
    made, alike = trainer_of(config), trainer_of(config).student
    of_data = build.dataset(config)
    made.prepare(of_data)
    made.begin_epoch()
    (asked,) = made.views
    (batch, *_), (view, *_) = (
        list(train_batches(of_data, 24, stream(0, "data", 1))),
        list(view_batches(of_data, 24, 0, 1, asked)),
    )
    logits = [alike.train()(own.images) for own in (batch, view)]
    expected = [F.cross_entropy(own, batch.labels) for own in logits]
    routed = []
    policy_loss = made.spot_mode.loss
    made.spot_mode.loss = lambda *given: routed.append(given) or policy_loss(*given)
    features = [made.teacher.features(own.images) for own in (batch, view)]
    step = made.train_step(*batch, features[0], views={asked: (view.images, features[1])})
    torch.testing.assert_close(step.losses["task"], 0.1 * sum(expected).detach())
    for name, buffer in alike.named_buffers():
        torch.testing.assert_close(made.student.get_buffer(name), buffer)
    ((_, _, of_images, of_teacher, _, _, task_loss),) = routed  # the policy sees the images themselves
    assert of_images is batch.images
    assert of_teacher is features[0]
    torch.testing.assert_close(task_loss, expected[0].detach())


def test_members_with_other_views_and_without_train_as_alone():
    strong = mlkd()["distiller"]["losses"]["mlkd"]["views"]
    assert_as_alone(
        {
            "plain": composed("distiller=kd"),
            "two": mlkd(views=[*strong, NODE]),
            "other": mlkd(views=[NODE]),
        },
        epochs=1,
    )


def test_a_view_that_several_ask_for_is_drawn_once():
    strong = mlkd()["distiller"]["losses"]["mlkd"]["views"]
    cohort, trainers = together({"one": mlkd(), "two": mlkd(views=[*strong, NODE]), "again": mlkd()})
    members = list(cohort.members.values())
    (*_, views) = next(cohort.batches(members, build.dataset(mlkd()), 24))
    assert tuple(views) == trainers["two"].views
    assert len(views) == 2


def test_it_goes_on_from_a_saved_state_bit_for_bit():
    config = mlkd() | {"accumulate": 2, "ema": 0.9}
    of_data = build.dataset(config)
    whole, first, second = (trainer_of(config) for _ in range(3))
    fit(whole, of_data, 2, 20)
    fit(first, of_data, 1, 20)
    second.prepare(of_data, 20)
    second.load_state_dict(first.snapshot()())
    fit(second, of_data, 2, 20)
    assert_same(second.state_dict(), whole.state_dict())


RAND_AUGMENT = {"_target_": "sakd.data.RandAugment", "operations": 2, "magnitude": 10}


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], r"views: found \[\], expected a list .* that is not empty"),
        (1, r"views: found 1, expected a list"),
        ([1], r"views: found \[1\], expected a list"),
        ([{"rand_augment": None}], r"views: found .*, expected a list of keys and values with a _target_"),
        ([NODE | {"erasing": 2}], r"views\.0\.erasing: found 2, expected a number from 0 to 1"),
        ([NODE | {"flip": True}], r"views\.0\.flip: no such key; expected rand_augment, erasing"),
        (
            [NODE, RAND_AUGMENT],
            r"views\.1\._target_: found sakd\.data\.RandAugment, which makes a RandAugment",
        ),
        (
            [NODE | {"rand_augment": RAND_AUGMENT | {"operations": 0}}],
            r"views\.0\.rand_augment\.operations: found 0, expected a whole number from 1 to 14",
        ),
        (
            [NODE | {"rand_augment": RAND_AUGMENT | {"magnitude": 99}}],
            r"views\.0\.rand_augment\.magnitude: found 99, expected a whole number from 0 to 30",
        ),
        (
            [NODE | {"rand_augment": {"_target_": "builtins.dict"}}],
            r"views\.0\.rand_augment: found \{\}, expected a RandAugment",
        ),
        (
            [NODE | {"rand_augment": {"operations": 2, "magnitude": 10}}],
            r"views\.0\.rand_augment: found .*, expected keys and values with a _target_ or null",
        ),
    ],
)
def test_a_view_that_cannot_be_is_refused_by_its_key(views, message):
    with pytest.raises(ConfigError, match=rf"^distiller\.losses\.mlkd\.{message}"):
        check_before_work(mlkd(views=views))


def test_operations_are_refused_for_images_that_have_other_channels():
    config = mlkd()
    config["dataset"] |= {"channels": 2, "mean": [0.5, 0.5], "std": [0.5, 0.5]}
    for network in ("student", "teacher"):
        config[network]["in_channels"] = 2
    with pytest.raises(
        ConfigError,
        match=r"^distiller\.losses\.mlkd\.views\.0\.rand_augment: found .* with dataset\.channels=2",
    ):
        build.check_parts(config)


def test_mixed_images_are_refused():
    for key in ("mixup", "cutmix"):
        config = mlkd()
        config["task"][key] = 1.0
        with pytest.raises(ConfigError, match=rf"^task\.{key}: found 1.* which compares views of one image"):
            check_before_work(config)
