"""The page: what is said of all runs together, and its templates, which alone know HTML."""

import base64
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import sakd
from sakd.compare import compare
from sakd.compare.formats import ABSENT, tables
from sakd.compare.published import FIGURES, read_published
from sakd.configuration import NOT_IDENTITY, short_names
from sakd.credentials import hidden
from sakd.errors import ConfigError
from sakd.files import write_whole
from sakd.names import HEADLINE
from sakd.report import charts
from sakd.report.cards import Card, accuracies, cards, kept_shares
from sakd.report.pictures import comparison_plot
from sakd.report.selection import Found, Selection
from sakd.sweeps import STATES

TOLD_APART = ("distiller", "spot_mode")  # where no name tells the runs apart


@dataclass(frozen=True)
class Compared:
    """The comparison, or why there is none."""

    tables: list[list[list[str]]]
    notes: list[str]
    plot: dict[str, Markup] | None = None


@dataclass(frozen=True)
class Key:
    """A key of the configurations. ``values``: with the number of runs that have each; ``aside``: why no
    result depends on it, if so."""

    name: str
    values: dict[str, int]
    aside: str | None

    @property
    def differs(self) -> bool:
        return len(self.values) > 1


def write_report(selection: Selection, path: Path) -> None:
    """Write the page about these runs.

    What of a run is damaged is said in the page. Raises ConfigError where no run is finished, RunError if the
    file cannot be written.
    """
    if all(run.result is None for run in selection.runs):
        raise ConfigError(
            f"{selection.asked}: found no finished run to report, expected some; `python launch.py` makes "
            "them"
        )
    write_whole(path, _page(selection).encode())


def _page(selection: Selection) -> str:
    left_out: Counter[str] = Counter()
    told = cards(selection.runs, left_out)
    templates = environment()
    script = templates.get_template("script.js").render()
    keys = _keys(selection.runs)
    telling = [key.name for key in keys if key.differs and key.aside is None]
    constant, varying = _names(told)
    return templates.get_template("page.html").render(
        asked=selection.asked,
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=sakd.__version__,
        states={state: count for state in STATES if (count := _count(told, state))},
        constant=constant,
        varying=varying,
        cards=told,
        failed=[card for card in told if card.has_failed],
        troubled=[card for card in told if card.troubles],
        unreadable=selection.unreadable,
        compared=_compared(told, selection, left_out),
        accuracies=accuracies(told),
        kept_shares=kept_shares(told),
        keys=keys,
        values=[{key: run.facts[key] for key in telling if key in run.facts} for run in selection.runs],
        teachers=_teachers(told),
        codes=dict(Counter(str(card.code) for card in told if card.code).most_common()),
        versions=_versions(told),
        size=charts,
        script=Markup(script),
        script_sum=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def environment() -> Environment:
    """Templates; what they get is text, since names and errors come from others, and shows no password."""
    templates = Environment(
        loader=PackageLoader("sakd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: hidden(value) if type(value) is str else value,
    )
    templates.filters |= {"percent": _percent, "number": _number}
    return templates


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.1f}"


def _count(told: Sequence[Card], state: str) -> int:
    return sum(card.standing.state == state for card in told)


def _names(told: Sequence[Card]) -> tuple[dict[str, str], list[str]]:
    """The short names that all students have in common, and those that tell runs apart."""
    students = [card for card in told if card.names["spot_mode"] != "none"] or told
    constant = {
        key: value
        for key, value in students[0].names.items()
        if all(card.names[key] == value for card in students)
    }
    varying = [key for key in told[0].names if any(card.names[key] != constant.get(key) for card in told)]
    return constant, varying or list(TOLD_APART)


def _compared(told: Sequence[Card], selection: Selection, left_out: Counter[str]) -> Compared:
    runs = [card.compared for card in told if card.compared is not None]
    told_out = ", ".join(f"{what} ({count})" for what, count in left_out.most_common())
    notes = [f"Left out of the comparison: {told_out}."] if left_out else []
    try:
        found = compare(runs, HEADLINE, read_published(FIGURES), selection.expected)
    except ConfigError as error:
        return Compared([], [*str(error).splitlines(), *notes])
    return Compared(list(tables(found)), [*found.notes, *notes], comparison_plot(found))


def _keys(runs: Sequence[Found]) -> list[Key]:
    """All keys but the short names; first those that results depend on."""
    names = dict.fromkeys(key for run in runs for key in run.facts if key not in short_names(run.config))
    keys = [
        Key(name, dict(Counter(run.fact(name) for run in runs).most_common()), _aside(name)) for name in names
    ]
    return sorted(keys, key=lambda key: key.aside is not None)


def _aside(key: str) -> str | None:
    return next((why for node, why in NOT_IDENTITY.items() if f"{key}.".startswith(f"{node}.")), None)


def _teachers(told: Sequence[Card]) -> list[dict[str, Any]]:
    """Certificates: each teacher's once, with how many students it taught, and their data set."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for card in told:
        if card.result and card.result["teacher"]:
            certificate = card.result["teacher"]
            key = certificate["sha256"], card.names["dataset"]
            found.setdefault(key, {**certificate, "dataset": key[1], "students": 0})["students"] += 1
    return list(found.values())


def _versions(told: Sequence[Card]) -> dict[str, Counter[str]]:
    """Versions of each package, with how many runs were made with each."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for card in told:
        for package, version in (card.result or {}).get("versions", {}).items():
            found[package][str(version)] += 1
    return dict(found)
