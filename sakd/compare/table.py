"""The comparison itself: a line for each group.

A group is runs alike but for the seed: one data set, pair, distiller and spot mode.
"""

import itertools
import json
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import pandas as pd

from sakd.compare import published
from sakd.compare.described import ABSENT, Finished
from sakd.compare.statistics import (
    LEVEL,
    POWER,
    Paired,
    holm,
    least_signed_rank,
    paired,
    pairs_needed,
    pairs_to_show,
)
from sakd.configuration import NOT_IDENTITY
from sakd.errors import ConfigError, did_you_mean
from sakd.names import BEST

PAIR = ["dataset", "teacher", "student"]
ROW = [*PAIR, "distiller"]
GROUP = [*ROW, "spot_mode"]
BASELINE = "fixed"
KEPT = "kept/"  # measurements: the share distilled at a spot
ALL = 99.9  # percent: a mode that keeps as much is, in effect, the baseline
RATES = "spot_mode.p."  # by spot, as a control takes them from another run of its seed
MAKES_TEACHER = "teacher.training"
PROMISED = 0.3  # points of accuracy: the mean of 149 published differences, adaptive to fixed, is 0.31
LISTED = 12  # groups in a note; the tables have them all
MODES = (BASELINE, "adaptive", "anti", "random")  # and then others, by name


@dataclass(frozen=True)
class Comparison:
    """Tables and notes of a comparison.

    ``groups`` has a line for each, also for those that nothing is known of; ``runs`` a line for each run and
    its value; ``missing``, the seeds that groups lack. ``commits``: of the code, with the number of runs that
    each made. ``notes``: how to read it, and what should be known of it. ``costs`` has a line for each
    network, where they were asked for.
    """

    metric: str
    groups: pd.DataFrame
    runs: pd.DataFrame
    missing: pd.DataFrame
    commits: dict[str, int]
    notes: list[str]
    costs: list[dict[str, str | int | None]]


def compare(
    runs: Sequence[Finished],
    metric: str,
    figures: pd.DataFrame,
    expected: Iterable[Mapping[str, str]] | None = None,
    with_costs: bool = False,
) -> Comparison:
    """Compare ``runs`` by the last epoch's ``metric``, beside published ``figures``.

    ``expected``: the runs that there should be, as `sakd.configuration.short_names` has them; by default all
    distillers in all modes with all seeds for each pair, as far as they are among the runs. ``with_costs``:
    also what networks cost.

    Raises ConfigError where runs of a group, or of a row but for its spot mode, differ in more than the seed.
    """
    if not runs:
        raise ConfigError("found no finished run to compare, expected some; `python launch.py` makes them")
    metrics = {name for run in runs for name in run.metrics}
    if metric not in metrics:
        raise ConfigError(
            f"--metric: found {metric!r}, expected what the runs measured.{did_you_mean(metric, metrics)}"
        )
    for row, members in _grouped(runs, ROW):
        _check_agreement(members, _called(row), besides="spot_mode")
        for group, alike in _grouped(members, GROUP):
            _check_agreement(alike, _called(group))
    runs = _once(runs)
    measured = _frame([run for run in runs if metric in run.metrics], metric)
    wanted = _wanted(measured, expected)
    groups = _groups(measured, wanted)
    missing = wanted.merge(measured, how="left", on=[*GROUP, "seed"])
    missing = missing[missing["value"].isna()][[*GROUP, "seed"]].reset_index(drop=True)
    shown = figures if metric in published.METRICS else figures.iloc[:0]
    groups = _beside(groups, shown)
    commits = Counter(run.commit or "unknown" for run in runs if metric in run.metrics)
    notes = [
        *_reading(groups, metric),
        *_missing(missing),
        *_doubts(runs, metric),
        *_made_by(commits),
        *_baselines(runs, groups, shown),
    ]
    costs = _costs(runs if with_costs else [])
    if with_costs and (unknown := len(runs) - sum(bool(run.cost) for run in runs)):
        notes.append(f"Of {unknown} runs no costs are known: of an earlier version, or from a store.")
    return Comparison(metric, groups, measured, missing, dict(commits), notes, costs)


