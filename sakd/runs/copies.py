"""Whether a copy of the code is still what was copied.

It is asked before Python imports anything from the copy, so this file needs nothing of sakd: a job runs its
text, as it was when the job was submitted.

    python -I -c TEXT COPY
"""

import hashlib
import json
import os
import sys
from pathlib import Path

NOTE = "snapshot.json"  # in a copy: its commit and time, and the checksum of every other file


def name_of(commit: str | None, checksums: dict[str, str]) -> str:
    """The name of a copy of files with these ``checksums``, by their relative paths."""
    return hashlib.sha256(json.dumps([commit, checksums], sort_keys=True).encode()).hexdigest()[:16]


def checksum(path: Path) -> str:
    """Checksum of a file; of a link, of where it points."""
    if path.is_symlink():
        return "link " + hashlib.sha256(os.fsencode(os.readlink(path))).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def what_differs(copy: Path) -> str | None:
    """The first path in a copy that is not as it was copied; None if all are. Raises OSError."""
    try:
        note = json.loads((copy / NOTE).read_bytes())
        commit, checksums = note["commit"], dict(note["files"])
    except (ValueError, LookupError, TypeError):
        return NOTE
    if name_of(commit, checksums) != copy.name:
        return NOTE
    found = {NOTE}
    for folder, folders, files in os.walk(copy):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found |= {os.path.relpath(os.path.join(folder, name), copy) for name in (*files, *links)}
    for path in sorted(found | checksums.keys()):
        if path != NOTE and (path not in found or checksum(copy / path) != checksums.get(path)):
            return path
    return None


def refusal(copy: Path) -> str | None:
    """What is wrong with a copy, in one line; None if it is as it was copied."""
    try:
        path = what_differs(copy)
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    if path is None:
        return None
    return (
        f"{copy / path}: is not as it was copied, expected the code that the jobs were submitted with; move "
        f"{copy} away, and launch again"
    )


if __name__ == "__main__":
    sys.exit(refusal(Path(sys.argv[1])))
