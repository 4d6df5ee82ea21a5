"""What a person sees while a run goes on: a progress bar, or a line per epoch where there is no terminal; and
its table."""

import logging
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sakd.runs.tracking import open_command

# Between two looks at the device's measurements: each waits for it, and stops a run whose loss is not finite.
SECONDS_BETWEEN, SECONDS_WITHOUT_TERMINAL = 0.5, 10.0

console = Console(soft_wrap=True, highlight=False)


def start_logging() -> logging.Logger:
    """Messages of sakd go to the terminal, below the progress bar."""
    log = logging.getLogger("sakd")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        log.addHandler(_ConsoleHandler())
    return log


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage(), markup=False)


class Watch:
    """Shows a run's progress: ``step`` during an epoch, ``epoch`` after each."""

    def __init__(self, title: str, epochs: int, done: int):
        self.title, self.epochs = title, epochs
        self.started, self.done_before = time.monotonic(), done
        self.accuracy = ""
        self.last_look = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[measured]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=epochs, completed=done, measured="")

    def __enter__(self) -> "Watch":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, epoch: int, step: int, steps: int, means: Callable[[], dict[str, float]]) -> None:
        """Called after every step; looks at the measurements only now and then."""
        now = time.monotonic()
        if now - self.last_look < (SECONDS_BETWEEN if console.is_terminal else SECONDS_WITHOUT_TERMINAL):
            return
        self.last_look = now
        self.bar.update(
            self.task, completed=epoch - 1 + step / steps, measured=_losses(means()) + self.accuracy
        )

    def epoch(self, metrics: dict[str, float]) -> None:
        """Called with an epoch's measurements."""
        number = int(metrics["epoch"])
        if "test/accuracy" in metrics:  # a pretraining measures none
            self.accuracy = f"  test {metrics['test/accuracy']:.2f} %"
        self.bar.update(self.task, completed=number, measured=_losses(metrics) + self.accuracy)
        if not console.is_terminal:
            elapsed = time.monotonic() - self.started
            left = elapsed / (number - self.done_before) * (self.epochs - number)
            console.print(
                f"{self.title}  epoch {number}/{self.epochs}  {_losses(metrics)}{self.accuracy}  "
                f"{metrics['seconds']:.1f} s  left {clock(left)}"
            )


def _losses(metrics: dict[str, float]) -> str:
    losses = {key.removeprefix("loss/"): value for key, value in metrics.items() if key.startswith("loss/")}
    return "  ".join(f"{name} {value:.3f}" for name, value in losses.items())


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def show_result(result: dict[str, Any], folder: str, tracking_uri: str | None) -> None:
    """The table at the end of a run."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    teacher, student = result["teacher"], result["student"]
    if teacher is not None:
        table.add_row("teacher", f"{teacher['name']}  {teacher['accuracy']:.2f} %")
    table.add_row(
        "student",
        f"{student['name']}  {student['accuracy']:.2f} % last, "
        f"{student['best_accuracy']:.2f} % best (epoch {student['best_epoch']})",
    )
    if result["kept"]:
        shares = "  ".join(f"{spot} {100 * share:.1f} %" for spot, share in result["kept"].items())
        table.add_row("kept", f"{shares}  (last epoch)")
    table.add_row("seconds", f"{result['seconds']:.1f}")
    table.add_row("folder", folder)
    if tracking_uri is not None:
        table.add_row("see it", open_command(tracking_uri))
    console.print(table, width=max(console.width, 160) if not console.is_terminal else None)
