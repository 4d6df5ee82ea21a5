"""Completion at the tab key, in a real bash."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from sakd.cli import main
from sakd.configuration.compose import completions
from tests.conftest import ROOT


def test_overrides_are_completed_by_what_there_is():
    assert completions([], "student=wrn_28") == ["student=wrn_28_10"]
    assert completions(["-m", "seed=0,1"], "optimizer.l") == ["optimizer.lr="]
    assert completions(["student=no_such"], "optimizer.l") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_and_completions_by_the_documented_variable(shell):
    assert f"_SAKD_COMPLETE={shell}_source sakd" in (ROOT / "docs/command_line.md").read_text()

    def said(what: str, **variables: str) -> str:
        environment = {"_SAKD_COMPLETE": f"{shell}_{what}", **variables}
        return CliRunner().invoke(main, env=environment, prog_name="sakd").output

    assert f"_SAKD_COMPLETE={shell}_complete" in said("source")
    place = {"zsh": "2", "fish": "distiller=fsp_"}[shell]  # fish gives the word itself
    completed = said("complete", COMP_WORDS="sakd launch distiller=fsp_", COMP_CWORD=place)
    assert "distiller=fsp_init" in completed


@pytest.fixture
def shell(tmp_path):
    """Types into a bash of its own, after what the docs have people evaluate; what it shows."""
    (line,) = re.findall(r"`(eval [^`]*completion[^`]*)`", (ROOT / "docs/command_line.md").read_text())
    command = tmp_path / "bin/sakd"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m sakd "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
    )  # fmt: skip
    os.set_blocking(ours, False)

    def shows(typed: str, expected: str, seconds: float = 30) -> bool:
        os.write(ours, typed.encode())
        shown, until = "", time.monotonic() + seconds
        while time.monotonic() < until and not re.search(expected, shown):
            try:
                shown += os.read(ours, 65536).decode()
            except BlockingIOError:
                time.sleep(0.05)
        return re.search(expected, shown) is not None

    try:
        assert shows(f"{line}; echo read''y\n", "ready")
        yield shows
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "completed"),
    {
        "sakd compa": "sakd compare ",
        "sakd launch -m student=resnet8,vgg8 teacher=wrn_28": "teacher=wrn_28_10 ",
        "sakd launch prec": "precision",
        "sakd status sweeps=dig": "sweeps=digits ",
        "python launch.py student=wrn_28": "student=wrn_28_10",
    }.items(),
)
def test_the_tab_key_completes(typed, completed, shell):
    assert shell(typed + "\t", re.escape(completed))
