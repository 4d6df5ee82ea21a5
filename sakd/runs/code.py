"""The code that runs: its commit and what differs from it.

And copies that stay as they are while jobs wait for their turn.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from sakd import __version__
from sakd.errors import RunError
from sakd.runs import copies
from sakd.runs.copies import NOTE, checksum, name_of

ROOT = Path(__file__).parent.parent.parent
DIFF = "snapshot.diff"
COPIES = ".code"  # the folder, in one of runs, that has the copies
# Where new files belong to the code before git tracks them, and which; so do a plug-in's package or module.
FOLDERS = ("sakd", "hydra_plugins", "conf", "sweeps")
MODULE = ".py"
NEW = (f"*{MODULE}", "*.yaml")
LARGEST = 4 << 20  # bytes; what is larger is no code


@dataclass(frozen=True)
class Code:
    """State of the code.

    ``commit``, and whether files differed from it, None where it is no git checkout, as an installed package;
    ``snapshot``: the copy's name and time where this is one; ``version``: sakd's.
    """

    commit: str | None
    changed: bool | None
    snapshot: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        told = (
            f"{f'version {self.version}, ' if self.version else ''}no git checkout"
            if self.commit is None
            else f"commit {self.commit[:12]}{' with changes' * bool(self.changed)}"
        )
        return told if self.snapshot is None else f"{told}, as it was at {self.snapshot}"


def running(root: Path = ROOT, packages: Collection[str] = ()) -> tuple[Code, str]:
    """The code that runs, and its difference to the commit as a patch, new files of code included.

    These are the project's own, and those of ``packages`` and of all that is imported, where they lie beside
    it. Raises RunError where it is a copy that is not any more what was copied.
    """
    if (root / NOTE).exists():
        check_copy(root)
        note, difference = json.loads((root / NOTE).read_bytes()), (root / DIFF).read_text()
        commit = note["commit"]
        changed = None if commit is None else bool(difference)
        return Code(commit, changed, f"{note['time']} ({root.name})", __version__), difference
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        difference = _git(root, "diff", "--binary", "--no-color", "--no-ext-diff", "HEAD", "--", ".")
        difference += "".join(_as_patch(root, path) for path in _new(root, packages))
    except (OSError, subprocess.SubprocessError):
        return Code(None, None, version=__version__), ""
    return Code(commit, bool(difference), version=__version__), difference


def check_copy(copy: Path) -> None:
    """Raise RunError unless a copy of the code is still what was copied."""
    refusal = copies.refusal(copy)
    if refusal is not None:
        raise RunError(refusal)


@cache
def of_this_process() -> tuple[Code, str]:
    """The code that runs and its difference, as when the process first asked.

    What it has imported does not change after that.
    """
    return running()


def snapshot(runs: Path, root: Path = ROOT, packages: Collection[str] = ()) -> Path:
    """Copy all code under ``root`` to ``runs/.code``, once for each state of it, and return the copy.

    That is what git tracks, and new files of code, as in ``running``. A job that puts it first on its
    PYTHONPATH runs the code as it was. Raises RunError where it cannot be written, or such a copy is there
    and not any more what was copied.
    """
    folder = runs / COPIES
    if (root / NOTE).exists():  # a job that launches others
        check_copy(root)
        return root
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            return _copied(root, packages, copy)
        finally:
            shutil.rmtree(copy, ignore_errors=True)  # if it has not got its name
    except OSError as error:
        raise RunError(f"cannot copy the code to {folder}: {error.strerror or error}") from error


def _copied(root: Path, packages: Collection[str], copy: Path) -> Path:
    """Fill ``copy`` and give it its name, unless there is one of that already; the path that it has then."""
    copy.chmod(0o755)
    code, difference = running(root, packages)
    paths = _files(root, packages)
    for path in paths:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, copy / path, follow_symlinks=False)
    (copy / DIFF).write_text(difference)
    checksums = {path: checksum(copy / path) for path in (*paths, DIFF)}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    note = {"commit": code.commit, "time": when, "files": checksums}
    (copy / NOTE).write_text(json.dumps(note, indent=1) + "\n")
    target = copy.parent / name_of(code.commit, checksums)
    if not target.exists():
        try:
            os.rename(copy, target)
        except OSError:
            if not target.exists():  # else another process was first
                raise
    check_copy(target)
    return target


def _files(root: Path, packages: Collection[str]) -> list[str]:
    """Relative paths of all code.

    In a git checkout, it is what git tracks, and new files of code; else the package alone.
    """
    try:
        listed = [*_git(root, "ls-files", "-z", "--cached").split("\0"), *_new(root, packages)]
        return [path for path in dict.fromkeys(listed) if path and _is_code(root / path)]
    except (OSError, subprocess.SubprocessError):
        package = Path(__file__).parent.parent
        return [
            str(path.relative_to(root))
            for path in package.rglob("*")
            if _is_code(path) and "__pycache__" not in path.parts
        ]


def _is_code(path: Path) -> bool:
    return path.is_symlink() or (path.is_file() and path.stat().st_size <= LARGEST)


def _new(root: Path, packages: Collection[str]) -> list[str]:
    """New files of code that git neither tracks nor ignores."""
    plug_ins = list(_plug_ins(root, {*packages, *sys.modules}))
    folders = [*FOLDERS, *(path for path in plug_ins if not path.endswith(MODULE))]
    patterns = [f":(glob){folder}/**/{kind}" for folder in folders for kind in NEW]
    patterns += [path for path in plug_ins if path.endswith(MODULE)]
    # Git enters no other folder: a virtual environment in the checkout has ten thousands of files.
    asked = ("ls-files", "-z", "--others", "--exclude-standard", "--", "launch.py", *patterns)
    listed = _git(root, *asked).split("\0")
    return [path for path in listed if path and _is_code(root / path) and not (root / path).is_symlink()]


def _plug_ins(root: Path, packages: Collection[str]) -> Iterator[str]:
    """Relative paths of those packages that are folders or modules in ``root``, and none of the project's."""
    for name in sorted({package.partition(".")[0] for package in packages} - {*FOLDERS}):
        module = sys.modules.get(name)
        places = (*getattr(module, "__path__", ()), getattr(module, "__file__", None) or "")
        for path, is_there in ((name, Path.is_dir), (name + MODULE, Path.is_file)):
            own = root / path
            if is_there(own) and (
                module is None or any(Path(place).resolve() == own.resolve() for place in places)
            ):
                yield path


def _as_patch(root: Path, path: str) -> str:
    """A new file as git's patches have it."""
    *lines, last = (root / path).read_bytes().decode(errors="replace").split("\n")
    added = [f"+{line}\n" for line in lines]
    if last:
        added += [f"+{last}\n", "\\ No newline at end of file\n"]
    number = len(lines) + bool(last)
    place = f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1{f',{number}' * (number > 1)} @@\n" * bool(number)
    return f"diff --git a/{path} b/{path}\nnew file mode 100644\n{place}{''.join(added)}"


def _git(root: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
    if (root / "sakd/conf").is_dir():  # an installed package, though its environment may lie in a checkout
        raise FileNotFoundError(f"{root} is no checkout of sakd")
    # A checkout that is somebody else's is read all the same.
    command = ["git", "-C", str(root), "-c", f"safe.directory={root}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=30)
    if done.returncode not in allowed:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout
