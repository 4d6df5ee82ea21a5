"""What a launch, or a command, gives to MLflow: all its runs together wait for stores only so long."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from sakd.configuration import Config
from sakd.runs.run import Run, is_locked
from sakd.runs.tracking.notes import note_status, note_store, noted
from sakd.runs.tracking.parents import folders as parents
from sakd.runs.tracking.parents import note_end, sweep_name, synchronise_sweep
from sakd.runs.tracking.store import GOING_ON, Store, is_a_file, is_refusal, reason, set_up_store
from sakd.runs.tracking.sync import bring, synchronise, undelivered
from sakd.runs.tracking.thread import PATIENCE, PATIENCE_WITH_A_FILE, PREPARED_WITHIN, Mirror, insisting
from sakd.runs.tracking.waiting import StoreAwayError, within
from sakd.signals import interruptible

log = logging.getLogger("sakd")

PREPARATION = 60.0  # seconds that a command waits before its own work, as a launch while others wait for it
SYNC_PATIENCE = 120.0  # and seconds of `sakd sync` for each run: to wait is what it is for
ANSWER_PATIENCE = 20.0  # seconds in which a store that is there says anything
NAMED = 5  # runs that a store has not got; the others are counted

Found = TypeVar("Found")


class Delivery:
    """Sends what MLflow lacks, for the time that is left: all runs of a launch together have one patience.

    A store that was away once is not asked again: the others would wait for it, too. ``patience``: in seconds
    (None: what is sensible for the end of a launch, by the kind of store). With ``each``, every run has it.
    """

    def __init__(self, patience: float | None = None, each: bool = False):
        self.patience, self.each = patience, each
        self._spent = self._preparing = 0.0  # seconds, for stores and for what is drawn and made
        self._mirrors: list[Mirror] = []  # of runs that are over, and may have something to send
        self._away: dict[str, str] = {}  # stores, by URI, and why
        self._told: dict[Path, None] = {}  # runs that were told to lack something

    def add(self, mirror: Mirror) -> None:
        """Let the mirror of a run that is over send the rest, while others may still be trained."""
        self._mirrors.append(mirror)

    def conclude(self) -> None:
        """Wait until the mirrors have sent what they have, and say so where they could not."""
        for mirror in self._mirrors:
            mirror.hurry()
        for mirror in self._mirrors:
            if self._left(mirror.uri):
                start = time.monotonic()
                mirror.wait_for_preparation(max(0.0, PREPARED_WITHIN - self._preparing))
                self._preparing += time.monotonic() - start
            start = time.monotonic()
            arrived = mirror.wait(self._left(mirror.uri))
            self._spent += time.monotonic() - start
            if not arrived:
                self._told[mirror.folder] = None
                if not mirror.refused:
                    self._away[mirror.uri] = mirror.error or "no answer"
        self._mirrors.clear()

    def catch_up(self, *runs: Run) -> None:
        """Give what is finished, of these runs and of what they needed first, to the stores that their
        configurations ask for, and say what these could not be given."""
        self.conclude()
        named = max(NAMED, len(self._told))
        for run in runs:
            try:
                for folder, tracking, first in undelivered(run):
                    if folder not in self._told:
                        self._bring(folder, tracking["uri"], partial(bring, folder, tracking, first))
            except Exception as error:  # a damaged file of a run's own
                self._tell(run.folder, run.config["tracking"]["uri"], error)
        if len(self._told) > named:
            log.warning("nor of %d more runs", len(self._told) - named)

    def _bring(self, folder: Path, uri: str, work: Callable[[], int]) -> None:
        try:
            self._insist(uri, work)
        except Exception as error:
            self._tell(folder, uri, error)

    def _tell(self, folder: Path, uri: str, error: Exception) -> None:
        self._told[folder] = None
        if len(self._told) <= NAMED:
            log.warning(
                "MLflow at %s has not got all of %s (%s); `sakd sync` sends it",
                uri,
                folder.name,
                reason(error),
            )

    def mark_ended(self, folder: Path, lost: bool = False) -> int | Exception | None:
        """Say of a run that was killed without warning that it is over, and send what is missing.

        Returns the number of epochs sent, or what went wrong; None where another process works on it.
        ``lost``: it is known not to come to a next turn either.
        """
        if is_locked(folder / ".lock"):
            return None
        try:
            state = noted(folder)
            over = (folder / "result.json").exists()  # killed right after it, perhaps
            if not over and state["status"] in (GOING_ON if lost else ("RUNNING",)):
                note_status(folder, "KILLED")
            return self._insist(state["uri"], partial(synchronise, folder))
        except Exception as error:
            return error

    def bring_sweep(self, folder: Path) -> int | Exception:
        """Send what is missing of a sweep's page; 0, since it has no epochs, or what went wrong."""
        try:
            return self._insist(noted(folder)["uri"], partial(synchronise_sweep, folder))
        except Exception as error:
            return error

    def conclude_sweep(self, folder: Path, status: str) -> None:
        """Note how a sweep stands, send what is missing of its page, and say so if it could not be sent."""
        note_end(folder, status)
        outcome = self.bring_sweep(folder)
        if isinstance(outcome, Exception):
            log.warning(
                "MLflow has not got all of %s (%s); `sakd sync` sends it",
                sweep_name(folder),
                reason(outcome),
            )

    def set_up(self, uri: str, experiments: Sequence[str]) -> Exception | None:
        """Make a fresh store and its experiments; what went wrong, if anything did."""
        try:
            self._insist(uri, partial(set_up_store, uri, experiments))
        except Exception as error:
            return error
        return None

    def _insist(self, uri: str, work: Callable[[], Found]) -> Found:
        """Work at a store for the time that is left; raise why it was in vain."""
        if uri in self._away:
            raise StoreAwayError(self._away[uri])
        start, left = time.monotonic(), self._left(uri)
        if not left:
            raise StoreAwayError("other runs have been waited for as long as is sensible")
        try:
            return within(left, uri, partial(insisting, uri, start + left, work))
        except Exception as error:
            if not is_refusal(error) and not (self.each and self._answers(uri)):
                self._away[uri] = reason(error)
            raise
        finally:
            if not self.each:
                self._spent += time.monotonic() - start

    def _answers(self, uri: str) -> bool:
        """True if a store that has failed for a run is there for others."""
        try:
            within(ANSWER_PATIENCE, uri, lambda: Store(uri).answers())
        except Exception:
            return False
        return True

    def _left(self, uri: str) -> float:
        """Seconds for which it is sensible to wait for such a store, less those that were."""
        patience = self.patience or (PATIENCE_WITH_A_FILE if is_a_file(uri) else PATIENCE)
        return max(0.0, patience - self._spent)


