"""What runs show of themselves: on real pseudo-terminals, and where there is none."""

import fcntl
import io
import itertools
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from sakd import terminal
from sakd.errors import NonFiniteLossError
from sakd.terminal import GAP, Watch, Watched, show_result, start_logging
from tests.conftest import ROOT

LONG = "torchvision_shufflenet_v2_x1_0 to torchvision_mobilenet_v3_large, {}, seed 12"
METHODS = [
    f"{method} {mode}"
    for method in ("reviewkd", "fsp_init", "at", "crd", "kd")
    for mode in ("adaptive", "anti")
]
MEANS = {"loss/task": 12.3456, "loss/kd": 0.5, "loss/reviewkd": 123.4, "loss/policy": 1.25}

# Members that train two epochs of two steps, after two of an earlier start; one is dropped in between.
SHOWN = """
import sys, time
from sakd.terminal import Watch, Watched, start_logging
titles, means = sys.argv[1].split(";"), {means}
log = start_logging()
with Watch({{title: Watched(title, 120, 2) for title in titles}}) as watch:
    for epoch in (3, 4):
        for step in (1, 2):
            for title in titles:
                if (epoch, title) != (4, titles[1 % len(titles)]) or len(titles) == 1:
                    watch.step(title, epoch, step, 2, lambda: means)
            time.sleep(0.6)
        for title in titles:
            watch.epoch(title, {{"epoch": float(epoch), "seconds": 3661.0, "test/accuracy": 71.5, **means}})
            if epoch == 3 and len(titles) > 1 and title == titles[1]:
                watch.drop(title, "the loss of reviewkd became nan, " + 9 * "as it may, " + "\\nand so on")
    log.info("said below it all, by a %s", "message")
"""


def on_a_terminal(columns: int, *titles: str) -> list[str]:
    """The lines that a process has drawn in a pseudo-terminal of so many columns, and drawn again."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SHOWN.format(means=MEANS), ";".join(titles)],
        cwd=ROOT, stdin=its, stdout=its, stderr=its, env=environment | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(its)
    drawn = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # it has ended
            break
        drawn += part
    os.close(ours)
    assert process.wait(30) == 0, drawn.decode()
    lines = re.split(r"[\r\n]+|\x1b\[\d*[A-HJK]", drawn.decode())
    return [line for line in (re.sub(r"\x1b\[[\d;?]*[a-z]", "", line) for line in lines) if line.strip()]


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_a_cohort_has_a_bar_and_a_line_for_each_member_within_the_terminals_width(columns):
    lines = on_a_terminal(columns, *(LONG.format(method) for method in METHODS))
    assert max(map(len, lines)) <= columns
    lines.remove("said below it all, by a message")
    for line in lines:
        assert re.search(r"epoch [234]/120 .*(left (\d+:\d\d|-:--)|the loss of .*\.\.\.)", line), line
    for method in METHODS:  # what tells them apart is not what is cut
        assert any(f"{method}, seed 12 " in line for line in lines)
    bars = [line for line in lines if "together" in line]
    assert {line.split(" together")[0] for line in bars} == {"10", "9"}
    assert all("━" in line for line in bars)
    assert not any("━" in line for line in lines if line not in bars)
    assert any("  the loss of " in line for line in lines)
    assert any("test 71.50 %" in line for line in lines)


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_a_single_run_has_one_line_within_the_terminals_width(columns):
    lines = on_a_terminal(columns, LONG.format("reviewkd adaptive"))
    assert max(map(len, lines)) <= columns
    lines.remove("said below it all, by a message")
    for line in lines:
        assert re.search(r"seed 12 +epoch [234]/120 .*━.* left (\d+:\d\d|-:--)", line), line


def test_in_a_terminal_with_room_nothing_gives_way():
    lines = on_a_terminal(240, LONG.format("reviewkd adaptive"))
    last = [line for line in lines if "epoch 4/120" in line][-1]
    losses = "task 12.346  kd 0.500  reviewkd 123.400  policy 1.250"
    assert last.startswith(LONG.format("reviewkd adaptive") + "  epoch 4/120  ╸━")
    assert f"{losses}  test 71.50 %  left " in last


@contextmanager
def logging_started() -> Iterator[logging.Logger]:
    """As in a process that was launched; afterwards as before, in the test's process."""
    log = logging.getLogger("sakd")
    before = log.handlers, log.propagate, log.level
    log.handlers = []
    try:
        yield start_logging()
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


@pytest.fixture
def shown(monkeypatch):
    """A console that is no terminal, or, with ``width``, one that is; and what it shows."""

    def started(width: int | None = None) -> io.StringIO:
        file = io.StringIO()
        keys = {"width": width, "force_terminal": width is not None, "color_system": None}
        monkeypatch.setattr(terminal, "console", Console(file=file, soft_wrap=True, highlight=False, **keys))
        return file

    return started


