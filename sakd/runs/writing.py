"""What a run stores of its epochs is written beside its training, in a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Writes what one run stores, in the order in which it is submitted.

    ``thread``: an executor of one worker, which runs that train together share. What goes wrong there is
    told in the run's own thread, by ``check`` and ``wait``; who lets go of the run's folder waits first.
    """

    def __init__(self, thread: ThreadPoolExecutor):
        self._thread = thread
        self._last: Future[None] | None = None

    def submit(self, *steps: Callable[[], object]) -> None:
        """Let steps be carried out, one after the other; one that raises is the last of them."""
        self._last = self._thread.submit(_carry_out, steps)

    def wait(self) -> None:
        """Wait until what was submitted last is written. Raises what went wrong with it."""
        if self._last is not None:
            self._last.result()

    def check(self) -> None:
        """Raise what is known to have gone wrong; waits for nothing."""
        if self._last is not None and self._last.done():
            self._last.result()


def _carry_out(steps: tuple[Callable[[], object], ...]) -> None:
    for step in steps:
        step()
