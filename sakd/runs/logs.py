"""Log of a run: what is said while its process works on it, and why it ended early."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Self

from sakd.credentials import hidden
from sakd.errors import in_one_line
from sakd.files import explained, refuse_link
from sakd.runs import code
from sakd.runs.run import ENDED_EARLY

_messages = logging.getLogger("sakd")
_speaking: ContextVar["OwnLog | None"] = ContextVar("speaking", default=None)


class OwnLog:
    """A log in the file at ``path``, open inside ``with``.

    Several runs of one process have one each, which gets only its own messages: those from inside its
    ``speaking``. An error that passes through it is noted, as by ``failed``. What is said while it is not
    open is lost.

    Raises RunError where it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: logging.FileHandler | None = None  # while it is open
        self._told_end = False

    def __enter__(self) -> Self:
        refuse_link(self.path)
        with explained(self.path):
            file = logging.FileHandler(self.path, encoding="utf-8")
        file.handleError = _ignore
        file.addFilter(lambda record: _speaking.get() is self)
        file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
        _messages.addHandler(file)
        self._file, self._told_end = file, False
        self.note(f"begins, with the code of {code.of_this_process()[0]}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        file, self._file = self._file, None
        _messages.removeHandler(file)
        with suppress(OSError):  # as in _ignore: closing tries once more to write
            file.close()

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Take messages from inside as this run's.

        So are those of threads that begin there with a copy of the context.
        """
        before = _speaking.set(self)
        try:
            yield
        finally:
            _speaking.reset(before)

    def note(self, message: str) -> None:
        """Write to this log alone."""
        self._write(logging.INFO, message)

    def failed(self, error: BaseException) -> None:
        """Write why the run ends early, with the traceback; once, whatever happens to others afterwards.

        SystemExit is a cluster's word that the run goes on in another turn.
        """
        if self._told_end:
            return
        self._told_end = True
        if isinstance(error, SystemExit):
            self.note("ends here, to go on in its next turn")
        else:
            self._write(logging.ERROR, f"{ENDED_EARLY}{in_one_line(error)}", error)

    def _write(self, level: int, message: str, error: BaseException | None = None) -> None:
        trace = None if error is None else (type(error), error, error.__traceback__)
        record = _messages.makeRecord(_messages.name, level, __file__, 0, "%s", (message,), trace)
        if self._file is not None:
            with self.speaking():
                self._file.handle(record)


class _Formatter(logging.Formatter):
    """Writes messages and tracebacks, without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


def _ignore(record: logging.LogRecord) -> None:
    """Leave an error of the log's own disk unsaid.

    The run meets that disk as well, and must not have its error drown in this one.
    """
