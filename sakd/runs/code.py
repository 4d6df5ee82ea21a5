"""The code that runs: its commit and what differs from it.

And copies that stay as they are while jobs wait for their turn.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from sakd.errors import RunError

ROOT = Path(__file__).parent.parent.parent
NOTE, DIFF = "snapshot.json", "snapshot.diff"
COPIES = ".code"  # the folder, in one of runs, that has the copies
NEW = ("*.py", "conf/*.yaml", "sweeps/*.yaml")  # files that belong to the code before git tracks them
LARGEST = 4 << 20  # bytes; what is larger is no code


@dataclass(frozen=True)
class Code:
    """State of the code.

    ``commit``, and whether files differed from it, None where it is no git checkout; ``snapshot``: the copy's
    name and time where this is one.
    """

    commit: str | None
    changed: bool | None
    snapshot: str | None = None

    def __str__(self) -> str:
        told = (
            "no git checkout"
            if self.commit is None
            else f"commit {self.commit[:12]}{' with changes' * bool(self.changed)}"
        )
        return told if self.snapshot is None else f"{told}, as it was at {self.snapshot}"


def running(root: Path = ROOT) -> tuple[Code, str]:
    """The code that runs, and its difference to the commit as a patch, new files included."""
    if (root / NOTE).exists():
        return Code(**json.loads((root / NOTE).read_text())["code"]), (root / DIFF).read_text()
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        difference = _difference(root)
    except (OSError, subprocess.SubprocessError):
        return Code(None, None), ""
    return Code(commit, bool(difference)), difference


@cache
def of_this_process() -> tuple[Code, str]:
    """The code that runs and its difference, as when the process first asked.

    What it has imported does not change after that.
    """
    return running()


def snapshot(runs: Path, root: Path = ROOT) -> Path:
    """Copy all code under ``root`` to ``runs/.code``, once for each state of it, and return the copy.

    That is what git tracks, and new files of code. A job that puts it first on its PYTHONPATH runs the code
    as it was. Raises RunError where it cannot be written.
    """
    folder = runs / COPIES
    if (root / NOTE).exists():
        return root  # a job that launches others
    try:
        files = {path: _content(root / path) for path in _files(root)}
        total = hashlib.sha256()
        for path, content in sorted(files.items()):
            total.update(
                f"{path}\0{len(content)}\0{isinstance(content, str)}\0".encode() + os.fsencode(content)
            )
        code, difference = running(root)
        total.update(str(code.commit).encode())
        target = folder / total.hexdigest()[:12]
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        copy.chmod(0o755)
        for path, content in files.items():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                (copy / path).symlink_to(content)
            else:
                (copy / path).write_bytes(content)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        note = {"code": asdict(Code(code.commit, code.changed, f"{when} ({target.name})"))}
        (copy / NOTE).write_text(json.dumps(note, indent=2) + "\n")
        (copy / DIFF).write_text(difference)
        try:
            os.rename(copy, target)
        except OSError:
            if not target.exists():
                raise
            shutil.rmtree(copy)  # another process was first
    except OSError as error:
        raise RunError(f"cannot copy the code to {folder}: {error.strerror or error}") from error
    return target


def _content(path: Path) -> bytes | str:
    """Content of a file; of a link, where it points."""
    return os.readlink(path) if path.is_symlink() else path.read_bytes()


def _files(root: Path) -> list[str]:
    """Relative paths of all code.

    In a git checkout, it is what git tracks, and new files of code; else the package alone.
    """
    try:
        listed = [*_git(root, "ls-files", "-z", "--cached").split("\0"), *_untracked(root)]
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


def _untracked(root: Path) -> list[str]:
    """New files of code that git does not ignore; none of a folder of runs, whatever that is called."""
    listed = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *NEW).split("\0")
    return [path for path in listed if path and COPIES not in Path(path).parts]


def _difference(root: Path) -> str:
    patch = ["diff", "--binary", "--no-color", "--no-ext-diff"]
    new = (
        _git(root, *patch, "--no-index", "--", os.devnull, path, allowed=(0, 1)) for path in _untracked(root)
    )
    return "".join([_git(root, *patch, "HEAD", "--", "."), *new])


def _git(root: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
    # A checkout that is somebody else's is read all the same.
    command = ["git", "-C", str(root), "-c", f"safe.directory={root}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=30)
    if done.returncode not in allowed:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout
