"""Whether a store can take runs: looked at, and changed by nothing."""

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from sakd.credentials import hidden
from sakd.errors import RunError
from sakd.runs.tracking.store import Store, reason, sqlite_path
from sakd.runs.tracking.waiting import within

PATIENCE = 60.0  # seconds: MLflow's import takes some of them


def check_store(uri: str) -> str:
    """A store in one line; a file's pages and schema are looked at, a server is asked.

    Raises RunError where it is damaged, of another schema, away, or cannot be made.
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return _check_place(path)
    if path is not None:
        _check_pages(path)
    try:
        within(PATIENCE, uri, lambda: Store(uri).answers())
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{hidden(uri)}: found no MLflow store that answers ({reason(error)})") from error
    return f"{hidden(uri)}: answers" + (
        "" if path is None else ", its pages are whole and its schema is current"
    )


def _check_place(path: Path) -> str:
    there = next(place for place in path.parents if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RunError(f"{path}: cannot be made ({error.strerror}), expected a place for a file") from error
    return f"{path}: not there yet, the first run makes it"


def _check_pages(path: Path) -> None:
    """Raise RunError unless SQLite finds the file whole."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise RunError(f"{path}: found no SQLite file that can be read ({error})") from error
    if found != "ok":
        raise RunError(
            f"{path}: found damage ({found}), expected a whole SQLite file; bring back a copy of it"
        )
