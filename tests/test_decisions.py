"""What spot modes decided: numbers against plain formulas, text and pictures of records made for it."""

import csv
import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from scipy import stats

from sakd.cli import main as cli
from sakd.decisions import Recorded, beside, pictures, samples, text
from sakd.decisions.looked import course, milestones
from sakd.decisions.measures import (
    Z,
    beside_random,
    class_shares,
    difference,
    equal_bins,
    kappa,
    majority,
    mean_over_pairs,
)
from sakd.runs.find import read_recorded
from tests.conftest import compose_config

SPOTS = ("stage1", "stage2", "logits")
SAMPLES, CLASSES, EPOCHS = 240, 6, 8
HARD = np.random.default_rng(0).normal(size=SAMPLES)  # the same samples are hard in every run
LABELS = np.arange(SAMPLES) % CLASSES


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def chosen(seed: int, spots: int = len(SPOTS), epochs: int = EPOCHS, never: int | None = None) -> np.ndarray:
    """Decisions [epochs, spots, N] that depend on the sample; class ``never`` is never kept."""
    kept = random(seed).random((epochs, spots, SAMPLES)) < 1 / (1 + np.exp(-2 * HARD))
    if never is not None:
        kept[:, :, never == LABELS] = False
    return kept


def by_chance(seed: int, epochs: int = EPOCHS) -> np.ndarray:
    rates = random(seed).uniform(0.3, 0.8, (epochs, len(SPOTS), 1))
    return random(seed + 100).random((epochs, len(SPOTS), SAMPLES)) < rates


def seen(split: str, spots: int, learns: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """What a finished run knows of a split: the teacher is right on easy samples, the student at random."""
    draws = random(7 + seed)
    own = {
        "indices": np.arange(SAMPLES),
        "labels": LABELS,
        "student_confidence": draws.random(SAMPLES, np.float32),
        "student_loss": draws.random(SAMPLES, np.float32),
        "student_right": draws.random(SAMPLES) < 0.7,
        "teacher_confidence": (1 / (1 + np.exp(-HARD))).astype(np.float32),
        "teacher_loss": draws.random(SAMPLES, np.float32),
        "teacher_right": HARD > -0.5,
    }
    if learns:
        own["probability"] = draws.random((SAMPLES, spots), np.float32)
        own["route"] = own["probability"] > 0.5
        own["kept"] = ~own["route"]  # as anti would have it
    return {f"{split}_{name}": values for name, values in own.items()}


def write(folder, kept, *, finished=True, learns=True, labels=LABELS, spots=SPOTS, data="d" * 64, **names):
    """A run's folder with a record of ``kept`` [epochs, spots, N], in the format that is documented."""
    folder.mkdir(parents=True)
    epochs = len(kept)
    content = {
        "kept": np.packbits(kept, axis=-1),
        "epochs": np.arange(1, epochs + 1, dtype=np.int32),
        "spots": np.array(spots[: kept.shape[1]]),
        "train_indices": np.arange(len(labels)),
        "train_labels": labels,
    }
    if finished:
        for split in ("train", "test"):
            content |= seen(split, kept.shape[1], learns, names.get("seed", 0))
    np.savez(folder / "spots.npz", **content)
    called = {"distiller": "at", "spot_mode": "adaptive"} | names
    config = {
        "seed": called.pop("seed", 0),
        "epochs": epochs if finished else 240,
        "dataset": {"name": "digits", "_target_": "sakd.data.digits"},
        "teacher": {"name": "resnet20"},
        "student": {"name": "resnet8"},
        "distiller": {"name": called["distiller"], "losses": {"at": {}}},
        "spot_mode": {"name": called["spot_mode"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if finished:
        student = {"name": "resnet8", "accuracy": 90.0, "best_accuracy": 91.0, "best_epoch": 1}
        teacher = {"name": "resnet20", "accuracy": 95.0, "sha256": "a" * 64, "source": "elsewhere"}
        result = {"run": folder.name, "student": student, "student_sha256": "b" * 64, "data_sha256": data}
        result |= {"teacher": teacher, "kept": {}, "seconds": 1.0, "epochs": epochs, "code": {"commit": None}}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def recorded(folder, kept, **keys) -> Recorded:
    return read_recorded(write(folder, kept, **keys))


def command(*arguments, expect=0) -> str:
    done = CliRunner().invoke(cli, ["spots", *map(str, arguments)])
    assert done.exit_code == expect, done.output
    return done.output


# ---- numbers


def test_kappa_is_that_of_published_examples():
    """Fleiss, Statistical Methods for Rates and Proportions (1981), chapter 13; Viera and Garrett, Family
    Medicine 37:360 (2005)."""
    diagnoses = kappa(np.array([[75, 1, 4], [5, 4, 1], [0, 0, 10]]))
    assert (diagnoses.agreement, diagnoses.chance) == pytest.approx((0.89, 0.66))
    assert diagnoses.value == pytest.approx(0.676, abs=5e-4)
    assert (diagnoses.high - diagnoses.low) / (2 * Z) == pytest.approx(0.0877, abs=5e-5)
    lectures = kappa(np.array([[15, 5], [10, 70]]))
    assert (lectures.agreement, lectures.chance) == pytest.approx((0.85, 0.65))
    assert lectures.value == pytest.approx(0.57, abs=5e-3)


def test_kappas_interval_is_as_wide_as_kappa_scatters():
    shares = np.array([[0.5, 0.1], [0.05, 0.35]])
    draws = random().multinomial(400, shares.ravel(), size=4000).reshape(-1, 2, 2)
    found = kappa(draws)
    assert np.std(found.value) == pytest.approx(np.mean(found.high - found.low) / (2 * Z), rel=0.05)


@pytest.mark.parametrize("table", [[[10, 5], [0, 0]], [[10, 0], [5, 0]], [[15, 0], [0, 0]]])
def test_kappa_with_a_constant_decision_is_undefined(table):
    assert np.isnan(kappa(np.array(table)).value)


def test_a_difference_has_newcombes_interval():
    """His example (1998), table II, method 10: 56 of 70 and 48 of 80."""
    among = np.arange(150) < 70
    kept = np.r_[np.arange(70) < 56, np.arange(80) < 48]
    found = difference(kept, among)
    assert (found.among, found.others) == pytest.approx((0.8, 0.6))
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert np.isnan(difference(kept, np.ones(150, bool)).difference)


def test_beside_random_follows_plain_formulas():
    kept = chosen(1)[:, 0]
    found = beside_random(kept, LABELS)
    times = kept.sum(0)
    binomial = sum(epoch.mean() * (1 - epoch.mean()) for epoch in kept) * SAMPLES / (SAMPLES - 1)
    assert found.spread == pytest.approx(np.var(times, ddof=1) / binomial)
    between = sum(
        (c == LABELS).sum() * (times[c == LABELS].mean() - times.mean()) ** 2 for c in range(CLASSES)
    )
    assert found.by_class == pytest.approx(between / ((times - times.mean()) ** 2).sum())
    assert found.by_class_random == (CLASSES - 1) / (SAMPLES - 1)
    changes = [(kept[e] != kept[e - 1]).mean() for e in range(1, EPOCHS)]
    rates = kept.mean(1)
    independent = [rates[e] * (1 - rates[e - 1]) + rates[e - 1] * (1 - rates[e]) for e in range(1, EPOCHS)]
    assert (found.changes, found.changes_random) == pytest.approx((np.mean(changes), np.mean(independent)))
    assert found.always == sum(all(kept[:, n]) for n in range(SAMPLES))
    assert found.never_random == pytest.approx(SAMPLES * np.prod(1 - rates))
    assert found.spread > found.spread_bounds[1]
    assert found.changes < found.changes_bounds[0]


def test_what_is_drawn_at_the_same_rates_shows_no_excess():
    """Of 200 random records about 95 % lie within each of the bounds."""
    within = np.zeros(3)
    for seed in range(200):
        found = beside_random(by_chance(seed)[:, 0], LABELS)
        within += (
            found.spread_bounds[0] < found.spread < found.spread_bounds[1],
            found.changes_bounds[0] < found.changes < found.changes_bounds[1],
            found.by_class < found.by_class_bound,
        )
    assert ((within >= 180) & (within < 200)).all(), within


def test_where_nothing_varies_nothing_is_said_of_variance():
    found = beside_random(np.ones((5, SAMPLES), bool), LABELS)
    assert np.isnan([found.spread, found.by_class]).all()
    assert (found.changes, found.always, found.never) == (0, SAMPLES, 0)


def test_a_majority_of_the_last_epochs_decides_and_in_a_tie_the_last():
    kept = np.array([[1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]], bool)
    assert majority(kept, 3).tolist() == [False, False, False, True]
    assert majority(kept, 4).tolist() == [False, False, True, True]
    assert majority(kept, 1).tolist() == kept[-1].tolist()
    assert majority(kept, 99).tolist() == majority(kept, 4).tolist()


def test_shares_of_classes_are_means_over_their_samples():
    labels = np.array([7, 2, 7, 7, 2, 9])
    kept = np.array([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 1]], bool)
    assert class_shares(kept, labels) == pytest.approx(np.array([[0, 2 / 3, 1], [0.5, 0, 1]]))


def test_bins_hold_as_many_values_each_and_have_edges_that_differ():
    edges = equal_bins(random().random(1000), 10, 4)
    assert np.bincount(np.digitize(random().random(1000), edges)).tolist() == pytest.approx([100] * 10, abs=1)
    assert len(equal_bins(np.ones(100), 10, 4)) == 0
    assert len(equal_bins(np.r_[np.ones(95), np.linspace(0.1, 0.9, 5)], 10, 4)) <= 2


def test_the_mean_over_pairs_has_the_jackknifes_interval():
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5, np.nan])
    mean, (low, high) = mean_over_pairs(values, pairs)
    without = [np.mean(v) for v in ([0.4, 0.5], [0.2, 0.3], [0.1, 0.3, 0.5], [0.1, 0.2, 0.4])]
    error = np.sqrt(3 / 4 * np.sum((without - np.mean(without)) ** 2))
    assert mean == pytest.approx(0.3)
    assert (high - low) / 2 == pytest.approx(3.1824 * error, rel=1e-4)  # Student's t, 3 degrees of freedom
    assert np.isnan(mean_over_pairs(values[:1], pairs[:1])[1]).all()


def test_a_course_is_drawn_and_milestones_are_taken_once():
    assert course([0, 0.5, 1]) == "▁▅█"
    assert len(course(np.linspace(0, 1, 240))) == 24
    assert (milestones(240), milestones(3), milestones(1)) == ([0, 59, 119, 239], [0, 2], [0])


# ---- text of one run


def test_the_text_tells_what_a_record_was_made_to_have(tmp_path):
    kept = chosen(1, never=3)
    kept[:, 2] = True
    run = recorded(tmp_path / "run", kept)
    told = text.of_one(run, 5)
    shares, classes, agreement, random_ = told.split("\n\n")[1:5]
    assert "spot_mode=adaptive, 8 epochs, 240 training samples of 6 classes" in told
    first, last = (f"{100 * kept[e, 0].mean():.1f} %" for e in (0, -1))
    assert re.search(rf"stage1 +{first} .*{last} ", shares)
    assert re.search(r"stage2 .* {3,}3 \(0\.0 %\), ", classes)
    assert re.search(r"logits +all alike, 100\.0 %", classes)
    right = kept[-1, 0][HARD > -0.5].mean()
    assert re.search(rf"stage1 +{100 * right:.1f} % .*\+\d+\.\d \(\+", agreement)
    changes = (kept[1:, 1] != kept[:-1, 1]).mean()
    assert re.search(rf"stage2 .* {100 * changes:.1f} % +[\d.]+ % to [\d.]+ % ", random_)
    never = (~kept[:, 1].any(0)).sum()
    assert re.search(rf"stage2 .* {never} +[\d.]+ +{kept[:, 1].all(0).sum()} +[\d.]+$", random_, re.MULTILINE)
    assert "logits: always kept (nothing was chosen)" in told


def test_an_unfinished_run_shows_what_there_is(tmp_path):
    run = recorded(tmp_path / "run", chosen(1, epochs=3), finished=False)
    told = text.of_one(run, 5)
    assert "3 epochs so far, of 240" in told
    assert "Not finished" in told
    assert "teacher right" not in told
    assert set(pictures.draw(run.record, run.name)) == {"classes", "samples", "changes"}
    assert "changes" not in pictures.draw(
        recorded(tmp_path / "one", chosen(1, spots=1, epochs=1), finished=False).record, "one"
    )


def test_some_epochs_can_be_looked_at_alone(tmp_path):
    kept = np.ones((EPOCHS, 2, SAMPLES), bool)
    kept[1:4] = chosen(1, spots=2, epochs=3)
    write(tmp_path / "whole", kept)
    told = command("--from", tmp_path, "whole", "--epochs", "2-4")
    share = f"{100 * kept[1, 0].mean():.1f} %"
    assert "epochs 2 to 4 of 8" in told
    assert re.search(rf"kept, epoch 2 +kept, epoch 4.*\n.*\nstage1 +{share} ", told)
    assert "always kept (nothing was chosen)" in command("--from", tmp_path, "whole", "--epochs", "7")


def without_its_end(folder):
    """A finished run of nine epochs, at whose end the record was off."""
    other = write(folder.parent / "other", chosen(1))
    for name in ("config.yaml", "result.json"):
        content = (other / name).read_text().replace("epochs: 8", "epochs: 9")
        (folder / name).write_text(content)
    shutil.rmtree(other)
    return folder


def test_a_finished_run_whose_record_was_off_at_its_end_is_told_as_finished(tmp_path):
    run = read_recorded(without_its_end(write(tmp_path / "run", chosen(1), finished=False)))
    told = text.of_one(run, 5)
    assert "8 epochs recorded, of 9" in told
    assert "record_spots=false at its end" in told
    assert not re.search("so far|Not finished", told)


@pytest.mark.parametrize("which", ["never", "always"])
def test_samples_that_a_spot_never_or_always_distils_are_named_and_listed(tmp_path, which):
    kept = chosen(1, epochs=4)
    folder = write(tmp_path / "run", kept, finished=False)
    expected = np.flatnonzero(kept[:, 1].all(0) if which == "always" else ~kept[:, 1].any(0))
    assert len(expected) > text.NAMED
    named = ", ".join(f"{place} ({LABELS[place]})" for place in expected[: text.NAMED])
    told = command(folder)
    assert re.search(rf"^stage2 +{which} +{len(expected)} +{re.escape(named)}$", told, re.MULTILINE)
    asked = (folder, "--spot", "stage2", f"--{which}", "--format")
    rows = list(csv.DictReader(io.StringIO(command(*asked, "csv"))))
    assert [(int(row["index"]), int(row["label"])) for row in rows] == [
        (place, LABELS[place]) for place in expected
    ]
    content = json.loads(command(*asked, "json"))
    assert (content["distilled"], content["of"], len(content["images"])) == (which, SAMPLES, len(expected))
    early = json.loads(command(*asked, "json", "--epochs", "1-2"))
    assert (early["epochs"], len(early["images"]) > len(expected)) == ([1, 2], True)


# ---- several runs


@pytest.fixture
def several(tmp_path):
    """Three seeds that choose by the sample, one of another distiller that draws, one that keeps all."""
    runs = [recorded(tmp_path / f"at{seed}", chosen(seed), seed=seed) for seed in range(3)]
    runs.append(recorded(tmp_path / "sp", by_chance(5), distiller="sp", seed=0))
    all_kept = np.ones((EPOCHS, 2, SAMPLES), bool)
    return [*runs, recorded(tmp_path / "all", all_kept, learns=False, spot_mode="fixed")]


def test_seeds_that_choose_by_the_sample_agree_and_random_does_not(several):
    together = beside(several, 5)
    pairs = together.pairs.set_index(["left_run", "right_run", "left_spot"])
    left, right = (majority(run.record.kept_of("stage2"), 5) for run in several[:2])
    agreement = (left == right).mean()
    chance = left.mean() * right.mean() + (1 - left.mean()) * (1 - right.mean())
    pair = pairs.loc["at0", "at1", "stage2"]
    assert (pair.kappa, pair.differ) == (pytest.approx((agreement - chance) / (1 - chance)), "seed")
    assert pair.low > 0.2
    probabilities = [run.record.of("train").probability[:, 1] for run in several[:2]]
    assert pair.policies == pytest.approx(stats.spearmanr(*probabilities).statistic)
    assert np.isnan(pairs.loc["at0", "all", "stage2"].policies)
    in_classes = sum(
        (c == LABELS).mean() * (p * q + (1 - p) * (1 - q))
        for c in range(CLASSES)
        for p, q in [(left[c == LABELS].mean(), right[c == LABELS].mean())]
    )
    assert pair.kappa_in_classes == pytest.approx((agreement - in_classes) / (1 - in_classes))
    assert abs(pairs.loc["at0", "sp", "stage2"].kappa) < 0.2
    assert np.isnan(pairs.loc["at0", "all", "stage2"].kappa)
    assert ("at0", "all", "logits") not in pairs.index  # one that the other does not have
    told = text.of_several(together)
    assert "undefined: always kept" in told
    assert "stage1 always kept in 1; stage2 always kept in 1 of 5 runs" in told
    assert not re.search(r"^at fixed +stage1 ", told, flags=re.MULTILINE)
    assert re.search(r"^seed +stage1 +3 +0\.\d\d +0\.\d\d to 0\.\d\d ", told, flags=re.MULTILINE)


def test_many_pairs_are_told_by_what_they_have_in_common(several):
    several = several[:4]
    told = text.of_several(beside(several, 5, across=True))
    assert "within classes" in told
    assert "at seed 0" not in told
    assert re.search(r"^spot +stage1, stage2 +4 ", told, flags=re.MULTILINE)


def test_agreement_is_drawn_as_a_matrix_for_each_spot(several):
    figure = pictures.draw_agreement(beside(several, 5))
    *panels, bar = figure.axes
    assert [axis.get_title("left") for axis in panels] == list(SPOTS)
    assert bar.get_xlabel() == "kappa"
    matrix = panels[0].images[0].get_array()
    assert matrix.shape == (5, 5)
    assert matrix.mask.tolist() == [[i == j or 4 in (i, j) for j in range(5)] for i in range(5)]
    everything = pictures.draw_agreement(beside(several[:2], 5, across=True))
    assert everything.axes[0].images[0].get_array().shape == (6, 6)


def test_what_is_kept_is_drawn_beside_random_with_the_same_rates(several, tmp_path):
    """Dots of what chooses by the sample lie beyond random's bars, those of what draws within; what keeps all
    has no line."""
    spread, by_class, changes = pictures.draw_beside_random(beside(several, 5)).axes
    names = [label.get_text() for label in spread.get_yticklabels()]
    assert names == [f"{group} {spot}" for group in ("at adaptive", "sp adaptive") for spot in SPOTS]
    within = {axis: [] for axis in (spread, by_class, changes)}
    for axis, inside in within.items():
        for bar, dots in zip(axis.patches, axis.lines, strict=True):
            low, high = bar.get_x(), bar.get_x() + bar.get_width()
            inside.append([low < found < high for found in dots.get_xdata()])
    for axis in (spread, changes):
        assert within[axis][:3] == [[False] * 3] * 3
    assert [len(dots) for dots in within[by_class]] == [3] * 3 + [1] * 3
    assert np.sum([inside[3:] for inside in within.values()]) >= 8
    constant = [several[4], recorded(tmp_path / "all1", np.ones((2, 1, SAMPLES), bool), spot_mode="fixed")]
    assert pictures.draw_beside_random(beside(constant, 5)) is None


# ---- pictures


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_each_picture_has_an_axis_for_each_spot_and_is_not_blank(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "DOTS", 30)
    kept = chosen(1, spots=2)
    kept[:, 0] = True
    run = recorded(tmp_path / "run", kept)
    figures = pictures.draw(run.record, "a run")
    assert set(figures) == {"classes", "samples", "changes", "confidence", "loss"}
    for name, figure in figures.items():
        titles = [axis.get_title("left") for axis in figure.axes]
        assert [title for title in titles if title] == ["stage1", "stage2"]
        drawn = pixels_of(pictures.content(figure, "png"))
        assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20, name
    svg = pictures.contents({"loss": figures["loss"]})["loss.svg"]
    assert b"<svg" in svg
    shown = figures["classes"].axes[1].images[0].get_array()
    assert np.allclose(shown, class_shares(kept[:, 1], LABELS).T)
    lines = figures["samples"].axes[1].images[0].get_array().sum(1)
    assert lines.tolist() == sorted(kept[:, 1].sum(0).tolist(), reverse=True)


def test_names_are_drawn_and_printed_as_they_are(tmp_path):
    """Neither dollars nor brackets mean anything."""
    run = recorded(tmp_path / "a $run_1$ [red]", chosen(1, spots=1), finished=False)
    assert run.name in text.of_one(run, 5)
    pictures.content(pictures.draw(run.record, run.name)["changes"], "png")
    several = [run, recorded(tmp_path / "other", chosen(2, spots=1), finished=False, distiller="[x]$_$")]
    assert "[x]$_$" in text.of_several(beside(several, 5))
    pictures.content(pictures.draw_agreement(beside(several, 5)), "png")


def test_of_more_samples_than_lines_some_share_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "ROWS", 50)
    kept = chosen(1)
    figure = pictures.draw(recorded(tmp_path / "run", kept, finished=False).record, "")["samples"]
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (50, EPOCHS)
    assert np.mean(shown) == pytest.approx(kept[:, 0].mean(), abs=0.01)


