"""Progress of runs, and their tables.

There is a line for each run that fits the terminal, or a line for each epoch where there is none.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sakd.credentials import hidden
from sakd.names import HEADLINE

# Between two looks at the device's measurements: each waits for it, and stops a run whose loss is not finite.
SECONDS_BETWEEN, SECONDS_WITHOUT_TERMINAL = 0.5, 10.0
BAR = 20  # columns
GAP = 2  # columns between the parts of a line
LEAST_TITLE = 24  # columns that a title keeps while something else can give way
CUT = "..."

console = Console(soft_wrap=True, highlight=False)


def start_logging() -> logging.Logger:
    """Let messages of sakd go to the terminal, above the lines of a watch."""
    log = logging.getLogger("sakd")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        log.addHandler(_ConsoleHandler())
    return log


class _ConsoleHandler(logging.Handler):
    """Prints messages.

    One that comes with ``news``, a topic and what has become of it, is left out where it says no more than
    the last about that topic: several runs may meet with the same.
    """

    def __init__(self):
        super().__init__()
        self.latest: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        topic, state = getattr(record, "news", (None, None))
        if topic is not None:
            if self.latest.get(topic) == state:
                return
            self.latest[topic] = state
        with suppress(OSError):  # a terminal that is gone ends no training
            console.print(hidden(record.getMessage()), markup=False)


@dataclass(frozen=True)
class Watched:
    """A run that is to be shown."""

    title: str
    epochs: int  # of all
    done: int  # of them, before this start


@dataclass
class _Member:
    """A run that is shown, and what is known of it."""

    title: str
    epochs: int
    before: int  # epochs done before this start
    done: float  # epochs; of the one under way, the part that is done
    since: float | None = None  # when its first step of this start began, on the monotonic clock
    losses: str = ""
    accuracy: str = ""
    dropped: str | None = None  # why it goes on no more
    looked_at: bool = True  # in this round of looks at the measurements

    @property
    def epoch(self) -> str:
        return f"epoch {int(self.done)}/{self.epochs}"

    def left(self, now: float) -> str:
        """The time that the rest takes at the pace so far."""
        return _left(self.since, now, self.done - self.before, self.epochs - self.done)


class Watch:
    """Shows the progress of runs that are trained together.

    To be called: ``step`` after each step of a member, ``epoch`` after each epoch, ``drop`` for one that goes
    on no more. A terminal has a line for each below one with a bar for all; a single run has the bar in its
    own.
    """

    def __init__(self, members: Mapping[str, Watched]):
        self.members = {
            name: _Member(run.title, run.epochs, run.done, run.done) for name, run in members.items()
        }
        self.started = self.latest = time.monotonic()  # latest: when something was last done
        self.last_look = 0.0
        self.lines: Live | None = None

    def __enter__(self) -> Self:
        self.started = self.latest = time.monotonic()
        if console.is_terminal:
            self.lines = Live(self, console=console, transient=True, refresh_per_second=1 / SECONDS_BETWEEN)
            self.lines.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.lines is not None:
            self.lines.stop()
            self.lines = None

    def step(
        self, name: str, epoch: int, step: int, steps: int, means: Callable[[], dict[str, float]]
    ) -> None:
        """Take in that ``step`` of the ``steps`` of an epoch is done.

        Measurements are looked at only now and then, of every member in turn; what ``means`` raises passes
        through.
        """
        member = self._advanced(name, epoch - 1 + step / steps)
        between = SECONDS_WITHOUT_TERMINAL if self.lines is None else SECONDS_BETWEEN
        if self.latest - self.last_look >= between:
            self.last_look = self.latest
            for each in self.members.values():
                each.looked_at = False
        if not member.looked_at:
            member.looked_at = True
            member.losses = _losses(means())

    def epoch(self, name: str, metrics: dict[str, float]) -> None:
        """Take in an epoch's measurements."""
        member = self._advanced(name, int(metrics["epoch"]))
        member.losses = _losses(metrics)
        if HEADLINE in metrics:  # a pretraining measures none
            member.accuracy = f"test {metrics['test/accuracy']:.2f} %"
        if self.lines is None:
            seconds = f"{metrics['seconds']:.1f} s"
            _say(
                member.title, member.epoch, member.losses, member.accuracy, seconds, member.left(self.latest)
            )

    def drop(self, name: str, why: str) -> None:
        """Take in that a member goes on no more, and why, of which the first line is shown."""
        member = self.members[name]
        member.dropped = next(iter(why.splitlines()), "")
        if self.lines is None:
            _say(member.title, member.epoch, member.dropped)

    def _advanced(self, name: str, done: float) -> _Member:
        member, before = self.members[name], self.latest
        self.latest = time.monotonic()
        member.done = done
        if member.since is None:
            member.since = before  # members step one after the other
        return member

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        now, width = time.monotonic(), options.max_width
        members = list(self.members.values())
        if len(members) > 1:
            yield self._line_of_all(now, width)
        title_width = max(len(member.title) for member in members)
        for member in members:
            bar = _bar(member.done, member.epochs) if len(members) == 1 else None
            if member.dropped is not None:
                room = width - min(title_width, LEAST_TITLE) - len(member.epoch) - 2 * GAP
                why = _shortened(member.dropped, room, head=1.0)
                yield _line(width, member.title, title_width, member.epoch, why)
            else:
                left, losses, accuracy = member.left(now), member.losses, member.accuracy
                yield _line(width, member.title, title_width, member.epoch, left, bar, losses, accuracy)

    def _line_of_all(self, now: float, width: int) -> Table:
        """A line for all: how many go on, the epoch of the one furthest behind, and the time left."""
        going = [member for member in self.members.values() if member.dropped is None]
        last = max((member.epochs for member in going), default=0)
        behind = min((member.done for member in going if member.done < member.epochs), default=last)
        done, total = sum(member.done for member in going), sum(member.epochs for member in going)
        left = _left(self.started, now, done - sum(member.before for member in going), total - done)
        title = f"{len(going)} together"
        return _line(width, title, len(title), f"epoch {int(behind)}/{last}", left, _bar(done, total))


