"""Tables of finished runs, against statistics of plain arrays; from folders and from a real store."""

import copy
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from sakd.cli import main as cli
from sakd.compare import compare, read, select
from sakd.compare.formats import ABSENT, FORMATS, MINUS, UNREACHABLE
from sakd.compare.published import FIGURES, read_published
from sakd.compare.statistics import (
    holm,
    least_shown,
    least_signed_rank,
    paired,
    pairs_needed,
    pairs_to_show,
    power,
)
from sakd.compare.table import mean_rate
from sakd.configuration import prerequisites, short_names
from sakd.errors import ConfigError, DataError, RunError
from sakd.files import with_checksum
from sakd.runs import Run
from sakd.runs.tracking import Mirror, synchronise_all
from tests.conftest import ROOT, compose_config, last_of_each

SEEDS = range(5)
FIXED = [97.0, 96.5, 97.25, 96.75, 97.5]
ADAPTIVE = [97.5, 97.25, 97.0, 97.5, 98.5]
ANTI = [96.0, 96.5, 96.75]


@functools.cache
def composed(*overrides: str) -> dict:
    of_digits = ("dataset=digits", "teacher=wrn_16_2", "student=resnet8")
    return compose_config(*last_of_each("epochs=2", "tracking=none", *of_digits, *overrides))


def finish(
    folder,
    accuracy,
    *overrides,
    seed=0,
    teacher="a" * 64,
    data="d" * 64,
    commit="c" * 40,
    measured=(),
    changes=(),
    config=None,
) -> Run:
    """A run's folder as a finished run leaves it, without the training; ``accuracy`` at the last epoch, 1
    below the best.

    ``changes``: to the composed configuration, by key; composing takes longer.
    """
    config = copy.deepcopy(config or composed(*overrides))
    for path, value in dict(changes).items():
        *nodes, key = path.split(".")
        functools.reduce(dict.__getitem__, nodes, config)[key] = value
    run = Run(config | {"seed": seed, "runs": str(folder)})
    run.folder.mkdir(parents=True)
    run.start()
    for epoch in range(1, config["epochs"] + 1):
        now = accuracy if epoch == config["epochs"] else accuracy + 1
        line = {
            "epoch": epoch,
            "loss/task": 1 / epoch,
            "test/accuracy": now,
            "teacher/accuracy": 98.5,
            **dict(measured),
        }
        run.append_metrics(line | {"test/best_accuracy": accuracy + 1, "seconds": 1.0, "time": 1.8e9 + epoch})
    result = {
        "run": run.name,
        "epochs": config["epochs"],
        "teacher": teacher and {"name": "a", "sha256": teacher, "accuracy": 98.5, "source": "elsewhere"},
        "kept": {},
        "seconds": 2.0,
    }
    result |= {
        "data_sha256": data,
        "student": {"name": "b", "accuracy": accuracy, "best_accuracy": accuracy + 1, "best_epoch": 1},
        "code": {"commit": commit, "changed": False},
    }
    run.finish({"weight": torch.tensor([accuracy, seed])}, result)
    return run


def finish_all(folder, accuracies, *overrides, **keys) -> None:
    for seed, accuracy in enumerate(accuracies):
        finish(folder, accuracy, *overrides, seed=seed, **keys)


def compared(folder, *filters, metric="test/accuracy", **keys):
    return compare(select(read(str(folder)), filters), metric, read_published(FIGURES), **keys)


def group(comparison, distiller, mode):
    found = comparison.groups[
        (comparison.groups["distiller"] == distiller) & (comparison.groups["spot_mode"] == mode)
    ]
    assert len(found) == 1
    return found.iloc[0]


def command(*arguments, expect=0):
    done = CliRunner().invoke(cli, ["compare", *map(str, arguments)])
    assert done.exit_code == expect, done.output
    return done.output


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """AT in three modes, of anti only three seeds, and SP in two. No rows: a teacher, a pretraining, a trial,
    a failure."""
    folder = tmp_path_factory.mktemp("three") / "runs"
    finish_all(folder, FIXED, "distiller=at", "spot_mode=fixed")
    finish_all(folder, ADAPTIVE, "distiller=at", "spot_mode=adaptive")
    finish_all(folder, ANTI, "distiller=at", "spot_mode=anti")
    finish_all(folder, ADAPTIVE, "distiller=sp", "spot_mode=fixed")
    finish_all(folder, FIXED, "distiller=sp", "spot_mode=adaptive")
    finish(folder, 99.0, "distiller=none", teacher=None)
    finish(folder, 0.0, config=prerequisites(composed("distiller=ft")).pretraining)
    finish(folder, 10.0, "experiment=[cifar100/resnet56_resnet20,debug]", "distiller=at")
    unfinished = finish(folder, 50.0, "distiller=vid")
    (unfinished.folder / "result.json").unlink()
    return folder


# Statistics


def signed_rank_by_enumeration(differences) -> float:
    """Two-sided p from all signs that the differences could have had."""
    differences = np.array([difference for difference in differences if difference != 0])
    ranks = stats.rankdata(np.abs(differences))
    signs = np.array(list(itertools.product([0, 1], repeat=len(ranks))))
    sums = signs @ ranks
    found = ranks[differences > 0].sum()
    return min(1.0, 2 * min((sums <= found).mean(), (sums >= found).mean()))


def test_a_paired_difference_is_what_scipy_says_of_plain_arrays():
    found = paired(ADAPTIVE, FIXED)
    differences = [0.5, 0.75, -0.25, 0.75, 1.0]
    half = stats.t.ppf(0.975, 4) * np.std(differences, ddof=1) / np.sqrt(5)
    assert (found.pairs, found.difference) == (5, pytest.approx(0.55))
    assert (found.low, found.high) == (pytest.approx(0.55 - half), pytest.approx(0.55 + half))
    assert found.t_p == pytest.approx(stats.ttest_rel(ADAPTIVE, FIXED).pvalue)
    assert found.wilcoxon_p == pytest.approx(signed_rank_by_enumeration(differences))


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, 0.2, 0.3, 0.4, 0.5],
        [0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7],
        [0.2, 0.2, -0.2, 0.4, 0.4, 0.4, -0.1, 0.1, 0.3],  # ties
        [0.0, 0.0, 0.1, -0.2, 0.3, 0.4],  # zeros
        [0.0, 0.1, -0.2, 0.3, 0.4],
        [0.3, 0.3],
    ],
)
def test_wilcoxons_p_is_exact_also_with_ties_and_zeros(differences):
    assert paired(differences, np.zeros(len(differences))).wilcoxon_p == pytest.approx(
        signed_rank_by_enumeration(differences)
    )