def test_samples_shown_are_extreme_ones_of_as_many_classes_as_there_are():
    labels = np.array([0, 0, 0, 1, 1, 2])
    rank = np.array([0.0, 0.0, 0.0, 0.0, 0.5, 1.0])
    assert pictures.spread_over_classes(rank, labels, 3) == [0, 3, 1]
    assert pictures.spread_over_classes(rank, labels, 10) == [0, 3, 1, 2, 4, 5]


@pytest.fixture(scope="module")
def on_digits(tmp_path_factory):
    """A run on a part of the digits, with a record as its training images need it."""
    folder = tmp_path_factory.mktemp("on_digits") / "run"
    config = compose_config("dataset.train_samples=240", "epochs=8")
    images = samples.build.dataset(config).train
    write(folder, chosen(1, spots=1), finished=False, labels=images.labels.numpy())
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder, images


def test_the_command_shows_the_samples_of_the_runs_own_data(on_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "DOTS", 20)
    monkeypatch.setattr(pictures, "SUFFIXES", ("png",))
    folder, images = on_digits
    command(folder, "--output", tmp_path / "drawn")
    names = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert names == {"classes.png", "samples.png", "changes.png", "images.png"}
    run = read_recorded(folder)
    figure = pictures.draw(run.record, run.name, samples.images_of(run, "train"))["images"]
    rates = chosen(1, spots=1)[:, 0].mean(0)
    places = pictures.spread_over_classes(-rates, run.record.labels, 10)
    for shown, place in zip(figure.axes[0].images, places, strict=False):
        assert np.array_equal(shown.get_array(), images.images[place, 0].numpy())
    told = [words.get_text() for words in figure.axes[0].texts]
    assert f"{run.record.labels[places[0]]}  {rates[places[0]]:.0%}" in told


