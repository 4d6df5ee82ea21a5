"""Waiting for stores: never without an end, and never long without a word."""

import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from sakd.errors import SakdError

log = logging.getLogger("sakd")

UNTOLD = 3.0  # seconds that are waited without a word
LOCK_PATIENCE = 60.0  # seconds in which whoever holds a lock should have let go of it

Found = TypeVar("Found")


class StoreAwayError(SakdError):
    """A store, or a lock before it, is busy or does not answer; later it may."""


def within(seconds: float, uri: str, work: Callable[[], Found]) -> Found:
    """What ``work`` at the store returns, or raises, if it does so within ``seconds``.

    Raises StoreAwayError else; the work then goes on in a thread that ends with the process. Nothing but a
    thread bounds it: each byte that a server lets drip renews the time that a request may take.
    """
    found: list[Found] = []
    errors: list[BaseException] = []

    def carry_out() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(carry_out,), name="mlflow", daemon=True
    )
    thread.start()
    if not joined(thread, seconds, uri):
        raise StoreAwayError(no_answer(seconds))
    if errors:
        raise errors[0]
    return found[0]


def joined(thread: threading.Thread, seconds: float, uri: str) -> bool:
    """Wait for a thread that works at a store, and say so where that takes long; True if it is over."""
    thread.join(min(UNTOLD, seconds))
    if thread.is_alive() and seconds > UNTOLD:
        log.info("waiting for MLflow at %s, at most %.0f s", uri, seconds)
        thread.join(seconds - UNTOLD)
    return not thread.is_alive()


def no_answer(seconds: float) -> str:
    return f"no answer within {seconds:.0f} seconds" if seconds >= 1 else "no answer yet"


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Hold a lock that others let go of soon. Raises StoreAwayError if they do not."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout:
        raise StoreAwayError(
            f"{path} has been held for {LOCK_PATIENCE:.0f} seconds by another process"
        ) from None
    try:
        yield
    finally:
        lock.release()