def test_wilcoxons_p_of_many_pairs_is_scipys():
    differences = np.random.default_rng(0).normal(0.1, 1, 60)
    for n, method in ((40, "exact"), (60, "asymptotic")):
        expected = stats.wilcoxon(differences[:n], method=method).pvalue
        assert paired(differences[:n], np.zeros(n)).wilcoxon_p == pytest.approx(expected)
    tied = np.round(differences[:20], 1)
    assert (
        paired(tied, np.zeros(20)).wilcoxon_p == stats.wilcoxon(tied[tied != 0], method="asymptotic").pvalue
    )


def test_differences_that_are_all_the_same_have_no_t_test_and_no_interval():
    found = paired([97.3, 98.6, 3.3], [97.0, 98.3, 3.0])  # 0.3 each, but for the rounding of subtraction
    assert (found.difference, found.wilcoxon_p) == (pytest.approx(0.3), 0.25)
    assert np.isnan([found.t_p, found.low, found.high]).all()
    assert paired(FIXED, FIXED).wilcoxon_p == 1


def test_holm_by_hand():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not be less than the one before.
    adjusted = holm([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, np.nan, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([]).tolist() == []


def test_the_number_of_pairs_that_wilcoxon_needs():
    assert [least_signed_rank(n) for n in (2, 5)] == [
        stats.wilcoxon(np.arange(1, n + 1)).pvalue for n in (2, 5)
    ]
    assert pairs_needed(1) == 6
    for tests in range(1, 50):
        n = pairs_needed(tests)
        assert least_signed_rank(n) * tests <= 0.05 < least_signed_rank(n - 1) * tests


def test_power_is_the_share_of_samples_whose_t_test_shows_the_difference():
    draws = np.random.default_rng(0)
    for difference, deviation, n in ((0.3, 0.4, 5), (1.2, 0.4, 3), (0.3, 0.5, 20)):
        samples = draws.normal(difference, deviation, (20000, n))
        shown = (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean()
        assert power(difference, deviation, n) == pytest.approx(shown, abs=0.01)
    assert power(1e-6, 1, 7) == pytest.approx(0.05)


def test_the_least_that_pairs_could_show_and_the_pairs_that_show_it():
    assert least_shown(1.0, 16) == pytest.approx(0.7496, abs=1e-3)  # Cohen's tables: 0.75 with 16 pairs
    assert least_shown(2.0, 2) == pytest.approx(2 * least_shown(1.0, 2))
    for n in (2, 3, 5, 40):
        least = least_shown(0.7, n)
        assert power(least, 0.7, n) == pytest.approx(0.8)
        assert pairs_to_show(least * 1.001, 0.7) == n
        assert pairs_to_show(least * 0.999, 0.7) == n + 1
    found = paired(ADAPTIVE, FIXED)
    deviation = np.std(np.subtract(ADAPTIVE, FIXED), ddof=1)
    assert (found.deviation, found.could_show) == pytest.approx((deviation, least_shown(deviation, 5)))


# The table


def test_groups_are_means_and_sample_deviations_and_differences_are_paired_by_seed(three):
    comparison = compared(three)
    assert comparison.groups[["distiller", "spot_mode"]].apply(" ".join, axis=1).tolist() == [
        *("at fixed", "at adaptive", "at anti", "sp fixed", "sp adaptive", "sp anti")
    ]
    fixed, anti = group(comparison, "at", "fixed"), group(comparison, "at", "anti")
    assert (fixed["n"], fixed["mean"]) == (5, pytest.approx(np.mean(FIXED)))
    assert fixed["std"] == pytest.approx(np.std(FIXED, ddof=1))
    assert (fixed["pairs"], np.isnan(fixed["difference"])) == (0, True)
    assert (anti["n"], anti["expected"], anti["pairs"]) == (3, 5, 3)
    assert anti["difference"] == pytest.approx(np.mean(np.subtract(ANTI, FIXED[:3])))
    assert anti["t_p"] == pytest.approx(stats.ttest_rel(ANTI, FIXED[:3]).pvalue)


def test_only_seeds_that_both_modes_have_make_pairs(tmp_path):
    for mode, accuracies in (
        ("fixed", {0: 90.0, 1: 97.0, 2: 96.0}),
        ("adaptive", {3: 99.0, 2: 97.0, 1: 97.5}),
    ):
        for seed, accuracy in accuracies.items():
            finish(tmp_path, accuracy, "distiller=at", f"spot_mode={mode}", seed=seed)
    found = group(compared(tmp_path), "at", "adaptive")
    assert (found["n"], found["expected"], found["pairs"], found["difference"]) == (3, 4, 2, 0.75)


def test_holms_correction_is_over_rows_and_modes(three):
    comparison = compared(three)
    arrays = {
        ("at", "adaptive"): (ADAPTIVE, FIXED),
        ("at", "anti"): (ANTI, FIXED[:3]),
        ("sp", "adaptive"): (FIXED, ADAPTIVE),
    }
    by_hand = {name: stats.ttest_rel(*values).pvalue for name, values in arrays.items()}
    smallest, middle, largest = sorted(by_hand.values())
    adjusted = {smallest: 3 * smallest, middle: max(3 * smallest, 2 * middle)}
    adjusted[largest] = max(adjusted[middle], largest)
    for name, p in by_hand.items():
        assert group(comparison, *name)["t_p_holm"] == pytest.approx(adjusted[p]), name


def test_a_test_that_cannot_reach_the_level_is_said_to_be_one(three):
    comparison = compared(three)
    least = [group(comparison, "at", mode)["wilcoxon_least_p_holm"] for mode in ("adaptive", "anti")]
    assert least == [pytest.approx(3 * 2 / 2**5), pytest.approx(0.25)]
    (note,) = [note for note in comparison.notes if "cannot reach" in note]
    assert "with 3 pairs 0.25, corrected 0.25; with 5 pairs 0.0625, corrected 0.188" in note
    assert "It takes 7 pairs for each of 3 differences, 6 for one alone" in note


def test_enough_seeds_reach_the_level(tmp_path):
    finish_all(tmp_path, [95 + seed / 4 for seed in range(6)], "distiller=at", "spot_mode=fixed")
    finish_all(tmp_path, [96 + seed / 2 for seed in range(6)], "distiller=at", "spot_mode=adaptive")
    comparison = compared(tmp_path)
    assert UNREACHABLE not in FORMATS["terminal"](comparison)
    assert group(comparison, "at", "adaptive")["wilcoxon_p_holm"] == pytest.approx(2 / 64)


def test_costs_are_told_once_for_each_network_where_they_are_known(tmp_path):
    run = finish(tmp_path, 97.0, "distiller=at", "spot_mode=fixed")
    finish(tmp_path, 98.0, "distiller=at", "spot_mode=fixed", seed=1)
    path = run.folder / "result.json"
    counts = {"student": {"parameters": 1234, "multiply_adds": 5678901}}
    counts["teacher"] = {"parameters": 98765, "multiply_adds": None}
    result = json.loads(path.read_text()) | {"cost": counts}
    del result["sha256"]
    path.write_text(json.dumps(result))
    output = command("--from", str(tmp_path), "--cost")
    assert re.search(r"resnet8 +student +1,234 +5,678,901", output)
    assert re.search(r"wrn_16_2 +teacher +98,765 +\N{EN DASH}", output)
    assert "Of 1 runs no costs are known" in output
    assert "1,234" not in command("--from", str(tmp_path))
    path.write_text(json.dumps(result | {"cost": {"student": {"parameters": "many"}}}))
    assert "for cost, expected counts by network" in command("--from", str(tmp_path), expect=1)


def test_missing_groups_are_shown_as_missing(three):
    comparison = compared(three)
    absent = group(comparison, "sp", "anti")
    assert (absent["n"], absent["expected"]) == (0, 5)
    assert comparison.missing[["distiller", "spot_mode", "seed"]].values.tolist() == [
        *(["at", "anti", 3], ["at", "anti", 4]),
        *(["sp", "anti", seed] for seed in SEEDS),
    ]
    assert "Missing, seed 3, 4: at anti." in comparison.notes
    assert "Missing, seed 0, 1, 2, 3, 4: sp anti." in comparison.notes
    shown = command("--from", three)
    assert re.search(r"^sp .* missing", shown, flags=re.MULTILINE)
    assert "(3 of 5)" in shown


def test_cells_that_a_plan_expects_are_missing_too(three):
    names = short_names(composed("distiller=vid", "spot_mode=random"))
    comparison = compared(three, "distiller=sp", expected=[names | {"seed": "7"}])
    assert comparison.missing.to_dict("records") == [names | {"seed": 7}]
    assert group(comparison, "vid", "random")["n"] == 0


def test_one_seed_gives_differences_without_intervals_or_tests(tmp_path):
    finish(tmp_path, 97.0, "distiller=at", "spot_mode=fixed")
    finish(tmp_path, 97.5, "distiller=at", "spot_mode=adaptive")
    shown = command("--from", tmp_path)
    assert re.search(r"at +97.00 \(1\) +97.50 \(1\)\n", re.sub(r" +\n", "\n", shown))
    assert re.search(rf"at +adaptive +\+0.50 +{ABSENT} +{ABSENT} +{ABSENT} +1 +{ABSENT} +{ABSENT}", shown)
    assert "With one pair of seeds there is neither an interval nor a test: at adaptive." in shown
    content = json.loads(command("--from", tmp_path, "--format", "json"))
    assert (content["groups"][1]["difference"], content["groups"][1]["t_p"], content["groups"][1]["std"]) == (
        0.5,
        None,
        None,
    )


def test_what_was_kept_stands_beside_a_difference_and_all_of_it_is_the_baseline(tmp_path):
    for seed, least in enumerate((0.97, 0.99)):
        for distiller, share in (("at", least), ("kd", 0.9995)):
            kept = {"kept/stage1": 1.0, "kept/logits": share}
            finish(tmp_path, 97.0, f"distiller={distiller}", "spot_mode=fixed", seed=seed)
            finish(tmp_path, 97.5, f"distiller={distiller}", "spot_mode=adaptive", seed=seed, measured=kept)
    shown = command("--from", tmp_path, "--format", "markdown")
    assert re.search(r"\| at \| adaptive \| \+0.50 \| .* \| 97.0 \|", shown)
    assert "- In effect fixed, with 99.9 % or more kept everywhere in the end: kd adaptive." in shown


def test_rates_by_epoch_that_mlflow_cut_off_are_read_as_far_as_they_go():
    assert [mean_rate(text) for text in ("0.5", "[0.5, 1e-06]", "[0.5, 0.25, 1e-")] == [0.5, 0.2500005, 0.375]


@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_control_at_each_seed_s_own_rates_is_one_group(by_epoch, tmp_path):
    for seed, rate in enumerate((0.5, 0.9)):
        finish(tmp_path, 97.0, "distiller=at", "spot_mode=fixed", seed=seed)
        rates = {"spot_mode.p": {"stage1": [rate + 0.1, rate - 0.1] if by_epoch else rate, "logits": 1.0}}
        finish(tmp_path, 96.0 + rate, "distiller=at", "spot_mode=random", seed=seed, changes=rates)
    comparison = compared(tmp_path)
    assert group(comparison, "at", "random")["n"] == 2
    told = "The rates of digits, wrn_16_2 to resnet8, at random are each seed's own: stage1 50.0% to 90.0%."
    assert told in comparison.notes
    for rate in (0.3, 0.4):
        finish(
            tmp_path,
            95,
            "distiller=sp",
            "spot_mode=random",
            seed=int(10 * rate),
            changes={"spot_mode.p": rate},
        )
    with pytest.raises(ConfigError, match=r"spot_mode\.p=0\.3"):
        compared(tmp_path)


def test_equal_differences_are_told_and_leave_no_nan(tmp_path):
    finish_all(tmp_path, [97.0, 98.3], "distiller=at", "spot_mode=fixed")
    finish_all(tmp_path, [97.3, 98.6], "distiller=at", "spot_mode=adaptive")
    content = json.loads(command("--from", tmp_path, "--format", "json"))
    assert (
        "Differences that are all the same have neither an interval nor a t-test: at adaptive."
        in content["notes"]
    )
    assert "nan" not in command("--from", tmp_path).lower()


def test_without_fixed_there_are_no_differences(three):
    comparison = compared(three, "spot_mode=adaptive")
    assert (comparison.groups["pairs"] == 0).all()
    assert "No mode has a seed in common with fixed: no differences." in comparison.notes


def test_other_metrics_are_the_last_epochs(three):
    assert group(compared(three, metric="test/best_accuracy"), "at", "fixed")["mean"] == pytest.approx(
        np.mean(FIXED) + 1
    )
    assert group(compared(three, metric="loss/task"), "at", "fixed")["mean"] == 0.5
    with pytest.raises(ConfigError, match=r"--metric: found 'test/acuracy'.* Did you mean 'test/accuracy'"):
        compared(three, metric="test/acuracy")
    with pytest.raises(ConfigError, match="--metric: found 'time'"):
        compared(three, metric="time")


def test_runs_that_lack_a_metric_are_left_out_by_name(tmp_path):
    finish(tmp_path, 97.0, "distiller=at", "spot_mode=fixed", measured={"val/accuracy": 90.0}.items())
    without = finish(tmp_path, 97.5, "distiller=sp", "spot_mode=fixed")
    comparison = compared(tmp_path, metric="val/accuracy")
    assert comparison.groups["distiller"].tolist() == ["at"]
    assert f"Left out, as they have no val/accuracy: {without.name}." in comparison.notes


# Only the seed may differ


@pytest.mark.parametrize(
    ("mode", "other", "changes", "key"),
    [
        ("fixed", "fixed", {"optimizer.lr": 0.1}, "optimizer.lr"),
        ("fixed", "fixed", {"epochs": 3}, "epochs"),
        ("adaptive", "adaptive", {"spot_mode.gamma": 2}, "spot_mode.gamma"),
        ("adaptive", "adaptive", {"schedule": None}, "schedule.gamma"),
        ("fixed", "adaptive", {"distiller.beta": 7}, "distiller.beta"),
        ("fixed", "adaptive", {"batch_size": 32}, "batch_size"),
    ],
)
def test_configurations_that_differ_in_more_than_the_seed_are_refused_by_key(
    tmp_path, mode, other, changes, key
):
    one = finish(tmp_path, 97.0, "distiller=at", f"spot_mode={mode}", seed=0)
    two = finish(tmp_path, 97.5, "distiller=at", f"spot_mode={other}", seed=1, changes=changes)
    with pytest.raises(ConfigError) as told:
        compared(tmp_path)
    head, first, second, last = str(told.value).splitlines()
    assert head.startswith("digits, wrn_16_2 to resnet8, at")
    assert "found runs of 2 recipes, expected one, but for seed" in head
    assert key in last
    chosen = []
    for line in (first, second):
        *filters, name = shlex.split(line)
        assert compared(tmp_path, *filters).runs["run"].tolist() == [name]
        chosen.append(name)
    assert sorted(chosen) == sorted([one.name, two.name])


def test_each_of_several_recipes_is_told_with_the_shortest_filters_that_choose_it(tmp_path):
    """No key alone chooses the third."""
    recipes = [
        ({"epochs": 3, "schedule.milestones": [2, 3, 3]}, ["epochs=3"]),
        ({"optimizer.lr": 0.1}, ["optimizer.lr=0.1"]),
        ({}, ["epochs=2", "optimizer.lr=0.05"]),
    ]
    for number, (changes, _) in enumerate(recipes):
        for seed in range(number + 1):
            finish(tmp_path, 97.0 + number, "distiller=at", "spot_mode=fixed", seed=seed, changes=changes)
    with pytest.raises(ConfigError, match="found runs of 3 recipes") as told:
        compared(tmp_path)
    shown = [tuple(line.split("   ")) for line in str(told.value).splitlines()[1:-1]]
    assert sorted((*filters.split(), names.partition(" and ")[2]) for filters, names in shown) == sorted(
        (*filters, f"{number} more" if number else "") for number, (_, filters) in enumerate(recipes)
    )
    for filters, names in shown:
        assert len(compared(tmp_path, *filters.split()).runs) == (
            int(names[-6]) + 1 if "more" in names else 1
        )


def test_a_run_of_before_there_was_a_key_is_compared_with_those_that_have_it_at_its_neutral_value(tmp_path):
    config = composed("distiller=at", "spot_mode=fixed")
    finish(tmp_path, 90, config=config, seed=0)
    finish(tmp_path, 92, config={key: config[key] for key in config if key != "precision"}, seed=1)
    assert group(compared(tmp_path), "at", "fixed")["mean"] == 91


def test_what_follows_from_the_spot_mode_or_does_not_change_results_may_differ(tmp_path):
    finish(
        tmp_path,
        97.0,
        "distiller=at",
        "spot_mode=fixed",
        changes={"device": "cpu", "dataset.recipe.epochs": 7},
    )
    finish(
        tmp_path, 97.5, "distiller=at", "spot_mode=adaptive",
        changes={"threads": 1, "dataset.root": "here", "spot_mode.gamma": 2.0, "teacher.min_accuracy": 1},
    )  # fmt: skip
    assert group(compared(tmp_path), "at", "adaptive")["difference"] == 0.5


def test_another_teacher_is_refused_and_the_same_one_made_otherwise_is_not(tmp_path):
    otherwise = {"teacher.training.seed": 1}
    finish(tmp_path, 97.0, "distiller=at", "spot_mode=fixed")
    finish(tmp_path, 97.5, "distiller=at", "spot_mode=adaptive", changes=otherwise)
    assert group(compared(tmp_path), "at", "adaptive")["pairs"] == 1
    finish(tmp_path, 98.0, "distiller=at", "spot_mode=adaptive", changes=otherwise, seed=1, teacher="b" * 64)
    with pytest.raises(ConfigError) as told:
        compared(tmp_path)
    assert re.search(r"teacher.sha256=a{12}   .* and 1 more\n  teacher.sha256=b{12} ", str(told.value))
    assert str(told.value).endswith("They differ in teacher.sha256, teacher.training.seed.")
    assert len(compared(tmp_path, "teacher.sha256=aaaaaaaaaaaa").runs) == 2


def test_other_images_under_the_same_name_are_refused(tmp_path):
    finish(tmp_path, 97.0, "distiller=at", "spot_mode=fixed")
    finish(tmp_path, 97.5, "distiller=at", "spot_mode=adaptive", data="e" * 64)
    with pytest.raises(ConfigError, match=r"dataset.sha256=e{12} [^$]*dataset.sha256=d{12} "):
        compared(tmp_path)


def test_one_result_found_twice_counts_once_and_two_results_are_refused(tmp_path):
    finish(tmp_path / "here", 97.0, "distiller=at", "spot_mode=fixed")
    finish(tmp_path / "there", 97.5, "distiller=at", "spot_mode=fixed")
    here, there = read(str(tmp_path / "here")), read(str(tmp_path / "there"))
    figures = read_published(FIGURES)
    assert compare(here + here, "test/accuracy", figures).groups["n"].tolist() == [1]
    with pytest.raises(ConfigError, match="found two results of one configuration and seed"):
        compare(here + there, "test/accuracy", figures)


def test_distillers_that_were_not_trained_alike_are_told(tmp_path):
    finish(tmp_path, 97.0, "distiller=at", "spot_mode=fixed")
    finish(tmp_path, 97.5, "distiller=sp", "spot_mode=fixed", changes={"batch_size": 32}, commit="d" * 40)
    comparison = compared(tmp_path)
    notes = comparison.notes
    assert (
        "The distillers of digits, wrn_16_2 to resnet8 do not share batch_size: 64 for at; 32 for sp."
        in notes
    )
    assert "Made by different code: commits cccccccccccc (1 run), dddddddddddd (1 run)." in notes
    assert json.loads(FORMATS["json"](comparison))["commits"] == {"c" * 40: 1, "d" * 40: 1}
    for form in ("terminal", "markdown", "latex"):
        assert "Made by different code: commits cccccccccccc (1 run)" in FORMATS[form](comparison)


def test_runs_of_one_commit_need_no_word(three):
    assert not any("code" in note for note in compared(three).notes)


# Filters and what is read


def test_filters_choose_by_any_key(three):
    runs = read(str(three))
    assert len(runs) == 23
    assert len(select(runs, ["distiller=at"])) == 13
    assert len(select(runs, ["distiller=at,sp", "spot_mode=fixed", "seed=0,4"])) == 4
    assert len(select(runs, ["optimizer.lr=5e-2", "dataset.flip=false", "teacher.checkpoint=null"])) == 23
    assert len(select(runs, ["schedule.milestones=[1,2,2]"])) == 23
    assert len(select(runs, ["distiller.losses.at.weight=1000"])) == 13
    assert len(select(runs, ["distiller.losses.at.weight=null"])) == 10


def test_misspelled_filters_are_refused_with_what_is_near(three):
    runs = read(str(three))
    with pytest.raises(ConfigError, match=r"distiler: no such key.* Did you mean 'distiller'"):
        select(runs, ["distiler=at"])
    with pytest.raises(ConfigError, match=r"spot_mode: found 'adaptiv'.* Did you mean 'adaptive'"):
        select(runs, ["spot_mode=adaptiv"])
    with pytest.raises(ConfigError, match="expected key=value"):
        select(runs, ["distiller"])
    with pytest.raises(ConfigError, match="distiller: found 'sp', expected one of at"):
        select(runs, ["spot_mode=anti", "distiller=sp"])


def test_what_cannot_be_read_is_told_by_its_name(tmp_path):
    for name in ("nowhere", "databricks-kept.json"):
        with pytest.raises(RunError, match=f"found '{name}', expected a folder of runs"):
            read(name)
    with pytest.raises(RunError, match="found no file"):
        read(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(ConfigError, match="found no finished run"):
        compared(tmp_path)
    finish(tmp_path / "tries", 10.0, "experiment=[cifar100/resnet56_resnet20,debug]", "distiller=at")
    finish(tmp_path / "tries", 10.0, "distiller=none", teacher=None)
    with pytest.raises(
        ConfigError, match=r"tries: .*; left out: 1 runs of experiment=debug, 1 networks trained alone"
    ):
        read(str(tmp_path / "tries"))
    run = finish(tmp_path, 97.0, "distiller=at")
    metrics = run.folder / "metrics.jsonl"
    first, _ = metrics.read_text().splitlines()
    metrics.write_text(first + "\n")
    with pytest.raises(RunError, match=f"{run.name}: found measurements up to epoch 1, expected 2"):
        read(str(tmp_path))
    (run.folder / "config.yaml").unlink()
    with pytest.raises(RunError, match=r"config.yaml: found no such file"):
        read(str(tmp_path))


def test_folders_and_mlflow_give_the_same(tmp_path, monkeypatch):
    folder, uri = tmp_path / "runs", f"sqlite:///{tmp_path}/mlflow.db"
    for distiller, mode, seed in (
        ("at", "fixed", 0),
        ("at", "fixed", 1),
        ("at", "adaptive", 0),
        ("sp", "fixed", 0),
    ):
        finish(folder, 90 + 10 / 3 * seed, f"distiller={distiller}", f"spot_mode={mode}", seed=seed)
    finish(folder, 99.0, "distiller=none", teacher=None)
    finish(folder, 0.0, config=prerequisites(composed("distiller=ft")).pretraining)
    (finish(folder, 50.0, "distiller=vid").folder / "result.json").unlink()
    for config in folder.glob("*/config.yaml"):
        finished = (config.parent / "result.json").exists()
        experiment = "sakd" if "seed0" in config.parent.name else "another"
        Mirror(config.parent, uri, experiment).close("FINISHED" if finished else "KILLED")
    assert set(map(type, synchronise_all(folder).values())) == {int}
    assert read(uri) == read(str(folder))
    assert len(read(uri)) == 4
    both = read(uri, str(folder))
    assert both == read(str(folder), uri)
    assert [(run.name, run.metrics, run.student_sha256) for run in both] == [
        (run.name, run.metrics, run.student_sha256) for run in read(uri)
    ]
    before = (tmp_path / "mlflow.db").read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for source in (uri, "mlflow"):
        for option in ("--keep", "--output"):
            told = command("--from", folder, "--from", source, option, folder / "../mlflow.db", expect=1)
            assert "as in --from; expected a file of its own" in told
    assert (tmp_path / "mlflow.db").read_bytes() == before
    for form in ("terminal", "json"):
        assert command("--from", "mlflow", "--format", form, "--runs") == command(
            "--from", folder, "--format", form, "--runs"
        )


# A file of runs


def test_a_file_of_runs_gives_the_table_that_their_folders_gave(tmp_path):
    """Beside it what it is made from: every key and measurement, but for where things lie."""
    folder, file, again = (tmp_path / name for name in ("runs", "kept.json", "again.json"))
    finish_all(folder, FIXED, "distiller=at", "spot_mode=fixed", measured={"kept/stage1": 1.0})
    finish_all(
        folder,
        ADAPTIVE,
        "distiller=at",
        measured={"kept/stage1": 0.25, "loss/at": math.nan, "loss/kd": -math.inf},
    )
    finish_all(folder, ANTI, "distiller=at", "spot_mode=anti", commit="e" * 40)
    table = command("--from", folder, "--keep", file, "--format", "json", "--runs")
    for form in FORMATS:
        told = command("--from", folder, "--format", form, "--runs", "--cost")
        assert command("--from", file, "--format", form, "--runs", "--cost") == told
    assert command("--from", file, "--keep", again, "--format", "json", "--runs") == table
    assert again.read_bytes() == file.read_bytes()
    few = ("seed=0,1", "spot_mode=fixed,anti")
    assert command("--from", file, *few) == command("--from", folder, *few)
    content = json.loads(file.read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    assert len(content["runs"]) == len(list(folder.iterdir()))
    for kept, found in zip(read(str(file)), read(str(folder)), strict=True):
        places = found.facts.keys() - kept.facts.keys()
        assert places
        assert all(
            key.startswith(("runs", "tracking", "dataset.root")) or "checkpoint" in key for key in places
        )
        assert kept.facts == {key: value for key, value in found.facts.items() if key not in places}
        assert kept.metrics == pytest.approx(found.metrics, rel=0, abs=0, nan_ok=True)
        assert (kept.name, kept.student_sha256, kept.commit) == (
            found.name,
            found.student_sha256,
            found.commit,
        )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("97.25", "98.25"), "found checksum .* it is damaged or was changed"),
        (
            lambda text: re.sub('"sha256": "[0-9a-f]{64}"}\n$', '"more": 1}', text),
            "found no sha256, expected its checksum",
        ),
        (lambda text: text[:-20], "found no valid JSON"),
        (lambda _: "[]", "found list, expected a JSON object"),
        (lambda _: sealed({}), "found no shared, expected a file that `sakd compare --keep` wrote"),
        (lambda _: sealed({"shared": {}, "runs": 3}), ".*; expected a file that"),
        (lambda _: sealed({"shared": {}, "runs": [{"facts": {}}]}), r"runs\.0\.name: found .*required"),
        (
            lambda _: sealed({"shared": {"a": 3}, "runs": [{"facts": {}, "name": "b"}]}),
            r"runs\.0\.facts\.a: found 3; .*string",
        ),
        (
            lambda text: sealed(json.loads(text), without="teacher.sha256"),
            r"[\w-]+: found no teacher.sha256, expected",
        ),
    ],
)
def test_a_file_of_runs_that_was_changed_is_refused(change, told, tmp_path):
    file = tmp_path / "kept.json"
    finish_all(tmp_path / "runs", FIXED, "distiller=at", "spot_mode=fixed")
    command("--from", tmp_path / "runs", "--keep", file)
    file.write_text(change(file.read_text()))
    with pytest.raises(RunError, match=rf"kept\.json: {told}"):
        read(str(file))


def test_runs_of_several_sources_are_one_table_and_a_result_that_two_have_counts_once(tmp_path):
    """Folders of two machines, and a file of one of them."""
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    file, again = tmp_path / "kept.json", tmp_path / "again.json"
    changes = {"student.checkpoint": str(tmp_path / "weights.pt"), "dataset.root": "elsewhere"}
    (tmp_path / "weights.pt").write_bytes(b"weights")
    for folder, seeds in ((whole, range(3)), (first, (0, 1)), (second, (1, 2))):
        for mode, accuracies in (("fixed", FIXED), ("adaptive", ADAPTIVE)):
            for seed in seeds:
                finish(
                    folder, accuracies[seed], "distiller=at", f"spot_mode={mode}", seed=seed, changes=changes
                )
    command("--from", first, "--keep", file)
    table = command("--from", whole, "--format", "json", "--runs")
    for sources in ((first, second), (second, first), (second, file), (file, second), (first, file, second)):
        named = [word for source in sources for word in ("--from", source)]
        assert command(*named, "--format", "json", "--runs") == table
    command("--from", file, "--from", second, "--keep", again)
    assert command("--from", again, "--format", "json", "--runs") == table
    assert len(json.loads(again.read_text())["runs"]) == 6
    told = command("--from", first, "--from", file, "--keep", file, expect=1)
    assert f"--keep: found '{file}', as in --from" in told


def test_costs_are_known_of_a_result_if_one_of_its_sources_knows_them(tmp_path):
    for folder in ("first", "second"):
        finish(tmp_path / folder, 90.0, "distiller=at")
    cost = {"student": {"parameters": 1234, "multiply_adds": 56}}
    (path,) = (tmp_path / "second").glob("*/result.json")
    result = json.loads(path.read_text()) | {"cost": cost}
    del result["sha256"]
    path.write_text(json.dumps(result))
    for names in (("first", "second"), ("second", "first")):
        (run,) = read(*(str(tmp_path / name) for name in names))
        assert run.cost == cost


def test_runs_of_several_sources_have_nothing_of_one_machine(tmp_path):
    """Neither what a file leaves out, nor the folders around an image folder's own."""
    for machine, seed in (("mine", 0), ("theirs", 1)):
        changes = {"dataset.train": f"/{machine}/train", "dataset.root": f"/{machine}"}
        finish(tmp_path / machine, 90.0, "distiller=at", "dataset=image_folder", seed=seed, changes=changes)
    mine, theirs, file = tmp_path / "mine", tmp_path / "theirs", tmp_path / "kept.json"
    command("--from", mine, "--keep", file)
    table = command("--from", mine, "--from", theirs, "--format", "json", "--runs")
    assert command("--from", file, "--from", theirs, "--format", "json", "--runs") == table
    assert "dataset.root: no such key" in command(
        "--from", file, "--from", theirs, "dataset.root=/mine", expect=1
    )


@pytest.mark.parametrize("sources", [("",), ("first", "")])
def test_no_source_is_no_folder(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish(tmp_path / "first", 90.0, "distiller=at")
    told = command(*(word for source in sources for word in ("--from", source)), expect=1)
    assert "--from: found '', expected a folder of runs" in told


def test_two_results_of_one_run_in_two_sources_are_an_error(tmp_path):
    for folder, accuracy in (("first", 96.0), ("second", 97.0)):
        finish(tmp_path / folder, accuracy, "distiller=at")
    told = command("--from", tmp_path / "first", "--from", tmp_path / "second", expect=1)
    assert "found two results of one configuration and seed" in told


def sealed(content: dict, without: str = "") -> str:
    content.pop("sha256", None)
    content.get("shared", {}).pop(without, None)
    return json.dumps(with_checksum(content))


def test_a_file_of_runs_says_nothing_of_the_machine(tmp_path):
    """But for the last part of a path that is an image folder's own key."""
    file, secret = tmp_path / "kept.json", "http://me:pass@host/x"
    changes = {
        "dataset.train": f"{tmp_path}/mine/train",
        "dataset.root": "~/images",
        "distiller.reference": secret,
    }
    finish(tmp_path / "runs", 90.0, "distiller=at", "dataset=image_folder", changes=changes)
    command("--from", tmp_path / "runs", "--keep", file)
    assert str(tmp_path) not in file.read_text()
    assert "~" not in file.read_text()
    assert "pass" not in file.read_text()
    (kept,) = read(str(file))
    assert kept.facts["dataset.train"] == "train"


def test_no_output_takes_the_place_of_another_or_of_what_is_no_file(tmp_path):
    finish_all(tmp_path / "runs", FIXED, "distiller=at", "spot_mode=fixed")
    file, pipe = tmp_path / "kept.json", tmp_path / "pipe"
    os.mkfifo(pipe)
    command("--from", tmp_path / "runs", "--keep", file)
    before = file.read_bytes()
    for arguments, told in (
        (
            ("--from", file, "--keep", file),
            f"--keep: found '{file}', as in --from; expected a file of its own",
        ),
        (("--from", file, "--output", tmp_path / "." / "kept.json"), "as in --from"),
        (("--keep", tmp_path / "a", "--output", tmp_path / "a"), "--output: found"),
        (("--keep", pipe), f"--keep: found '{pipe}', expected the name of a file"),
        (("--output", pipe), "--output: found"),
        (("--keep", ""), "--keep: found '.', expected the name of a file"),
        (("--keep", tmp_path / "no" / "a"), "--keep: found no folder"),
    ):
        assert told in command(*(() if "--from" in arguments else ("--from", file)), *arguments, expect=1)
    assert file.read_bytes() == before
    assert pipe.is_fifo()


@pytest.mark.parametrize(("file", "groups"), [("cifar100_budget.json", 5), ("cifar100_other.json", 4)])
def test_the_results_page_has_the_figures_of_the_runs_that_lie_beside_it(file, groups):
    """Each mode's mean, deviation and interval, as its table has them."""
    page = (ROOT / "results/cifar100.md").read_text()
    comparison = compared(ROOT / "results" / file, metric="test/accuracy")
    assert len(comparison.groups) == groups
    for group in comparison.groups.itertuples():
        told = f"| {group.mean:.2f} ± {group.std:.2f} |"
        if group.spot_mode != "fixed":
            told += f" {group.difference:+.2f}, {group.low:+.2f} to {group.high:+.2f} |"
        assert told.replace("-", MINUS) in page, group.spot_mode


# Published figures


def test_published_figures_stand_beside_ours(tmp_path):
    pair = {"dataset.name": "cifar100", "teacher.name": "resnet56", "student.name": "resnet20"}
    for mode in ("fixed", "adaptive"):
        finish(tmp_path, 70.0, "distiller=at", f"spot_mode={mode}", changes=pair)
        finish(tmp_path, 50.0, "distiller=at", f"spot_mode={mode}", changes=pair | {"distiller.name": "dist"})
    comparison = compared(tmp_path)
    rows = [row for row in csv.reader(FIGURES.read_text().splitlines()) if row[1:4] == [*pair.values()]]
    by_hand = {(row[4], row[5], row[0]): float(row[6]) for row in rows}
    for mode in ("fixed", "adaptive"):
        assert group(comparison, "at", mode)["published sakd-readme"] == by_hand["at", mode, "sakd-readme"]
    assert (
        group(comparison, "at", "fixed")["published repdistiller"] == by_hand["at", "fixed", "repdistiller"]
    )
    assert np.isnan(group(comparison, "dist", "fixed")["published sakd-readme"])
    (note,) = [note for note in comparison.notes if "the teacher has" in note]
    assert "the teacher has 98.50 %" in note
    assert "sakd-readme has the teacher alone at 72.34 % and the student alone at 69.06 %" in note
    shown = command("--from", tmp_path)
    assert "published fixed, sakd-readme" in shown
    assert f"{by_hand['at', 'adaptive', 'sakd-readme']:.2f}" in shown
    assert "published" not in command("--from", tmp_path, "--metric", "loss/task").lower()


def test_published_names_are_the_projects():
    figures = read_published(FIGURES)
    assert len(figures) == 531
    networks = {path.stem for path in (ROOT / "conf/network").glob("*.yaml")}
    distillers = {path.stem for path in (ROOT / "conf/distiller").glob("*.yaml")} | {"teacher", "student"}
    assert {*figures["teacher"], *figures["student"]} <= networks
    assert {*figures["distiller"]} - distillers == {"ab"}  # not in the project
    assert {*figures["dataset"]} <= {path.stem for path in (ROOT / "conf/dataset").glob("*.yaml")}
    assert "MobileNetV2_half" in {*figures["student"]}


def test_published_figures_of_ones_own(three, tmp_path):
    own = tmp_path / "own.csv"
    own.write_text(
        "source,dataset,teacher,student,row,mode,top1\nours,digits,wrn_16_2,resnet8,at,fixed,96.125\n"
    )
    assert "96.12" in command("--from", three, "--published", own)
    own.write_text("source,dataset,teacher,student,row,mode,top5\nours,digits,wrn_16_2,resnet8,at,fixed,99\n")
    with pytest.raises(DataError, match="top5, expected source, dataset"):
        read_published(own)
    line = "ours,digits,wrn_16_2,resnet8,at,fixed,"
    own.write_text(f"source,dataset,teacher,student,row,mode,top1\n{line}96\n{line}97\n")
    with pytest.raises(DataError, match="found two figures for ours, digits, wrn_16_2, resnet8, at, fixed"):
        read_published(own)
    own.write_text(f"source,dataset,teacher,student,row,mode,top1\n{line}good\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_published(own)


# Formats


def test_csv_and_json_parse_back_to_the_same_groups(three):
    comparison = compared(three)
    lines = list(csv.DictReader(io.StringIO(command("--from", three, "--format", "csv", "--runs"))))
    content = json.loads(command("--from", three, "--format", "json", "--runs"))
    assert len(lines) == len(content["groups"]) == len(comparison.groups)
    for line, stored, (_, known) in zip(lines, content["groups"], comparison.groups.iterrows(), strict=True):
        assert line["metric"] == content["metric"] == "test/accuracy"
        for key, value in known.items():
            if value != value:  # not a number
                assert (line[key], stored[key]) == ("", None), key
            else:
                assert stored[key] == value, key
                assert type(value)(line[key]) == value, key
        of_group = [
            run
            for run in content["runs"]
            if all(run[key] == stored[key] for key in ("distiller", "spot_mode"))
        ]
        assert line["runs"].split() == [run["run"] for run in of_group]
        assert len(of_group) == stored["n"]
    assert all((three / run["run"] / "result.json").exists() for run in content["runs"])
    assert content["notes"] == comparison.notes
    assert "runs" not in json.loads(command("--from", three, "--format", "json"))


def test_markdown_has_two_tables_and_notes(three):
    values, differences, notes = command("--from", three, "--format", "markdown").split("\n\n")
    for table, rows in ((values, 2), (differences, 3)):
        head, rule, *body = [line.strip("|").split("|") for line in table.splitlines()]
        assert {len(line) for line in (head, rule, *body)} == {len(head)}
        assert len(body) == rows
        assert set("".join(rule)) == {" ", "-"}
    assert all(line.startswith("- ") for line in notes.splitlines())
    assert "| at | 97.00 ± 0.40 (5) | 97.55 ± 0.57 (5) | 96.42 ± 0.38 (3 of 5) |" in values
    assert f"| at | adaptive | +0.55 | {MINUS}0.05 to +1.15 | {ABSENT} | 0.81 | 5 | " in differences
    assert differences.count(UNREACHABLE) == 3


def test_latex_is_whole_tables_with_everything_escaped(three):
    latex = command("--from", three, "--format", "latex", "--runs")
    code = "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    assert code.isascii()
    tables = re.findall(
        r"\\begin{tabular}{(l+)}\n\\toprule\n(.*?)\\midrule\n(.*?)\\bottomrule\n\\end{tabular}",
        code,
        re.DOTALL,
    )
    assert len(tables) == 2
    for columns, head, body in tables:
        for line in (head + body).splitlines():
            assert line.endswith(r" \\")
            assert line.count(" & ") == len(columns) - 1
    assert not re.search(r"(?<!\\)[%#_]", code)
    assert code.count("$") % 2 == 0
    assert r"97.00 $\pm$ 0.40 (5)" in code


def test_several_pairs_are_named_in_each_row(three, tmp_path):
    finish(tmp_path, 70.0, "distiller=at", "spot_mode=fixed", changes={"student.name": "vgg8"})
    finish(tmp_path, 71.0, "distiller=at", "spot_mode=adaptive", changes={"student.name": "resnet14"})
    shown = command("--from", tmp_path)
    assert re.search(r"digits +wrn_16_2 +vgg8 +at +70.00 \(1\) +missing", shown)
    assert (
        "Missing, seed 0: digits, wrn_16_2 to resnet14, at fixed; digits, wrn_16_2 to vgg8, at adaptive."
        in re.sub(r"\s+", " ", shown)
    )


def test_output_is_written_whole_or_not_at_all(three, tmp_path):
    output = tmp_path / "table.md"
    assert command("--from", three, "--format", "markdown", "--output", output) == ""
    assert output.read_text() == command("--from", three, "--format", "markdown")
    before = output.read_bytes()
    command("--from", three, "nonsense=1", "--output", output, expect=1)
    assert output.read_bytes() == before
    told = command("--from", three, "--output", tmp_path / "nowhere/table.md", expect=1)
    assert "--output: found no folder" in told
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_runs_are_named_on_demand(three):
    assert "-seed0-" not in command("--from", three)
    shown = command("--from", three, "--runs")
    assert (
        len(re.findall(r"^digits-wrn_16_2-resnet8-(?:at|sp)-\w+-seed\d-\w+: 9\d\.\d\d$", shown, re.MULTILINE))
        == 23
    )


# The plot


def test_the_plot_has_an_interval_for_each_difference_and_a_panel_for_each_pair(three, tmp_path):
    folder = tmp_path / "runs"
    lengths = {"vgg8": 5, "resnet14": 3, "vgg11": 2, "resnet20": 2}
    for student, seeds in lengths.items():
        finish_all(
            folder, FIXED[:seeds], "distiller=at", "spot_mode=fixed", changes={"student.name": student}
        )
        finish_all(
            folder, ADAPTIVE[:seeds], "distiller=at", "spot_mode=adaptive", changes={"student.name": student}
        )
    finish(
        folder, 97.0, "distiller=at", "spot_mode=anti", changes={"student.name": "vgg8"}
    )  # one seed: a point
    command("--from", folder, "--plot", tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    ElementTree.fromstring(svg)
    pair = "wrn_16_2"
    drawn = {f"{pair}-{student}-at-adaptive" for student in lengths}
    assert {*re.findall(r'id="interval-([^"]*)"', svg)} == drawn
    assert {*re.findall(r'id="difference-([^"]*)"', svg)} == drawn | {f"{pair}-vgg8-at-anti"}
    assert svg.count('id="axes_') == 4
    for label in ("n = 5", "n = 3", "n = 1", "digits: wrn_16_2 → vgg8"):
        assert f"<!-- {label} -->" in svg


def test_a_png_is_one_and_other_files_are_refused(three, tmp_path):
    command("--from", three, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "ends in .svg or .png" in command("--from", "nowhere", "--plot", tmp_path / "plot.pdf", expect=1)
    told = command("--from", three, "spot_mode=fixed", "--plot", tmp_path / "none.svg", expect=1)
    assert "found no mode with a seed in common with fixed" in told
    assert not (tmp_path / "none.svg").exists()


@pytest.mark.slow
def test_a_thousand_runs_are_compared_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)  # a thousand runs are otherwise finished one by one
    draw = np.random.default_rng(0).normal
    for distiller in ("fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "nst", "dkd", "dist"):
        for mode in ("fixed", "adaptive", "anti", "random"):
            finish_all(
                tmp_path / "runs", draw(97, 0.3, 25).tolist(), f"distiller={distiller}", f"spot_mode={mode}"
            )
    start = time.monotonic()
    shown = command("--from", tmp_path / "runs", "--plot", tmp_path / "plot.svg")
    assert time.monotonic() - start < 20
    assert shown.count("(25)") == 40