def test_images_are_shown_unasked_where_they_are_small_at_hand_and_read_by_no_other_code(
    on_digits, monkeypatch
):
    run = read_recorded(on_digits[0])
    assert len(samples.small_images(run)) == 240

    def changed(**keys) -> Recorded:
        return dataclasses.replace(run, config=run.config | {"dataset": run.config["dataset"] | keys})

    assert samples.small_images(dataclasses.replace(run, data_sha256="d" * 64)) is None
    assert samples.small_images(changed(train_samples=239)) is None
    built = []
    monkeypatch.setattr(samples, "images_of", lambda *asked: built.append(asked))
    samples.small_images(changed())
    assert len(built) == 1
    for keys in (
        {"image_size": 64},
        {"image_size": "8"},
        {"_target_": "os.system"},
        {"_target_": "sakd.data.digits.os"},
        {"more": [{"_target_": "os.system"}]},
    ):
        assert samples.small_images(changed(**keys)) is None
    assert len(built) == 1


def test_where_the_data_are_not_at_hand_a_line_says_so_and_the_rest_is_drawn(
    on_digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(pictures, "DOTS", 20)
    monkeypatch.setattr(pictures, "SUFFIXES", ("png",))
    folder = write(tmp_path / "run", chosen(1, spots=1), finished=False)
    config = yaml.safe_load((on_digits[0] / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    told = command(folder, "--output", tmp_path / "drawn")
    (line,) = [line for line in told.splitlines() if line.startswith("no image is shown: ")]
    assert "other labels than its record has" in line
    assert (tmp_path / "drawn/classes.png").is_file()
    assert not (tmp_path / "drawn/images.png").exists()


def test_several_runs_leave_a_matrix_and_a_table_of_all_pairs(several, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "DOTS", 20)
    told = command("--from", tmp_path, "at0", "at1", "sp", "--output", tmp_path / "drawn")
    assert "3 runs of one data set" in told
    with (tmp_path / "drawn/agreement.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "drawn/random.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9
    assert len(rows) == 9
    assert {row["differ"] for row in rows} == {"seed", "distiller", "distiller, seed"}
    assert {path.suffix for path in (tmp_path / "drawn").iterdir()} == {".csv", ".png", ".svg"}


# ---- the policy test


@pytest.mark.parametrize("which", ["skipped", "kept"])
def test_the_images_that_a_policy_sends_past_a_spot_are_listed(tmp_path, which):
    write(tmp_path / "run", chosen(1), spot_mode="anti")
    asked = ("--from", tmp_path, "ru", "--split", "test", "--spot", "stage2", f"--{which}", "--format")
    rows = list(csv.DictReader(io.StringIO(command(*asked, "csv"))))
    known = seen("test", 3)
    expected = np.flatnonzero(known["test_kept"][:, 1] == (which == "kept"))
    assert [int(row["index"]) for row in rows] == expected.tolist()
    assert [int(row["label"]) for row in rows] == LABELS[expected].tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        known["test_probability"][expected, 1], rel=1e-5
    )
    content = json.loads(command(*asked, "json"))
    assert (content["kept"], content["of"]) == (which == "kept", SAMPLES)
    assert [image["index"] for image in content["images"]] == expected.tolist()
    assert f"{len(expected)} of 240 test images" in command(*asked, "terminal")


@pytest.mark.slow
def test_images_in_files_are_listed_with_their_files(tmp_path):
    labels = np.array([0, 0, 1, 1])
    for split in ("train", "test"):
        for name in ("a/1", "a/2", "b/x", "b/y"):
            path = tmp_path / "photos" / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    folder = write(tmp_path / "run", np.ones((2, 1, 4), bool), labels=labels, finished=False)
    config = compose_config(
        "dataset=image_folder", f"dataset.root={tmp_path}/photos", "dataset.classes=2", "dataset.image_size=8"
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    files = samples.file_names(read_recorded(folder), "train")
    assert files == [f"{tmp_path}/photos/train/{name}.png" for name in ("a/1", "a/2", "b/x", "b/y")]
    assert [
        image.shape for image in samples.pixels(samples.images_of(read_recorded(folder), "train"), [3])
    ] == [(8, 8, 3)]


# ---- what cannot be


@pytest.fixture
def runs(tmp_path):
    """A finished run, one without a policy, one under way, one of other data, and what is no run."""
    write(tmp_path / "good-1", chosen(1))
    write(tmp_path / "good-2", chosen(2), data="e" * 64)
    write(tmp_path / "fixed", chosen(1), learns=False, spot_mode="fixed")
    write(tmp_path / "under-way", chosen(1, epochs=3), finished=False)
    write(tmp_path / "others", chosen(1), labels=LABELS[::-1].copy(), finished=False)
    write(tmp_path / "fewer", chosen(1)[:, :, :100], labels=LABELS[:100], finished=False)
    without_its_end(write(tmp_path / "off", chosen(1), finished=False))
    write(tmp_path / "without", chosen(1))
    (tmp_path / "without/spots.npz").unlink()
    path = write(tmp_path / "damaged", chosen(1)) / "spots.npz"
    path.write_bytes(path.read_bytes()[:-200])
    (write(tmp_path / "no-config", chosen(1)) / "config.yaml").write_text("[")
    return tmp_path


TEST = ("--split", "test", "--spot", "stage2", "--kept")
NEVER = ("--spot", "stage2", "--never")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("god-1",), r"god-1: found no such run.* Did you mean 'good-1'\?"),
        (("good",), r"'good': found 2 runs .*good-1, good-2; expected one"),
        (("without",), r"without/spots.npz: found no such file"),
        (("damaged",), r"damaged/spots.npz: cannot be read .*, expected a record"),
        (("no-config",), r"no-config/config.yaml: found no valid YAML"),
        (("good-1", "good-1"), r"good-1: found this run 2 times, expected each once"),
        (
            ("good-1", "others"),
            r"others: found training samples with other labels, expected the same as in good-1",
        ),
        (
            ("good-1", "fewer"),
            r"fewer: found 100 training samples, expected 240 training samples as in good-1",
        ),
        (("good-1", "good-2"), r"good-2: found images with checksum eee.*, expected .*ddd.* as in good-1"),
        (("good-1", "under-way", *TEST), r"--spot: found 2 runs, expected one"),
        (
            ("good-1", *TEST, "--output", "x"),
            r"--output: found --output=x beside --kept, expected it without",
        ),
        (("good-1", *TEST, "--last", "3"), r"--last: found --last=3 beside --kept, expected it without"),
        (
            ("good-1", *TEST, "--epochs", "3"),
            r"--epochs: found --epochs=3 beside --kept, expected it without",
        ),
        (
            ("good-1", *NEVER, "--across-spots"),
            r"--across-spots: found --across-spots beside --never, expected it without",
        ),
        (("good-1", *TEST, "--never"), r"--never: found --kept beside it, expected one of them"),
        (
            ("good-1", *NEVER[:-1], "--split", "test", "--always"),
            r"--split: found test, expected train beside",
        ),
        (("good-1", "--never"), r"--spot: found none, expected one beside --never"),
        (
            ("good-1", *TEST[:-3], "--spot", "stage9", "--kept"),
            r"--spot: found 'stage9', .*Did you mean 'stage2'",
        ),
        (
            ("good-1", *TEST[:-1]),
            r"--skipped, .* --always: found none, expected one beside --split and --spot",
        ),
        (
            ("good-1", "--spot", "stage2", "--kept"),
            r"--split: found none, expected one beside --spot and --kept",
        ),
        (("good-1", "--format", "csv"), r"--skipped, .* --always: found none, expected one beside --format"),
        (("good-1", "--epochs", "9-12"), r"--epochs: found 9-12, expected some of 1 to 8, which good-1 has"),
        (("good-1", "--epochs", "last"), r"--epochs: found 'last', expected the number of an epoch, or two"),
        (("under-way", *TEST), r"under-way: found 3 epochs so far, of 240, expected a finished run"),
        (("fixed", *TEST), r"fixed: found spot_mode=fixed, expected a mode that learns"),
        (("off", *TEST), r"off: found 8 epochs recorded, of 9, expected one that has a record at its end"),
    ],
)
def test_what_cannot_be_looked_at_is_told_in_one_line(runs, arguments, told):
    (line,) = command("--from", runs, *arguments, expect=1).splitlines()
    assert re.search(f"^Error: .*{told}", line), line
