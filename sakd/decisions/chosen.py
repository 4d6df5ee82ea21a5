"""The policy test: which images a finished run's policy sends past a spot, or through it."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sakd.decisions.recorded import Recorded
from sakd.decisions.text import Lines, page, percent
from sakd.errors import ConfigError, RunError, did_you_mean


@dataclass(frozen=True)
class Chosen:
    """Images of a ``split`` that are ``kept`` at a ``spot``, or all others.

    ``places`` among the images of the split, int64 [M], and of each chosen one its ``index``, ``label`` and
    the ``probability`` of the teacher. ``of``: so many images there are.
    """

    run: str
    split: str
    spot: str
    kept: bool
    of: int
    places: np.ndarray
    indices: list[int]
    labels: list[int]
    probabilities: list[str]


def choose(run: Recorded, split: str, spot: str, kept: bool) -> Chosen:
    """What the policy of a finished run does without noise.

    Raises ConfigError for a spot that the run has not, RunError if it is not finished or its mode has no
    policy.
    """
    spots = run.record.spots
    if spot not in spots:
        raise ConfigError(
            f"--spot: found {spot!r}, expected one of {', '.join(spots)}, the spots of {run.name}."
            f"{did_you_mean(spot, spots)}"
        )
    seen = run.record.of(split)
    if seen is None:
        raise RunError(
            f"{run.name}: found {run.progress}, expected a finished run, whose policy was asked without noise"
        )
    if seen.kept is None:
        raise RunError(
            f"{run.name}: found spot_mode={run.names['spot_mode']}, expected a mode that learns: others have "
            "no policy"
        )
    column = spots.index(spot)
    (places,) = np.nonzero(seen.kept[:, column] == kept)
    return Chosen(
        run.name,
        split,
        spot,
        kept,
        len(seen.labels),
        places,
        seen.indices[places].tolist(),
        seen.labels[places].tolist(),
        [f"{probability:.6g}" for probability in seen.probability[places, column]],
    )


def as_text(chosen: Chosen, files: Sequence[str] | None) -> str:
    what = "kept" if chosen.kept else "skipped"
    share = percent(len(chosen.places) / chosen.of)
    head = (
        f"{chosen.run}\n{len(chosen.places):,} of {chosen.of:,} {chosen.split} images ({share}) are "
        f"{what} at {chosen.spot}; probability: of the teacher, by the policy without noise."
    )
    lines: Lines = [list(map(str, line)) for line in _table(chosen, files)]
    return page([head, lines] if len(lines) > 1 else [head])


def as_csv(chosen: Chosen, files: Sequence[str] | None) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(_table(chosen, files))
    return written.getvalue()


def as_json(chosen: Chosen, files: Sequence[str] | None) -> str:
    head, *lines = _table(chosen, files)
    images = [dict(zip(head, line, strict=True)) for line in lines]
    for image in images:
        image["probability"] = float(image["probability"])
    about = {key: getattr(chosen, key) for key in ("run", "split", "spot", "kept", "of")}
    return json.dumps(about | {"images": images}, indent=2, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Chosen, Sequence[str] | None], str]] = {
    "text": as_text,
    "csv": as_csv,
    "json": as_json,
}


def _table(chosen: Chosen, files: Sequence[str] | None) -> list[tuple]:
    """A head, and a line for each image; with its file where images are in ``files`` of their own."""
    columns = {"index": chosen.indices, "label": chosen.labels, "probability": chosen.probabilities}
    if files is not None:
        columns["file"] = [files[place] for place in chosen.places]
    return [tuple(columns), *zip(*columns.values(), strict=True)]