def _line(
    width: int,
    title: str,
    title_width: int,
    epoch: str,
    end: str,
    bar: ProgressBar | None = None,
    losses: str = "",
    accuracy: str = "",
) -> Table:
    """A line of at most ``width`` columns.

    Where there is no room for all, the losses go, then the title is shortened, then accuracy and bar go;
    never ``epoch`` and ``end``.
    """

    def room() -> int:
        """Columns that the other parts leave to the title."""
        others = (epoch, end, losses, accuracy, " " * BAR * (bar is not None))
        return width - sum(len(part) + GAP for part in others if part)

    if room() < title_width:
        losses = ""
    if room() < min(title_width, LEAST_TITLE):
        accuracy = ""
    if room() < min(title_width, LEAST_TITLE):
        bar = None
    title_width = max(0, min(title_width, room()))
    title = _shortened(title, title_width).ljust(title_width)
    styled = [Text(title), Text(epoch, "progress.download"), bar, Text(losses), Text(accuracy)]
    line = Table.grid(padding=(0, GAP, 0, 0))
    line.add_row(*(part for part in (*styled, Text(end, "progress.remaining")) if part))
    return line


def _shortened(text: str, width: int, head: float = 0.3) -> str:
    """Cut ``text`` to ``width`` columns.

    Of what is kept, the share ``head`` is its beginning, and the rest its end: there titles of runs that are
    trained together differ.
    """
    if len(text) <= width:
        return text
    kept = width - len(CUT)
    if kept <= 0:
        return ""
    beginning = round(head * kept)
    return text[:beginning] + CUT + text[len(text) - (kept - beginning) :]


def _bar(done: float, total: int) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=done, width=BAR)


