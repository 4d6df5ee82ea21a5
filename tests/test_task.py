"""What is learned from labels: weighed, smoothed, by class, of mixed images."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from sakd import distillers
from sakd.configuration import Config, build, digest, prerequisites
from sakd.configuration.check import check
from sakd.configuration.prerequisites import FIXED
from sakd.data import Batch, Mix, Mixing, mixed
from sakd.data.mixing import area, drawn, mix_images
from sakd.errors import ConfigError
from sakd.runs import Run
from sakd.streams import stream_seed
from sakd.sweeps.cohorts import cohorts
from sakd.sweeps.plan import PlannedRun
from sakd.training import Cohort, Task, Trainer
from tests.conftest import ROOT, fit, take_step
from tests.test_cohort import CPU, assert_as_alone, small, together
from tests.test_resume import assert_same

CLASSES = 5
EVERYTHING = {"label_smoothing": 0.1, "class_weights": "balanced", "mixup": 0.4, "cutmix": 1.0}


# ---- the formula


def plainly(logits: Tensor, labels: list[int], weights: list[float], smoothing: float) -> float:
    """Cross-entropy of smoothed labels with class weights, sample by sample in float64."""
    total = norm = 0.0
    for row, label in zip(logits.double(), labels, strict=True):
        logs = [float(value - row.exp().sum().log()) for value in row]
        own = -weights[label] * logs[label]
        everyone = -sum(w * value for w, value in zip(weights, logs, strict=True)) / len(logs)
        total += (1 - smoothing) * own + smoothing * everyone
        norm += weights[label]
    return total / norm


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 1.0, 4.0]])
@pytest.mark.parametrize(("weight", "smoothing"), [(1.0, 0.0), (0.1, 0.2), (0.0, 0.1)])
def test_the_loss_is_the_formula(weight, smoothing, weights, share):
    logits, labels = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0)), [0, 1, 2, 3, 4, 0]
    others = labels[-1:] + labels[:-1]
    task = Task(weight, smoothing, weights)
    mixing = None if share is None else Mixing(torch.tensor(others), torch.tensor(share))
    own = torch.tensor(labels)
    found = task.loss(logits, own, mixing, task.weights_of_classes(own, CLASSES))
    by_class = weights or [1.0] * CLASSES
    expected = plainly(logits, labels, by_class, smoothing)
    if share is not None:
        expected = share * expected + (1 - share) * plainly(logits, others, by_class, smoothing)
    assert float(found) == pytest.approx(weight * expected, rel=1e-5)


def test_balanced_classes_count_alike_and_a_class_without_images_not_at_all():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = Task(class_weights="balanced").weights_of_classes(labels, CLASSES)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 0, 10 / 3, 0]))
    torch.testing.assert_close(weights[labels].mean(), torch.tensor(1.0))


def test_targets_are_what_each_class_counts_and_the_dominant_label_counts_more():
    own, others = torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])
    mixing = Mixing(others, torch.tensor(0.25))
    expected = 0.25 * F.one_hot(own, 3) + 0.75 * F.one_hot(others, 3)
    torch.testing.assert_close(mixing.targets(own, 3), expected)
    assert mixing.dominant(own).tolist() == others.tolist()
    assert mixing._replace(share=torch.tensor(0.5)).dominant(own).tolist() == own.tolist()


# ---- mixed images


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_as_torchvision_does(kind):
    boxes, shares = drawn(Mix(**{kind: 1.0}), 20, 12, seed=3)
    reference = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[kind](num_classes=CLASSES)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    for box, share in zip(boxes, shares, strict=True):
        images = torch.randn(6, 3, 12, 12)
        params = {"labels": labels, "batch_size": 6, "lam": share, "lam_adjusted": share}
        if box is not None:
            params["box"] = (box[1].start, box[0].start, box[1].stop, box[0].stop)
        expected = reference.transform(images, params)
        mixing = Mixing(labels.roll(1), torch.tensor(share))
        torch.testing.assert_close(mixing.targets(labels, CLASSES), reference.transform(labels, params))
        torch.testing.assert_close(mix_images(images.clone(), box, share), expected)


def test_what_is_drawn_has_its_distribution():
    """Beta(a, a) has variance 1 / (4 (2 a + 1)); each batch is of one kind, by a fair draw."""
    _, shares = drawn(Mix(mixup=0.2), 4000, 32, seed=0)
    assert torch.tensor(shares).var() == pytest.approx(1 / (4 * 1.4), rel=0.05)
    boxes, shares = drawn(Mix(mixup=0.2, cutmix=1.0), 4000, 32, seed=0)
    cuts = [(box, share) for box, share in zip(boxes, shares, strict=True) if box is not None]
    assert len(cuts) / 4000 == pytest.approx(0.5, abs=0.03)
    assert all(share == 1 - area(box) / 32**2 for box, share in cuts)
    assert 0.65 < sum(share for _, share in cuts) / len(cuts) < 0.75  # 0.5, were none cut off at the edge


def test_draws_are_those_of_the_seed_alone_and_leave_the_global_generator():
    before = torch.get_rng_state()
    first, again, other = (drawn(Mix(0.3, 0.3), 9, 8, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def batches() -> list[Batch]:
    images = torch.arange(12.0).view(6, 1, 1, 2).repeat(1, 1, 2, 1)
    return [
        Batch(images[:4], torch.arange(4), torch.arange(4)),
        Batch(images[4:], torch.arange(2), torch.arange(2)),
    ]


def test_a_batch_that_is_smaller_is_mixed_within_itself_and_none_without_mixing():
    assert [mixing for _, mixing in mixed(batches(), Mix(), 2, 2, seed=0)] == [None, None]
    for (batch, mixing), plain in zip(mixed(batches(), Mix(mixup=1.0), 2, 2, seed=0), batches(), strict=True):
        share = mixing.share
        torch.testing.assert_close(batch.images, share * plain.images + (1 - share) * plain.images.roll(1, 0))
        assert mixing.labels.tolist() == plain.labels.roll(1).tolist()
        assert batch.indices.tolist() == plain.indices.tolist()


# ---- in a training

MODES = {"fixed": FIXED, "random": {"name": "random", "_target_": "sakd.spots.Random", "p": 0.5}}


@cache
def _whole() -> Config:
    return small("teacher=resnet14", "distiller=at", "spot_mode=adaptive", "batch_size=24")


def config_of(loss: str = "kd", mode: str = "fixed", **task: object) -> Config:
    """A run from KD or AT, composed once: other values take their place here."""
    whole = deepcopy(_whole())
    losses = {loss: whole["distiller"]["losses"].get(loss, {"_target_": f"sakd.distillers.{loss.upper()}"})}
    whole |= {"spot_mode": MODES.get(mode, whole["spot_mode"]), "task": {**whole["task"], **task}}
    return whole | {"distiller": {"name": loss, "losses": losses}}


def trainer_of(*choices: str, **task: object) -> tuple[Trainer, Batch]:
    config = config_of(*choices, **task)
    made, dataset = build.trainer(config, build.parts(config), CPU), build.dataset(config)
    made.prepare(dataset)
    made.begin_epoch()
    images = (dataset.train.images[:16].float() / 255 - 0.3) / 0.4
    return made, Batch(images, dataset.train.labels[:16], torch.arange(16))


def test_the_measured_loss_is_the_loss_as_it_counts():
    measured = {}
    for weight in (1.0, 0.1):
        made, batch = trainer_of(weight=weight)
        measured[weight] = take_step(made, *batch)
    torch.testing.assert_close(measured[0.1]["loss/task"], 0.1 * measured[1.0]["loss/task"])
    assert torch.equal(measured[0.1]["loss/kd"], measured[1.0]["loss/kd"])


def test_with_weight_zero_a_student_learns_from_its_teacher_alone():
    made, batch = trainer_of(weight=0.0)
    alike = deepcopy(made.student)
    keep = {spot: torch.ones(16, dtype=torch.bool) for spot in made.spots}
    features = alike.features(batch.images), made.teacher.features(batch.images)
    made.distillers["kd"](*features, keep, batch.indices).backward()
    take_step(made, *batch)
    for own, expected in zip(made.student.parameters(), alike.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


def test_the_policy_learns_from_plain_cross_entropy_whatever_the_task():
    """Its first step starts from the same student: the same policy, bit for bit, comes of it.

    With a gamma, it matters which of the losses is higher.
    """
    policies = []
    for task in ({}, {"weight": 0.0}, {"weight": 9.0}, {"label_smoothing": 0.3, "class_weights": "balanced"}):
        made, batch = trainer_of("kd", "adaptive", **task)
        made.spot_mode.gamma = 2.0
        take_step(made, *batch)
        policies.append(made.spot_mode.state_dict())
    for other in policies[1:]:
        assert_same(other, policies[0])


def test_of_mixed_images_the_policy_compares_losses_with_both_labels(monkeypatch):
    made, batch = trainer_of("kd", "adaptive", label_smoothing=0.1)
    loss, given = made.spot_mode.loss, []
    monkeypatch.setattr(made.spot_mode, "loss", lambda *all_of: given.extend(all_of[-2:]) or loss(*all_of))
    mixing = Mixing(batch.labels.roll(1), torch.tensor(0.7))
    logits = made.student(batch.images).detach()
    made.train_step(*batch, made.teacher.features(batch.images), mixing)
    targets, task_loss = given
    torch.testing.assert_close(targets, mixing.targets(batch.labels, 10))
    own, others = (F.cross_entropy(logits, labels) for labels in (batch.labels, mixing.labels))
    torch.testing.assert_close(task_loss, 0.7 * own + 0.3 * others)


def images_seen(**task: object) -> tuple[list[Tensor], list[Tensor], Cohort]:
    """What teacher and a member of a cohort see in an epoch."""
    cohort, _ = together({"one": config_of(**task), "other": config_of(**task, weight=2.0)})
    teachers, members = [], []
    features, member = cohort.teacher_features, cohort.members["other"]
    step = member.train_step
    cohort.teacher_features = lambda images: teachers.append(images.clone()) or features(images)
    member.train_step = lambda images, *rest: members.append(images) or step(images, *rest)
    dict(cohort.fit(build.dataset(config_of()), 1, 16))
    return teachers, members, cohort


def test_teacher_and_members_see_the_same_mixed_images_in_the_order_of_unmixed_ones():
    teachers, members, cohort = images_seen(mixup=1.0)
    plain, *_ = images_seen()
    _, shares = drawn(Mix(mixup=1.0), 3, 8, stream_seed(cohort.seed, "mixing", 1))
    for share, seen, of_member, before in zip(shares, teachers, members, plain, strict=True):
        assert torch.equal(seen, of_member)
        torch.testing.assert_close(seen, before.roll(1, 0).lerp(before, share))


def test_a_member_of_a_cohort_is_as_alone_and_goes_on_bit_for_bit():
    config = config_of("at", "adaptive", **EVERYTHING)
    assert_as_alone({"adaptive": config, "random": config_of("kd", "random", **EVERYTHING, weight=0.5)})
    whole, first, second = (build.trainer(config, build.parts(config), CPU) for _ in range(3))
    dataset = build.dataset(config)
    fit(whole, dataset, 2, 24)
    fit(first, dataset, 1, 24)
    second.prepare(dataset)
    second.load_state_dict(deepcopy(first.state_dict()))
    fit(second, dataset, 2, 24)
    assert_same(second.state_dict(), whole.state_dict())


# ---- what it is part of, and what is refused


def test_a_task_that_is_not_used_is_no_part_of_a_run_and_never_of_its_teacher():
    plain, without, weighed = config_of(), config_of(), config_of(weight=0.5, mixup=0.2)
    del without["task"]
    assert digest(plain) == digest(without) != digest(weighed)
    assert digest(prerequisites(plain).teacher) == digest(prerequisites(weighed).teacher)


def test_runs_go_together_whose_images_are_mixed_alike():
    tasks = ({}, {"weight": 0.1}, {"mixup": 0.2}, {"mixup": 0.2, "weight": 2.0})
    planned = [PlannedRun(Run(config_of(**task)), (), ()) for task in tasks]
    assert [len(group) for group in cohorts(planned)] == [2, 2]


def test_trainers_whose_images_are_mixed_differently_are_refused():
    with pytest.raises(ConfigError, match=r"mix of b: found Mix\(mixup=0\.0, cutmix=1\.0\), expected"):
        together({"a": config_of(), "b": config_of(cutmix=1.0)})


@pytest.mark.parametrize(("loss", "key"), [("dkd", "mixup"), ("crd", "cutmix")])
def test_mixing_is_refused_where_a_distiller_goes_by_labels(loss, key, monkeypatch):
    monkeypatch.setattr(build, "_check_once", lambda *_: None)  # the loss has no keys here
    message = rf"task\.{key}: found 0\.2 with distiller\.losses\.{loss}.*; expected 0"
    with pytest.raises(ConfigError, match=message):
        build.check_parts(config_of(loss, **{key: 0.2}))
    with pytest.raises(ConfigError, match=message):
        Trainer(
            None, None, {loss: getattr(distillers, loss.upper())}, optimizer=None, task=Task(**{key: 0.2})
        )


def test_a_distiller_that_reads_labels_says_so():
    files = [
        path for path in (ROOT / "sakd/distillers").glob("*.py") if path.stem not in ("__init__", "base")
    ]
    for path in files:
        text = path.read_text()
        assert ("self.labels" in text) == ("uses_labels = True" in text), path


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"weight": -1}, r"task\.weight: found -1"),
        ({"label_smoothing": 1.5}, r"task\.label_smoothing: found 1\.5"),
        ({"label_smoothing": 1}, r"task\.label_smoothing: found 1, expected a number from 0 to below 1"),
        ({"class_weights": [1]}, r"task\.class_weights: found \[1\], expected .*, at least 2 of them"),
        ({"class_weights": [1, 2]}, r"task\.class_weights: found 2, expected .*classes=10"),
        ({"class_weights": "even"}, r"task\.class_weights: found 'even', expected .*balanced"),
        ({"class_weights": [1] * 9 + [0]}, r"task\.class_weights: found \[1.*0\], expected .*above 0"),
        ({"mixup": -0.1}, r"task\.mixup: found -0\.1"),
        ({"cutmix": "much"}, r"task\.cutmix: found 'much'"),
        ({"blur": 1}, r"task\.blur: no such key"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_their_key(task, message):
    with pytest.raises(ConfigError, match=message):
        check(config_of(**task))


def test_a_student_alone_must_learn_from_labels():
    config = config_of(weight=0)
    check(config)
    config["distiller"] = {"name": "none", "losses": {}}
    with pytest.raises(ConfigError, match=r"task\.weight: found 0 with distiller=none"):
        check(config)


def test_a_student_must_learn_from_something():
    config = config_of(weight=0)
    loss = config["distiller"]["losses"]["kd"]
    config["distiller"]["losses"] = {"kd": {**loss, "weight": 0.0}, "own": {**loss, "weight": 0.0}}
    message = r"task\.weight: found 0, and distiller\.losses\.kd\.weight, .*\.own\.weight too"
    with pytest.raises(ConfigError, match=message):
        check(config)
    config["distiller"]["losses"]["own"]["weight"] = 0.5
    check(config)
