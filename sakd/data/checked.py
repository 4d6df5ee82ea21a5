"""Which image files have been found whole: remembered by path, size and time of change."""

import os
from hashlib import blake2b
from pathlib import Path

import numpy as np

from sakd.errors import RunError
from sakd.files import explained, read_whole, write_whole

PRINT = np.dtype("<u8")  # a fingerprint of a file
NO_FILE = 0  # the fingerprint of what is not there


def fingerprints(folder: str, paths: np.ndarray) -> np.ndarray:
    """A number for each file, another one once its path, size or time of change is another: uint64 [N].

    ``paths``: [N] bytes, from ``folder`` on.
    """
    root = os.fsencode(os.path.realpath(folder))
    return np.array([_fingerprint(os.path.join(root, path)) for path in paths], dtype=PRINT)


def _fingerprint(path: bytes) -> int:
    try:
        found = os.stat(path)
    except OSError:
        return NO_FILE
    text = b"%s\0%d\0%d" % (path, found.st_size, found.st_mtime_ns)
    return int.from_bytes(blake2b(text, digest_size=PRINT.itemsize).digest(), "little") or 1


def are_remembered(prints: np.ndarray, memory: Path) -> np.ndarray:
    """Which of the fingerprints are in the file ``memory``: bool [N]."""
    return np.isin(prints, _read(memory))


def remember(prints: np.ndarray, memory: Path) -> None:
    """Add fingerprints to the file ``memory``. Raises RunError if it cannot be written."""
    with explained(memory):
        memory.parent.mkdir(parents=True, exist_ok=True)
    write_whole(memory, np.union1d(_read(memory), prints).tobytes())


def _read(memory: Path) -> np.ndarray:
    """All fingerprints in a file; a damaged one, or none that can be read, only knows fewer files."""
    try:
        content = read_whole(memory) or b""
    except RunError:
        content = b""
    return np.frombuffer(content[: len(content) // PRINT.itemsize * PRINT.itemsize], dtype=PRINT)