def _left(since: float | None, now: float, made: float, rest: float) -> str:
    """The time that ``rest`` takes where ``made`` took from ``since`` to ``now``."""
    known = since is not None and made > 0
    return f"left {clock((now - since) / made * rest) if known else '-:--'}"


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many of ``total`` are done; the function given is called with how many more."""
    line = _Counted(what, total, time.monotonic())

    def advance(more: int) -> None:
        line.done += more

    showing = Live(line, console=console, transient=True, refresh_per_second=1 / SECONDS_BETWEEN)
    with showing if console.is_terminal else nullcontext():
        yield advance


@dataclass
class _Counted:
    """A line with a bar, of what is counted."""

    what: str
    total: int
    since: float
    done: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        left = _left(self.since, time.monotonic(), self.done, self.total - self.done)
        bar = _bar(self.done, self.total)
        done = f"{self.done:,}/{self.total:,}"
        yield _line(options.max_width, self.what, len(self.what), done, left, bar)


def _say(*parts: str) -> None:
    """Print a whole line, however long."""
    console.print((GAP * " ").join(part for part in parts if part), markup=False)


def _losses(metrics: dict[str, float]) -> str:
    losses = {key.removeprefix("loss/"): value for key, value in metrics.items() if key.startswith("loss/")}
    return "  ".join(f"{name} {value:.3f}" for name, value in losses.items())


def clock(seconds: float) -> str:
    """Write a time as 1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def show_result(
    result: dict[str, Any],
    folder: str,
    see_it: str | None,
    epochs: Sequence[Mapping[str, float]],
    pictures: str | None,
) -> None:
    """Print the table at the end of a run.

    ``see_it``: what shows more of it, if anything does. ``epochs``: the measurements of each, if they are
    still there. ``pictures``: the command that shows who was kept where, if that is known.
    """
    teacher, student = result["teacher"], result["student"]
    shares = [_kept(epoch) for epoch in epochs] if result["kept"] else []
    rows = []
    if teacher is not None:
        rows.append(("teacher", f"{teacher['name']}  {teacher['accuracy']:.2f} %"))
    last, best = (f"{student[key]:.2f} %" for key in ("accuracy", "best_accuracy"))
    top5 = f", {student['top5']:.2f} % top-5" if "top5" in student else ""
    rows.append(
        ("student", f"{student['name']}  {last} last, {best} best (epoch {student['best_epoch']}){top5}")
    )
    for number, line in enumerate(_told(shares, result["kept"])):
        rows.append(("" if number else "kept", line))
    if shares and "loss/policy" in epochs[-1]:
        if any(share != shares[0] for share in shares):
            rows.append(("look at", _most_changed(shares)))
        if pictures is not None:
            rows.append(("for whom", pictures))
    rows += [("seconds", f"{result['seconds']:.1f}"), ("folder", folder)]
    if see_it is not None:
        rows.append(("see it", see_it))
    width = max(len(label) for label, _ in rows)
    for label, text in rows:  # not as a Table, which would fold a command: it is to be copied
        console.print(Text.assemble((label.ljust(width), "bold"), " " * GAP, text))


def _kept(epoch: Mapping[str, float]) -> dict[str, float]:
    """Shares that an epoch kept, by spot."""
    return {key.removeprefix("kept/"): share for key, share in epoch.items() if key.startswith("kept/")}


def _told(shares: Sequence[dict[str, float]], last: dict[str, float]) -> Iterator[str]:
    """Lines of what the first, the middle and the last epoch kept; one where all epochs kept the same.

    ``last``: what the last one kept, for where ``shares`` are gone.
    """
    if not last:
        return
    if all(each == last for each in shares):
        yield f"{_percents(last)}  ({'every' if shares else 'last'} epoch)"
        return
    for place in sorted({0, (len(shares) - 1) // 2, len(shares) - 1}):
        yield f"{_percents(shares[place])}  (epoch {place + 1})"


def _percents(shares: Mapping[str, float]) -> str:
    return "  ".join(f"{spot} {100 * share:5.1f} %" for spot, share in shares.items())


def _most_changed(shares: Sequence[dict[str, float]]) -> str:
    """The spot where the last epoch kept least like the first, in words."""
    first, last = shares[0], shares[-1]
    spot = max(last, key=lambda name: abs(last[name] - first[name]))
    at_first, in_the_end = (f"{100 * share[spot]:.1f} %" for share in (first, last))
    return f"{spot}: distilled for {at_first} of the images at first, {in_the_end} in the end"
