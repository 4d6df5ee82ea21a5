"""Mirror of a run in MLflow, beside its training.

A thread sends what is new, so that the training never waits.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sakd.configuration import Config
from sakd.errors import RunError
from sakd.runs.tracking.machine import Sampling
from sakd.runs.tracking.notes import note_status, note_store
from sakd.runs.tracking.store import ENDS, is_a_file, is_imported, is_refusal, reason
from sakd.runs.tracking.sync import prepare, synchronise, tell_trouble
from sakd.runs.tracking.waiting import joined, no_answer

log = logging.getLogger("sakd")

SECONDS_BETWEEN = 2.0  # between two transfers of one run
# Importing MLflow and making a store take seconds in which Python runs little else: the first epochs, and all
# of a short launch, are spared them.
SECONDS_BEFORE_THE_FIRST = 30.0
PATIENCE = 20.0  # seconds that the end of a launch waits for a server
PREPARED_WITHIN = 120.0  # seconds in which pictures and models of all of them should be made
PATIENCE_WITH_A_FILE = 600.0  # and for an SQLite store, which is never away, but may have many others waiting

Found = TypeVar("Found")


class Mirror:
    """Sends a run's folder to MLflow from a thread of its own.

    Neither slow nor absent stores hold up the training. What it says goes to the run in whose context it was
    made.
    """

    def __init__(self, folder: Path, uri: str, experiment: str, system_metrics: bool = False):
        self.folder, self.uri = folder, uri
        self.error: str | None = None  # what went wrong last, until it is mended
        self.refused = False  # what went wrong last will not be otherwise for being tried again
        self._status = "RUNNING"
        note_store(folder, uri, experiment, self._status)
        self._sampling = Sampling(folder) if system_metrics else None
        self._new, self._ended, self._hurried = threading.Event(), threading.Event(), threading.Event()
        self._preparing: threading.Thread | None = None  # what belongs to the end
        self._thread = self._beside(self._work)

    def notify(self) -> None:
        """Say that there is something new in the folder."""
        self._new.set()

    def hurry(self) -> None:
        """Say that nothing is trained any more that sending could hold up; returns at once."""
        self._hurried.set()

    def end(self, status: str) -> None:
        """Say how the run ended, and let the rest be sent; returns at once.

        ``status``: FINISHED, FAILED, KILLED, or SCHEDULED to go on later.
        """
        with suppress(RunError):  # the disk is full: that has been said, and the store can still be told
            note_status(self.folder, status)
        self._status = status
        if self._sampling is not None:
            self._sampling.end()
        if status in ENDS:
            self._preparing = self._beside(self._prepare)
        self._ended.set()
        self._new.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all has been sent, and say so if it has not; True if it has.

        ``seconds``: how long, at most (None: as long as is sensible for such a store). Comes after ``end``.
        """
        self.hurry()
        if seconds is None:
            seconds = self.patience
        if not joined(self._thread, seconds, self.uri):
            self.error = self.error or no_answer(seconds)
        if self.error is not None:
            log.warning(
                "MLflow at %s has not got everything (%s); `sakd sync` sends the rest",
                self.uri,
                self.error,
                extra={"news": (f"the rest for {self.uri}", "missing")},
            )
        return self.error is None

    @property
    def patience(self) -> float:
        """Seconds that it is sensible to wait for such a store."""
        return PATIENCE_WITH_A_FILE if is_a_file(self.uri) else PATIENCE

    def close(self, status: str) -> bool:
        """Say how the run ended, and wait until all has been sent; False if it could not be."""
        self.end(status)
        self.wait_for_preparation()
        return self.wait()

    def wait_for_preparation(self, seconds: float = PREPARED_WITHIN) -> None:
        """Wait until pictures and model of the run are made, for which no store is needed."""
        if self._preparing is not None:
            self._preparing.join(seconds)

    def _beside(self, work: Callable[[], None]) -> threading.Thread:
        """Work in a thread that ends with the process; what it says goes to this run."""
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,), name="mlflow", daemon=True)
        thread.start()
        return thread

    def _prepare(self) -> None:
        with suppress(Exception):  # whoever sends the folder meets with it, too, and tells
            prepare(self.folder)

    def _work(self) -> None:
        if not is_imported():
            self._hurried.wait(SECONDS_BEFORE_THE_FIRST)
        while not self._ended.is_set():
            if not self.refused:
                with suppress(Exception):  # told; the next attempt has it
                    self._attempt()
            self._new.wait()
            self._new.clear()
            self._ended.wait(SECONDS_BETWEEN)
        self.wait_for_preparation()  # it holds what the last attempt needs
        with suppress(Exception):  # told, and noted in self.error
            insisting(self.uri, time.monotonic() + PATIENCE_WITH_A_FILE, self._attempt)

    def _attempt(self) -> None:
        try:
            synchronise(self.folder, self._status)
        except Exception as error:
            if self.error is None or self.refused != is_refusal(error):
                tell_trouble(self.uri, error)
            self.error, self.refused = reason(error), is_refusal(error)
            raise
        if self.error is not None:
            log.info("MLflow at %s is back", self.uri, extra={"news": (self.uri, "back")})
        self.error, self.refused = None, False


def insisting(uri: str, deadline: float, work: Callable[[], Found]) -> Found:
    """Work at a store, again and again until the ``deadline`` where that is a file which others keep busy.

    A server that is away is given up at once: it may be so for long. Raises what the last attempt did.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if is_refusal(error) or not is_a_file(uri) or time.monotonic() + SECONDS_BETWEEN > deadline:
                raise
        time.sleep(SECONDS_BETWEEN)


def start_mirror(folder: Path, config: Config) -> Mirror | None:
    """Start the mirror that the configuration asks for, if any."""
    tracking = config["tracking"]
    if tracking["name"] != "mlflow":
        return None
    return Mirror(folder, tracking["uri"], tracking["experiment"], tracking.get("system_metrics", False))