COSTS = ["dataset", "network", "as", "parameters", "multiply_adds"]


def _costs(runs: Iterable[Finished]) -> list[dict[str, str | int | None]]:
    """What the networks of runs cost, each once for a data set; the dearest first."""
    lines = {
        (run.facts["dataset"], run.facts[part], part, cost["parameters"], cost["multiply_adds"])
        for run in runs
        for part, cost in run.cost.items()
    }
    in_order = sorted(lines, key=lambda line: (line[0], -line[3], line[1:3]))
    return [dict(zip(COSTS, line, strict=True)) for line in in_order]


def _grouped(
    runs: Iterable[Finished], keys: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], list[Finished]]]:
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run.facts[key] for key in keys)].append(run)
    yield from groups.items()


def _called(names: Sequence[str]) -> str:
    dataset, teacher, student, *rest = names
    return " ".join([f"{dataset}, {teacher} to {student},", *rest]).rstrip(",")


def _differing(runs: Sequence[Finished], besides: str = "seed") -> dict[str, list[str]]:
    """Values by key, for keys whose values are not the same.

    Only keys count that a result depends on, but for the seed and ``besides``.
    """
    ignored = ("seed", besides, *NOT_IDENTITY)
    if len({run.facts["teacher.sha256"] for run in runs}) == 1:
        ignored += (MAKES_TEACHER,)  # the same teacher, whatever made it
    found = {}
    for key in sorted({key for run in runs for key in run.facts}):
        if not _is_below(key, ignored) and not key.startswith(RATES):
            values = list(dict.fromkeys(run.fact(key) for run in runs))
            if len(values) > 1:
                found[key] = values
    return found


def _is_below(key: str, nodes: Iterable[str]) -> bool:
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


def _check_agreement(runs: Sequence[Finished], called: str, besides: str = "seed") -> None:
    differing = list(_differing(runs, besides))
    if not differing:
        return
    keys = [key for key in differing if not _is_below(key, [MAKES_TEACHER])]  # its checksum tells
    recipes: dict[tuple[str, ...], list[Finished]] = defaultdict(list)
    for run in runs:
        recipes[tuple(run.fact(key) for key in keys)].append(run)
    told = [
        f"  {' '.join(_selecting(keys, recipe, recipes))}   {_some([run.name for run in members])}"
        for recipe, members in sorted(recipes.items(), key=lambda found: -len(found[1]))
    ]
    rest = [f"  … and {len(told) - LISTED} more"] if len(told) > LISTED else []
    allowed = "seed" if besides == "seed" else f"seed and {besides}"
    raise ConfigError(
        "\n".join(
            [
                f"{called}: found runs of {len(recipes)} recipes, expected one, but for {allowed}; "
                f"a filter chooses:",
                *told[:LISTED],
                *rest,
                f"They differ in {_first(differing)}.",
            ]
        )
    )


def _selecting(keys: Sequence[str], recipe: tuple[str, ...], recipes: Iterable[tuple[str, ...]]) -> list[str]:
    """Filters, as few as may be and simple ones, that ``recipe`` fits and no other of ``recipes``."""
    told = [f"{key}={'null' if value == ABSENT else value}" for key, value in zip(keys, recipe, strict=True)]
    simplest_first = sorted(
        range(len(keys)), key=lambda place: (shlex.quote(told[place]) != told[place], len(told[place]))
    )
    filters, others = [], [other for other in recipes if other != recipe]
    while others:
        apart = Counter(
            place for other in others for place in simplest_first if other[place] != recipe[place]
        )
        best = max(simplest_first, key=apart.__getitem__)
        filters.append(shlex.quote(told[best]))
        others = [other for other in others if other[best] == recipe[best]]
    return filters


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _first(words: Sequence[str]) -> str:
    return ", ".join(words[:LISTED]) + (f" and {len(words) - LISTED} more" if len(words) > LISTED else "")


