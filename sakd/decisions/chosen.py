"""Lists of images: those that a finished run's policy sends past a spot or through it, the policy test; and
those that a spot always or never distilled."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sakd.decisions.recorded import Recorded
from sakd.decisions.text import Lines, page, percent
from sakd.errors import ConfigError, RunError, did_you_mean


@dataclass(frozen=True)
class Wanted:
    """Which images are listed.

    ``which``: the policy's ``skipped`` or ``kept`` ones of a ``split``, or those distilled ``never`` or
    ``always``, which training images alone are.
    """

    which: str
    spot: str
    split: str

    @property
    def by_policy(self) -> bool:
        return self.which in ("skipped", "kept")


def wanted(
    split: str | None, spot: str | None, skipped: bool | None, never: bool | None, form: str | None
) -> Wanted | None:
    """What these options of the command ask for; None where they ask for no list.

    Raises ConfigError for a part of what says which images, or more.
    """
    given = {"--split": split, "--spot": spot, "--format": form}
    ways = [
        word
        for asked, words in ((skipped, ("--kept", "--skipped")), (never, ("--always", "--never")))
        if asked is not None
        for word in [words[asked]]
    ]
    beside = [*(name for name, value in given.items() if value is not None), *ways]
    if not beside:
        return None
    if len(ways) > 1:
        raise ConfigError(f"{ways[1]}: found {ways[0]} beside it, expected one of them")
    if not ways:
        raise ConfigError(
            f"--skipped, --kept, --never or --always: found none, expected one beside {' and '.join(beside)}"
        )
    found = Wanted(ways[0].removeprefix("--"), spot or "", split or "train")
    for name in ("--spot", "--split") if found.by_policy else ("--spot",):
        if given[name] is None:
            raise ConfigError(f"{name}: found none, expected one beside {' and '.join(beside)}")
    if not found.by_policy and found.split != "train":
        raise ConfigError(
            f"--split: found {split}, expected train beside {ways[0]}: none but training images are distilled"
        )
    return found


@dataclass(frozen=True)
class Chosen:
    """Images that were asked for.

    ``about``: what a list for programs has beside them; ``told``: so in words. ``places`` among the images of
    the split, int64 [M]; ``columns``: of each image its ``index``, ``label`` and more, by name.
    """

    about: dict[str, Any]
    told: str
    places: np.ndarray
    columns: dict[str, list[Any]]


def choose(run: Recorded, asked: Wanted) -> Chosen:
    """The images of a run that are asked for.

    Raises ConfigError for a spot that the run has not. Of the policy, which is asked without noise, also
    RunError if the run is not finished or its mode has none.
    """
    spots = run.record.spots
    if asked.spot not in spots:
        raise ConfigError(
            f"--spot: found {asked.spot!r}, expected one of {', '.join(spots)}, the spots of {run.name}."
            f"{did_you_mean(asked.spot, spots)}"
        )
    return _by_policy(run, asked) if asked.by_policy else _by_record(run, asked)


def _by_policy(run: Recorded, asked: Wanted) -> Chosen:
    seen = run.record.of(asked.split)
    if seen is None:
        expected = "one that has a record at its end" if run.is_finished else "a finished run"
        raise RunError(
            f"{run.name}: found {run.progress}, expected {expected}, whose policy was asked without noise"
        )
    if seen.kept is None:
        raise RunError(
            f"{run.name}: found spot_mode={run.names['spot_mode']}, expected a mode that learns: others have "
            "no policy"
        )
    column = run.record.spots.index(asked.spot)
    kept = asked.which == "kept"
    (places,) = np.nonzero(seen.kept[:, column] == kept)
    return Chosen(
        {"run": run.name, "split": asked.split, "spot": asked.spot, "kept": kept, "of": len(seen.labels)},
        f"{_counted(run, places, len(seen.labels), asked.split)} are {asked.which} at {asked.spot}; "
        "probability: of the teacher, by the policy without noise.",
        places,
        {
            "index": seen.indices[places].tolist(),
            "label": seen.labels[places].tolist(),
            "probability": [float(f"{value:.6g}") for value in seen.probability[places, column]],
        },
    )


def _by_record(run: Recorded, asked: Wanted) -> Chosen:
    record = run.record
    kept = record.kept_of(asked.spot)
    (places,) = np.nonzero(kept.all(0) if asked.which == "always" else ~kept.any(0))
    epochs = record.epochs.tolist()
    about = {"run": run.name, "split": "train", "spot": asked.spot, "distilled": asked.which}
    return Chosen(
        about | {"epochs": epochs, "of": len(record.labels)},
        f"{_counted(run, places, len(record.labels), 'train')} were {asked.which} distilled at {asked.spot}: "
        f"{run.progress}.",
        places,
        {"index": record.indices[places].tolist(), "label": record.labels[places].tolist()},
    )


def _counted(run: Recorded, places: np.ndarray, of: int, split: str) -> str:
    return f"{run.name}\n{len(places):,} of {of:,} {split} images ({percent(len(places) / of)})"


def as_text(chosen: Chosen, files: Sequence[str] | None) -> str:
    lines: Lines = [
        [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in line]
        for line in _table(chosen, files)
    ]
    return page([chosen.told, lines] if len(lines) > 1 else [chosen.told])


def as_csv(chosen: Chosen, files: Sequence[str] | None) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(_table(chosen, files))
    return written.getvalue()


def as_json(chosen: Chosen, files: Sequence[str] | None) -> str:
    head, *lines = _table(chosen, files)
    images = [dict(zip(head, line, strict=True)) for line in lines]
    return json.dumps(chosen.about | {"images": images}, indent=2, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Chosen, Sequence[str] | None], str]] = {
    "terminal": as_text,
    "csv": as_csv,
    "json": as_json,
}


def _table(chosen: Chosen, files: Sequence[str] | None) -> list[tuple]:
    """A head, and a line for each image; with its file where images are in ``files`` of their own."""
    columns = dict(chosen.columns)
    if files is not None:
        columns["file"] = [files[place] for place in chosen.places]
    return [tuple(columns), *zip(*columns.values(), strict=True)]
