"""Interruptions: Ctrl-C, SIGTERM, as clusters send it, and SIGHUP, of a closed terminal, end a process alike.

The first raises KeyboardInterrupt with the signal's name, so that all is left in order. In a program that is
``ended_in_order`` a further one ends it at once, wherever it waits. A signal that is ignored, as SIGHUP is
below nohup, stays ignored.
"""

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger("sakd")

ENDS = (signal.SIGTERM, signal.SIGHUP)  # beside SIGINT, which raises KeyboardInterrupt by itself
INTERRUPTIONS = (signal.SIGINT, *ENDS)
EXIT_CODE = 130
SECONDS_OF_ONE = 0.5  # signals so close to the first are one with it: a shell and a terminal both send SIGHUP


@contextmanager
def ended_in_order(otherwise: str = "") -> Iterator[None]:
    """Let an interruption of the whole program end as one message and exit code 130.

    The message says what a ``told_if_finished`` has noted, or ``otherwise``. A further signal, also after
    this block, ends the process at once: files are whole and locks are the kernel's.
    """
    before = _handled_by(_Interruptions(), INTERRUPTIONS)
    if before:
        atexit.register(_ignore)  # before others, so that it comes last
    interrupted = False
    try:
        yield
    except KeyboardInterrupt as interruption:
        interrupted = True
        what = next(iter(getattr(interruption, "__notes__", [])), otherwise)
        log.warning("interrupted (%s)%s", str(interruption) or "SIGINT", f"; {what}" * bool(what))
        raise SystemExit(EXIT_CODE) from None
    finally:
        if before and not interrupted:
            for number, handler in before.items():
                signal.signal(number, handler)
            atexit.register(_handled_by, _end_at_once, INTERRUPTIONS)  # after others, so that it comes first


@contextmanager
def told_if_finished(is_finished: Callable[[], bool]) -> Iterator[None]:
    """Let an interruption inside that comes once all is finished say so."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        if is_finished():
            interruption.add_note("all is finished; the same command shows it and brings MLflow up to date")
        raise


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt with their name inside; only the main thread may ask for
    signals."""
    before = _handled_by(_interrupt, ENDS)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _interrupt:  # what has been set since stays
                signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold interruptions back inside; the first that came is raised afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {}
    for number in INTERRUPTIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def as_by_default() -> None:
    """Let interruptions end this process without a word: it is a helper whose parent has the last word."""
    for number in INTERRUPTIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


class _Interruptions:
    """Handler of a program's interruptions: the first raises KeyboardInterrupt, a further one ends it."""

    def __init__(self):
        self.process = os.getpid()
        self.first: float | None = None  # when it came, on the monotonic clock

    def __call__(self, number: int, frame: object) -> None:
        if self.first is None or os.getpid() != self.process:  # forked processes have their own ways to end
            self.first = time.monotonic()
            _interrupt(number, frame)
        elif time.monotonic() - self.first >= SECONDS_OF_ONE:
            _end_at_once(number, frame)


def _handled_by(handler: Callable[[int, object], None], numbers: tuple[int, ...]) -> dict[int, object]:
    """Handle signals, but for what is ignored or the program's own; the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in numbers}
    before = {
        number: known
        for number, known in before.items()
        if known is not signal.SIG_IGN and not isinstance(known, _Interruptions)
    }
    for number in before:
        signal.signal(number, handler)
    return before


def _end_at_once(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    with suppress(OSError):
        os.write(2, f"interrupted ({name}) at the end; `sakd sync` sends what MLflow lacks\n".encode())
    os._exit(EXIT_CODE)


def _ignore() -> None:
    """Let nothing disturb the interpreter's last moments, in which no handler would be called."""
    for number in INTERRUPTIONS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: object) -> None:
    if number == signal.SIGHUP:
        _let_go_of_the_terminal()
    raise KeyboardInterrupt(signal.Signals(number).name)


def _let_go_of_the_terminal() -> None:
    """Write to nowhere instead of a terminal that is gone, which would refuse every further word."""
    for standard in (0, 1, 2):
        try:
            os.write(standard, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, standard)
            os.close(nowhere)