def _once(runs: Iterable[Finished]) -> list[Finished]:
    """One run for each group and seed: the same result found twice counts once.

    Raises ConfigError for two results.
    """
    found: dict[tuple[str, ...], Finished] = {}
    for run in runs:
        key = tuple(run.facts[name] for name in (*GROUP, "seed"))
        other = found.setdefault(key, run)
        if other.student_sha256 != run.student_sha256:
            raise ConfigError(
                f"{_called(key)}: found two results of one configuration and seed, {other.name} with "
                f"checksum {other.student_sha256} and {run.name} with {run.student_sha256}, expected one; "
                "move one away"
            )
    return list(found.values())


def _frame(runs: Iterable[Finished], metric: str) -> pd.DataFrame:
    lines = [
        {key: run.facts[key] for key in GROUP}
        | {"seed": int(run.facts["seed"]), "value": run.metrics[metric], "run": run.name}
        | {"kept": _least_kept(run)}
        for run in runs
    ]
    return pd.DataFrame(lines).sort_values([*GROUP, "seed"], key=_rank, ignore_index=True)


def _least_kept(run: Finished) -> float:
    """Percent that were distilled in the last epoch at the spot with the least; NaN where it is not known."""
    return min(
        (100 * share for name, share in run.metrics.items() if name.startswith(KEPT)), default=math.nan
    )


def ordered(modes: Iterable[str]) -> list[str]:
    """Spot modes, each once, as they are usually read."""
    return sorted({*modes}, key=lambda mode: (MODES.index(mode) if mode in MODES else len(MODES), mode))


def _rank(column: pd.Series) -> pd.Series:
    return column.map(ordered(column).index) if column.name == "spot_mode" else column


def _wanted(measured: pd.DataFrame, expected: Iterable[Mapping[str, str]] | None) -> pd.DataFrame:
    """The groups and seeds that there should be."""
    if expected is None:
        pairs = measured[PAIR].drop_duplicates().itertuples(index=False)
        rest = (measured[key].unique() for key in ("distiller", "spot_mode", "seed"))
        wanted = [(*pair, *names) for pair, *names in itertools.product(pairs, *rest)]
    else:
        wanted = [(*(names[key] for key in GROUP), int(names["seed"])) for names in expected]
    wanted = pd.DataFrame(wanted, columns=[*GROUP, "seed"]).drop_duplicates()
    return wanted.sort_values([*GROUP, "seed"], key=_rank, ignore_index=True)


def _groups(measured: pd.DataFrame, wanted: pd.DataFrame) -> pd.DataFrame:
    """Mean, sample standard deviation and number of each group, and its difference to the baseline.

    Beside the difference stands what the tests say.
    """
    all_of = pd.concat([wanted, measured[[*GROUP, "seed"]]]).drop_duplicates().groupby(GROUP)["seed"].count()
    summary = measured.groupby(GROUP)["value"].agg(["mean", "std", "count"])
    groups = summary.reindex(all_of.index)
    groups["n"], groups["expected"] = groups.pop("count").fillna(0).astype(int), all_of
    groups["least_kept"] = measured.groupby(GROUP)["kept"].min()
    by_seed = {group: lines.set_index("seed")["value"] for group, lines in measured.groupby(GROUP)}
    differences = []
    for *row, mode in by_seed:
        values, baseline = by_seed[(*row, mode)], by_seed.get((*row, BASELINE), {})
        seeds = [seed for seed in values.index if seed in baseline]
        if mode != BASELINE and seeds:
            differences.append((*row, mode, *astuple(paired(values[seeds], baseline[seeds]))))
    measures = [field.name for field in fields(Paired)]
    differences = pd.DataFrame(differences, columns=[*GROUP, *measures]).astype(
        dict.fromkeys(measures, float)
    )
    groups = groups.reset_index().merge(differences, how="left", on=GROUP)
    groups["pairs"] = groups["pairs"].fillna(0).astype(int)
    groups["t_p_holm"], groups["wilcoxon_p_holm"] = holm(groups["t_p"]), holm(groups["wilcoxon_p"])
    groups["wilcoxon_least_p_holm"] = holm(
        least_signed_rank(groups["pairs"]).where(groups["wilcoxon_p"].notna())
    )
    return groups.sort_values(GROUP, key=_rank, ignore_index=True)


