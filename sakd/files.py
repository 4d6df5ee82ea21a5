"""Files that are there whole or not at all, and tell when they are not what was written."""

import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sakd.errors import RunError

SEAL = b"\nsha256 "  # begins the line that ends a sealed file, behind what it is the checksum of
SEALED = len(SEAL) + 64 + 1  # bytes of that line
CHECKSUM = "sha256"  # the key of a JSON object that holds the checksum of all others


def read_whole(path: Path) -> bytes | None:
    """Read a file that lies in a folder of runs; None if there is no such file.

    Others may write there, too: a link is not followed. Raises RunError for what is no file of its own, or
    cannot be read.
    """
    try:
        with open(path, "rb", opener=_open_to_read) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RunError(f"{path}: found no file; expected one, move away what is there")
            return file.read()
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise RunError(f"{path}: found a folder, expected a file; move it away") from error
    except NotADirectoryError as error:
        file = next(parent for parent in path.parents if parent.exists())
        raise RunError(f"{file}: found a file, expected a folder; move it away") from error
    except OSError as error:
        refuse_link(path)
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def _open_to_read(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe in its place would be waited for


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file.

    Raises RunError if it is no JSON object, has another checksum than it was written with, or cannot be read.
    """
    raw = read_whole(path)
    if raw is None:
        return None
    try:
        return parse_json(raw)
    except ValueError as error:
        raise RunError(f"{path}: {error}; move the file away") from error


def parse_json(raw: bytes, always_sealed: bool = False) -> dict[str, Any]:
    """The JSON object that ``raw`` is, without its checksum.

    Raises ValueError if it is none, or has another checksum than it was written with. One without was written
    without, by an earlier version, unless what it is was ``always_sealed``.
    """
    try:
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError(f"found {type(content).__name__}, expected a JSON object")
        expected = content.pop(CHECKSUM, None)
        found = None if expected is None else _checksum(content)
    except RecursionError as error:
        raise ValueError("found no valid JSON, but lists in lists without end") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"found no valid JSON ({error})") from error
    if expected is None and always_sealed:
        raise ValueError(f"found no {CHECKSUM}, expected its checksum")
    if found != expected:
        raise ValueError(
            f"found checksum {found}, expected {expected} as it says itself; it is damaged or was changed"
        )
    return content


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Content with the checksum that ``parse_json`` holds it to."""
    return {**content, CHECKSUM: _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(content: io.BytesIO) -> memoryview:
    """Append the content's checksum to it, as a line that readers of the format do not see; all of it."""
    content.seek(0, io.SEEK_END)
    with content.getbuffer() as written:
        line = SEAL + hashlib.sha256(written).hexdigest().encode() + b"\n"
    content.write(line)
    return content.getbuffer()


def is_sealed(content: bytes) -> bool:
    """True if this is what was sealed, to the last bit."""
    written, line = memoryview(content)[:-SEALED], content[-SEALED:]
    return line == SEAL + hashlib.sha256(written).hexdigest().encode() + b"\n"


def refuse_link(path: Path) -> None:
    """Raise RunError if a link lies at this path, in a folder where others may write, too."""
    if path.is_symlink():
        raise RunError(f"{path}: found a link, expected none in a folder of runs; move it away")


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place, to the disk, and rename it.

    After a kill or on a full disk the old file is still there, whole, and nothing beside it but after a kill.
    Raises RunError if it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # others may write the same file
    with explained(path):
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def append(path: Path, line: str) -> None:
    """Append a line to a file, to the disk; a link is not followed.

    Raises RunError if it cannot be written.
    """
    with explained(path):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(path, flags, 0o666), "w") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Tell an error of the disk by the file that it concerns: raise it as RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; what was saved before is kept, the same command "
            "goes on from there"
        ) from error
