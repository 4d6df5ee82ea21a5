"""Files that are there whole or not at all."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sakd.errors import RunError


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file.

    Raises RunError if it is no JSON object, or cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path}: found no valid JSON ({error}); move the file away") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: found {type(content).__name__}, expected a JSON object; move the file away")
    return content


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place, to the disk, and rename it.

    After a kill or on a full disk the old file is still there, whole. Raises RunError if it cannot be
    written.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # others may write the same file
    with explained(path):
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


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