def _beside(groups: pd.DataFrame, figures: pd.DataFrame) -> pd.DataFrame:
    """Add a column for each source that has a figure for one of the groups."""
    for source, of_source in figures.groupby("source", sort=False):
        column = of_source[[*GROUP, "top1"]].rename(columns={"top1": f"published {source}"})
        joined = groups.merge(column, how="left", on=GROUP)
        if joined[f"published {source}"].notna().any():
            groups = joined
    return groups


def _reading(groups: pd.DataFrame, metric: str) -> Iterator[str]:
    pairs = list(groups[PAIR].drop_duplicates().itertuples(index=False, name=None))
    where = f" for {_called(pairs[0])}" if len(pairs) == 1 else ""
    spread = "mean \N{PLUS-MINUS SIGN} sample standard deviation (number of seeds)"
    yield f"{metric} at the last epoch{where}: {spread}."
    tested = groups[groups["pairs"] > 0]
    if tested.empty:
        yield f"No mode has a seed in common with {BASELINE}: no differences."
        return
    t_tests, tests = tested[["t_p", "wilcoxon_p"]].notna().sum()
    yield (
        f"Differences to {BASELINE} are paired by seed; their {1 - LEVEL:.0%} t intervals hold for each by "
        "itself. The p values are two-sided and Holm-corrected over all differences here, in all rows and "
        f"modes: {t_tests} paired t-tests, {tests} Wilcoxon signed-rank tests."
    )
    yield from _power(tested, metric)
    if tested["least_kept"].notna().any():
        yield "Least kept: percent distilled in the last epoch, at the spot and seed with the least."
    as_baseline = tested[tested["least_kept"] >= ALL]
    if len(as_baseline):
        told = _listed(as_baseline)
        yield f"In effect {BASELINE}, with {ALL} % or more kept everywhere in the end: {told}."
    alone = tested[tested["pairs"] == 1]
    if len(alone):
        yield f"With one pair of seeds there is neither an interval nor a test: {_listed(alone)}."
    constant = tested[(tested["pairs"] > 1) & tested["t_p"].isna()]
    if len(constant):
        yield f"Differences that are all the same have neither an interval nor a t-test: {_listed(constant)}."
    unreachable = tested[tested["wilcoxon_least_p_holm"] > LEVEL]
    if len(unreachable):
        least = "; ".join(
            f"with {n} pairs {least_signed_rank(n):.3g}, corrected {alike.max():.3g}"
            for n, alike in unreachable.groupby("pairs")["wilcoxon_least_p_holm"]
        )
        yield (
            f"\N{DAGGER} Wilcoxon's test cannot reach {LEVEL} here, whatever the differences. Its smallest "
            f"possible p: {least}. It takes {pairs_needed(tests)} pairs for each of {tests} differences, "
            f"{pairs_needed(1)} for one alone."
        )


def _power(tested: pd.DataFrame, metric: str) -> Iterator[str]:
    """What differences could have been seen at all."""
    spread = tested[tested["could_show"].notna()]
    if spread.empty:
        return
    told = (
        f"Could show: the smallest difference that a t-test of so many pairs, alone, finds with {POWER:.0%} "
        "probability, at the spread seen here; what is smaller may be there and not be seen."
    )
    if metric.endswith("accuracy"):
        needed = sorted(pairs_to_show(PROMISED, deviation) for deviation in spread["deviation"])
        most = f" to {needed[-1]} (half of them at most {needed[(len(needed) - 1) // 2]})"
        told += f" To show {PROMISED} points takes {needed[0]}{most * (len(needed) > 1)} seeds."
    yield told


