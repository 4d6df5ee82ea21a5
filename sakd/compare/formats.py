"""A comparison as text.

For a terminal, Markdown and LaTeX it is two tables and notes, for programs CSV and JSON.
"""

import io
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from sakd.compare.statistics import LEVEL
from sakd.compare.table import BASELINE, GROUP, PAIR, ROW, Comparison, ordered

ABSENT, MINUS, UNREACHABLE = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{DAGGER}"
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
    }
    | {"\N{PLUS-MINUS SIGN}": r"$\pm$", MINUS: "$-$", UNREACHABLE: r"$^\dagger$", ABSENT: "--"}
)

WIDTH = 160  # of a page that is no terminal

Lines = list[list[str]]  # the first is the head


def terminal(comparison: Comparison, with_runs: bool = False) -> str:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    for head, *body in tables(comparison):
        table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for line in body:
            table.add_row(*line)
        console.print(table, "", markup=False)
    for note in _below(comparison, with_runs):
        console.print(note, markup=False)
    return console.file.getvalue()


def markdown(comparison: Comparison, with_runs: bool = False) -> str:
    parts = []
    for head, *body in tables(comparison):
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *body]))
    notes = "".join(f"- {note}\n" for note in _below(comparison, with_runs))
    return "\n".join([*parts, notes])


def latex(comparison: Comparison, with_runs: bool = False) -> str:
    """Write LaTeX, which needs the package booktabs; notes are comments."""
    parts = []
    for head, *body in tables(comparison):
        head, *body = ([text.translate(LATEX) for text in line] for line in [head, *body])
        rows = "".join(f"{' & '.join(line)} \\\\\n" for line in body)
        parts.append(
            f"\\begin{{tabular}}{{{'l' * len(head)}}}\n\\toprule\n{' & '.join(head)} \\\\\n\\midrule\n"
            f"{rows}\\bottomrule\n\\end{{tabular}}\n"
        )
    notes = "".join(f"% {note}\n" for note in _below(comparison, with_runs))
    return "\n".join([*parts, notes])


def csv(comparison: Comparison, with_runs: bool = False) -> str:
    groups = comparison.groups.assign(metric=comparison.metric)
    if with_runs:
        names = comparison.runs.groupby(GROUP)["run"].agg(" ".join).rename("runs").reset_index()
        groups = groups.merge(names, how="left", on=GROUP)
    return groups.to_csv(index=False)


def as_json(comparison: Comparison, with_runs: bool = False) -> str:
    content = {
        "metric": comparison.metric,
        "groups": _records(comparison.groups),
        "missing": _records(comparison.missing),
        "commits": comparison.commits,
    }
    if with_runs:
        content["runs"] = _records(comparison.runs)
    if comparison.costs:
        content["costs"] = comparison.costs
    return json.dumps(content | {"notes": comparison.notes}, indent=2, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[..., str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "latex": latex,
    "csv": csv,
    "json": as_json,
}


def _records(frame: pd.DataFrame) -> list[dict[str, object]]:
    """List the rows, with NaN as null."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def tables(comparison: Comparison) -> Iterator[Lines]:
    """Tables of the values by spot mode, beside published ones, and of differences and costs, if there are
    any."""
    groups = comparison.groups
    named = ROW if len(groups[PAIR].drop_duplicates()) > 1 else ["distiller"]
    show = _number(comparison.metric)
    modes = ordered(groups["spot_mode"])
    figures = [
        (column, mode)
        for column in groups
        if column.startswith("published ")
        for mode in modes
        if groups.loc[groups["spot_mode"] == mode, column].notna().any()
    ]
    values: Lines = [
        [*named, *modes, *(f"{column.replace(' ', f' {mode}, ', 1)}" for column, mode in figures)]
    ]
    for _, row in groups.groupby(ROW, sort=False):
        by_mode = row.set_index("spot_mode")
        line = [_mean(by_mode.loc[mode], show) if mode in by_mode.index else ABSENT for mode in modes]
        line += [_or_absent(by_mode[column].get(mode, math.nan), show) for column, mode in figures]
        values.append([*row.iloc[0][named], *line])
    yield values
    compared = groups[groups["pairs"] > 0]
    if len(compared):
        head = [
            f"difference to {BASELINE}",
            f"{1 - LEVEL:.0%} interval",
            "least kept",
            "could show",
            "pairs",
            "p (t)",
            "p (Wilcoxon)",
        ]
        lines = (
            [*group[[*named, "spot_mode"]], *_difference(group, show)] for _, group in compared.iterrows()
        )
        yield [[*named, "spot mode", *head], *lines]
    if comparison.costs:
        lines = [[_counted(value) for value in line.values()] for line in comparison.costs]
        yield [["dataset", "network", "as", "parameters", "multiply-adds"], *lines]


def _counted(value: str | int | None) -> str:
    return ABSENT if value is None else value if isinstance(value, str) else f"{value:,}"


def _mean(group: pd.Series, show: Callable[..., str]) -> str:
    if group["n"] == 0:
        return "missing"
    spread = "" if math.isnan(group["std"]) else f" \N{PLUS-MINUS SIGN} {show(group['std'])}"
    of = f" of {group['expected']}" if group["n"] < group["expected"] else ""
    return f"{show(group['mean'])}{spread} ({group['n']}{of})"


def _difference(group: pd.Series, show: Callable[..., str]) -> list[str]:
    interval = (
        ABSENT
        if math.isnan(group["low"])
        else f"{show(group['low'], sign=True)} to {show(group['high'], sign=True)}"
    )
    unreachable = UNREACHABLE if group["wilcoxon_least_p_holm"] > LEVEL else ""
    return [
        show(group["difference"], sign=True),
        interval,
        _or_absent(group["least_kept"], "{:.1f}".format),
        _or_absent(group["could_show"], show),
        str(group["pairs"]),
        _or_absent(group["t_p_holm"], _p),
        _or_absent(group["wilcoxon_p_holm"], _p) + unreachable,
    ]


def _or_absent(value: float, show: Callable[..., str]) -> str:
    return ABSENT if math.isnan(value) else show(value)


def _number(metric: str) -> Callable[..., str]:
    """A function that shows accuracies in hundredths of a percent, all else with four digits."""
    form = ".2f" if metric.endswith("accuracy") else ".4g"
    return lambda value, sign=False: f"{value:{'+' * sign}{form}}".replace("-", MINUS)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _below(comparison: Comparison, with_runs: bool) -> Iterator[str]:
    yield from comparison.notes
    if with_runs:
        show = _number(comparison.metric)
        for run in comparison.runs.itertuples():
            yield f"{run.run}: {show(run.value)}"