@pytest.mark.parametrize("width", range(30, 200, 3))
@pytest.mark.parametrize("members", [1, 3])
def test_epoch_and_time_left_are_never_cut(width, members, shown):
    shown(width)
    watch = Watch({name: Watched(LONG.format(name), 1000, 990) for name in METHODS[:members]})
    for name in watch.members:
        watch.epoch(name, {"epoch": 998, "seconds": 1.0, "test/accuracy": 100.0, **MEANS})
    options = terminal.console.options.update(width=width)
    for line in terminal.console.render_lines(watch, options, pad=False):
        text = "".join(segment.text for segment in line)
        assert len(text) <= width
        assert re.search(r"epoch 998/1000 .*left \d+:\d\d *$", text), text


def test_losses_go_before_the_title_and_the_title_before_the_accuracy(shown):
    shown(80)
    watch = Watch({"a": Watched(LONG.format("at"), 9, 0)})
    watch.epoch("a", {"epoch": 3, "seconds": 1.0, "test/accuracy": 50.0, **MEANS})

    def line(width: int) -> str:
        (segments,) = terminal.console.render_lines(
            watch, terminal.console.options.update(width=width), pad=False
        )
        return "".join(segment.text for segment in segments)

    whole = next(width for width in range(60, 300) if "task" in line(width))
    assert LONG.format("at") in line(whole)
    assert LONG.format("at") in line(whole - 1)
    shorter = line(whole - len("task 12.346  kd 0.500  reviewkd 123.400  policy 1.250") - GAP - 10)
    assert re.match(r"torchvision\S*\.\.\..*, at, seed 12 ", shorter)
    assert "test 50.00 %" in shorter
    assert "━" in shorter
    assert len(shorter.partition("  epoch")[0]) == len(LONG.format("at")) - 10
    assert "test" not in line(60)
    assert "━" in line(70)
    assert "━" not in line(50)


def test_without_a_terminal_every_epoch_has_its_whole_line(shown):
    file = shown()
    with Watch({name: Watched(LONG.format(name), 4, 2) for name in METHODS}) as watch:
        for name in METHODS:
            watch.step(name, 3, 1, 1, lambda: MEANS)
            watch.epoch(name, {"epoch": 3, "seconds": 0.25, "test/accuracy": 50.0, **MEANS})
        watch.drop(METHODS[0], "its disk is full\nand more")
    *epochs, dropped = file.getvalue().splitlines()
    losses = "task 12.346  kd 0.500  reviewkd 123.400  policy 1.250"
    for method, line in zip(METHODS, epochs, strict=True):
        assert re.fullmatch(
            re.escape(f"{LONG.format(method)}  epoch 3/4  {losses}  test 50.00 %  0.2 s  left ") + r"\d:\d\d",
            line,
        )
    assert dropped == f"{LONG.format(METHODS[0])}  epoch 3/4  its disk is full"


def test_measurements_are_looked_at_now_and_then_of_every_member_in_turn(shown, monkeypatch):
    shown()
    looks, ticks = [], itertools.count(4000)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(ticks) / 4)  # seconds
    with Watch({name: Watched(name, 9, 0) for name in "abc"}) as watch:
        for step in range(1, 61):
            for name in "abc":
                watch.step(name, 1, step, 60, lambda name=name: looks.append(name) or MEANS)
    assert "".join(looks) == "abc" + "bca" + "cab" + "abc" + "bca"  # every 40 steps, which is 10 seconds


def test_what_a_look_raises_passes_through(shown):
    shown()

    def means():
        raise NonFiniteLossError("loss/task became nan")

    with pytest.raises(NonFiniteLossError), Watch({"a": Watched("a", 9, 0)}) as watch:
        watch.step("a", 1, 1, 2, means)


def test_the_time_left_follows_the_pace_since_a_member_goes_on(shown, monkeypatch):
    """Members that catch up train while others wait, which is not their pace."""
    file = shown()
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with Watch({"behind": Watched("behind", 10, 0), "ahead": Watched("ahead", 8, 4)}) as watch:
        for epoch in range(1, 6):
            for name in ("behind", "ahead"):
                if name == "behind" or epoch == 5:
                    now += 60
                    watch.step(name, epoch, 1, 1, lambda: MEANS)
            for name in ("behind", "ahead"):
                if name == "behind" or epoch == 5:
                    watch.epoch(name, {"epoch": epoch, "seconds": 60.0, **MEANS})
    behind, ahead = file.getvalue().splitlines()[-2:]
    assert behind.endswith("left 6:00")  # 5 epochs took 6 minutes, of which one was the other's
    assert ahead.endswith("left 3:00")