def _listed(groups: pd.DataFrame) -> str:
    """Names that tell groups apart; the first few."""
    names = groups[GROUP].drop_duplicates()
    several = len(names[PAIR].drop_duplicates()) > 1
    told = [
        _called(name) if several else " ".join(name[len(PAIR) :])
        for name in names.itertuples(index=False, name=None)
    ]
    return "; ".join(told[:LISTED]) + (f"; and {len(told) - LISTED} more" if len(told) > LISTED else "")


def mean_rate(text: str) -> float:
    """A rate as a fact has it, or the mean of all epochs'; of a list that MLflow cut off, of what is left."""
    cut = text.startswith("[") and not text.endswith("]")
    return float(np.mean(json.loads(f"{text.rpartition(',')[0]}]" if cut else text)))


def _missing(missing: pd.DataFrame) -> Iterator[str]:
    for seeds, alike in missing.groupby(
        missing.groupby(GROUP)["seed"].transform(lambda seeds: ", ".join(map(str, seeds)))
    ):
        yield f"Missing, seed {seeds}: {_listed(alike)}."


def _doubts(runs: Sequence[Finished], metric: str) -> Iterator[str]:
    """Notes of what does not forbid a comparison and should be known."""
    without = [run.name for run in runs if metric not in run.metrics]
    if without:
        yield f"Left out, as they have no {metric}: {', '.join(without)}."
    for group, alike in _grouped(runs, GROUP):
        rates = {
            key: sorted({mean_rate(run.fact(key)) for run in alike})
            for key in alike[0].facts
            if key.startswith(RATES)
        }
        told = [
            f"{key.removeprefix(RATES)} {values[0]:.1%} to {values[-1]:.1%}"
            for key, values in rates.items()
            if f"{values[0]:.1%}" != f"{values[-1]:.1%}"
        ]
        if told:
            yield f"The rates of {_called(group)} are each seed's own: {', '.join(told)}."
    for pair, members in _grouped(runs, PAIR):
        rows = [alike[0] for _, alike in _grouped(members, ROW)]
        for key, values in _differing(rows, besides="spot_mode").items():
            if key.partition(".")[0] != "distiller":
                by_value = {
                    value: [run.facts["distiller"] for run in rows if run.fact(key) == value]
                    for value in values
                }
                told = "; ".join(f"{value} for {', '.join(names)}" for value, names in by_value.items())
                yield f"The distillers of {_called(pair)} do not share {key}: {told}."


def _made_by(commits: Mapping[str, int]) -> Iterator[str]:
    if len(commits) > 1:
        counted = ", ".join(
            f"{commit[:12]} ({count} {'run' if count == 1 else 'runs'})" for commit, count in commits.items()
        )
        yield f"Made by different code: commits {counted}."


def _baselines(runs: Sequence[Finished], groups: pd.DataFrame, figures: pd.DataFrame) -> Iterator[str]:
    """Notes of what the teachers, and the students alone, reach."""
    for pair, members in _grouped(runs, PAIR):
        accuracies = sorted(
            {f"{run.metrics['teacher/accuracy']:.2f}" for run in members if "teacher/accuracy" in run.metrics}
        )
        alone = figures[(figures[PAIR] == list(pair)).all(axis=1) & (figures["spot_mode"] == "none")]
        told = [f"the teacher has {' and '.join(accuracies)} %"] if accuracies else []
        for source, lines in alone.groupby("source", sort=False):
            networks = [f"the {line.distiller} alone at {line.top1:.2f} %" for line in lines.itertuples()]
            told.append(f"{source} has {' and '.join(networks)}")
        if told:
            yield f"{_called(pair)}: {'; '.join(told)}."
    if any(column.startswith("published") for column in groups):
        yield (
            f"Published figures are percent on the test images at the best epoch, of one run: compare {BEST}."
        )