@contextmanager
def concluded(delivery: Delivery, *runs: Run, sweep: Path | None = None) -> Iterator[None]:
    """Train ``runs`` inside; then wait for MLflow, also after an interruption, which may come once more.

    ``sweep``: the folder of the sweep that is interrupted then.
    """
    with interruptible():
        try:
            yield
        except BaseException:
            delivery.conclude()
            if sweep is not None:
                delivery.conclude_sweep(sweep, "KILLED")
            raise
        delivery.catch_up(*runs)


def adopt(runs: Path, tracking: Config) -> None:
    """Note for the store of ``tracking`` what is finished in ``runs`` and was trained without MLflow."""
    for path in sorted(runs.glob("*/result.json")):
        if not (path.parent / "mlflow.json").exists():
            note_store(path.parent, tracking["uri"], tracking["experiment"], "FINISHED")


def synchronise_all(runs: Path) -> dict[str, int | Exception]:
    """Send what is missing of every run in ``runs``.

    Returns the number of epochs sent, or what went wrong, by the run's name. A run that was killed without
    warning before its result is marked KILLED; one that another process works on is left to it.
    """
    delivery = Delivery(SYNC_PATIENCE, each=True)
    folders = [path.parent for path in sorted(runs.glob("*/mlflow.json"))]
    outcomes = {folder.name: delivery.mark_ended(folder) for folder in folders}
    outcomes |= {sweep_name(folder): delivery.bring_sweep(folder) for folder in parents(runs)}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}