def test_news_of_one_topic_is_told_once_until_something_else_is(shown):
    file = shown()
    with logging_started() as log:
        for state in ("away", "away", "back", "back", "away"):
            log.warning("a store is %s", state, extra={"news": ("a store", state)})
            log.warning("another is %s", state, extra={"news": ("another", state)})
            log.warning("all the same")
    told = file.getvalue().splitlines()
    assert [line.rpartition(" ")[2] for line in told if line.startswith("a store")] == [
        "away",
        "back",
        "away",
    ]
    assert len(told) == 3 + 3 + 5


STUDENT = {"name": "vgg8", "accuracy": 90.0, "best_accuracy": 91.0, "best_epoch": 2}
RESULT = {"teacher": {"name": "vgg13", "accuracy": 95.0}, "student": STUDENT, "seconds": 3.0}


@pytest.mark.parametrize("see_it", [None, "mlflow ui --backend-store-uri sqlite:///mlflow.db"])
def test_a_result_is_a_table_with_what_shows_more_of_it(see_it, shown):
    file = shown()
    show_result({**RESULT, "kept": {"stage1": 0.5}}, "runs/x", see_it, [], None)
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in file.getvalue().splitlines())
    assert rows["student"] == "vgg8  90.00 % last, 91.00 % best (epoch 2)"
    assert rows["kept"] == "stage1  50.0 %  (last epoch)"
    assert rows.get("see it") == see_it


def epochs_keeping(policy: bool, **shares: list[float]) -> list[dict[str, float]]:
    """Measurements of epochs that kept these shares, by spot."""
    learned = {"loss/policy": 0.1} if policy else {}
    epochs = zip(*shares.values(), strict=True)
    return [
        learned | {f"kept/{spot}": share for spot, share in zip(shares, kept, strict=True)} for kept in epochs
    ]


FALLING, RISING = [0.9, 0.8, 0.7, 0.5, 0.3], [0.8, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("policy", "shares", "expected"),
    [
        (
            True,
            {"stage2": FALLING, "logits": RISING},
            [
                "kept      stage2  90.0 %  logits  80.0 %  (epoch 1)",
                "          stage2  70.0 %  logits 100.0 %  (epoch 3)",
                "          stage2  30.0 %  logits 100.0 %  (epoch 5)",
                "look at   stage2: distilled for 90.0 % of the images at first, 30.0 % in the end",
                "for whom  sakd spots runs/x --output pictures",
            ],
        ),
        (
            True,
            {"stage2": [0.4, 0.2]},
            [
                "kept      stage2  40.0 %  (epoch 1)",
                "          stage2  20.0 %  (epoch 2)",
                "look at   stage2: distilled for 40.0 % of the images at first, 20.0 % in the end",
                "for whom  sakd spots runs/x --output pictures",
            ],
        ),
        (
            False,
            {"stage2": [0.5, 0.5, 0.25]},
            [
                "kept     stage2  50.0 %  (epoch 1)",
                "         stage2  50.0 %  (epoch 2)",
                "         stage2  25.0 %  (epoch 3)",
            ],
        ),
        (False, {"logits": [1.0, 1.0]}, ["kept     logits 100.0 %  (every epoch)"]),
    ],
    ids=["adaptive", "two epochs", "random", "fixed"],
)
def test_a_result_shows_what_was_kept_over_the_epochs_and_where_a_policy_changed_most(
    policy, shares, expected, shown
):
    file = shown()
    last = {spot: kept[-1] for spot, kept in shares.items()}
    command = "sakd spots runs/x --output pictures"
    show_result({**RESULT, "kept": last}, "runs/x", None, epochs_keeping(policy, **shares), command)
    assert file.getvalue().splitlines()[2:-2] == expected


def test_a_command_is_in_one_piece_however_narrow_the_terminal(shown):
    file = shown(40)
    command = f"sakd spots runs/{'x' * 200} --output pictures"
    show_result({**RESULT, "kept": {"logits": 0.5}}, "x", None, epochs_keeping(True, logits=[0.5]), command)
    assert f"for whom  {command}" in file.getvalue().splitlines()


def test_a_student_alone_has_nothing_kept_to_show(shown):
    file = shown()
    show_result({**RESULT, "teacher": None, "kept": {}}, "runs/x", None, [{"loss/task": 0.1}], None)
    labels = [line.partition("  ")[0].strip() for line in file.getvalue().splitlines()]
    assert labels == ["student", "seconds", "folder"]


@pytest.mark.parametrize("width", [80, None])
def test_what_is_counted_has_a_bar_on_a_terminal_and_nothing_elsewhere(width, shown):
    file = shown(width)
    with terminal.counting("images in a folder with a long name, " + "or " * 30, 5000) as advance:
        advance(1234)
        advance(1)
    drawn = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "\n", file.getvalue()).splitlines()
    counted = r"images in ?\.\.\..* 1,235/5,000 .*━.* left \d+:\d\d *"
    assert any(re.fullmatch(counted, line) for line in drawn) == (width is not None)
    assert max(map(len, drawn), default=0) <= (width or 0)
