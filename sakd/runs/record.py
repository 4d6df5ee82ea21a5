"""The record of what a run's spot mode decided: ``spots.npz`` in its folder.

A file of arrays that ``numpy.load`` opens, without pickle; numpy's format, since it needs no library that an
environment with torch has not. Its arrays:

- ``kept`` uint8 [epochs, spots, ceil(N / 8)]: a bit for each training image, 1 where it was distilled at the
  spot in that epoch. ``numpy.unpackbits(kept, axis=-1, count=N)`` gives them. An image that an epoch leaves
  out (``sakd.data.train_batches``) is 0.
- ``epochs`` int32 [epochs], from 1; all, unless ``record_spots`` was off for some.
- ``spots``, the spots' names; ``train_labels`` int64 [N], and ``train_indices`` int64 [N], the images' places
  in the data set's training split.

And once the run is finished, of ``train`` and ``test`` images as they are evaluated, ``<split>_indices``,
``<split>_labels`` and what ``sakd.training.seen`` gives, by its names: ``<split>_student_confidence``, ….
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sakd.errors import RunError
from sakd.files import read_whole

FILE = "spots.npz"
SPLITS = ("train", "test")
BY_SPOT = {"probability": "f", "route": "b", "kept": "b"}  # [M, spots] of a split, by kind of number
BY_IMAGE = {  # [M]
    "indices": "i",
    "labels": "i",
    **dict.fromkeys(("student_confidence", "student_loss", "teacher_confidence", "teacher_loss"), "f"),
    **dict.fromkeys(("student_right", "teacher_right"), "b"),
}
KINDS = BY_SPOT | BY_IMAGE
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class StoredSeen:
    """What is known of a split's images after the last epoch, by the names of ``sakd.training.seen``.

    ``probability``, ``route`` and ``kept`` are None where the spot mode does not learn.
    """

    indices: np.ndarray
    labels: np.ndarray
    student_confidence: np.ndarray
    student_right: np.ndarray
    student_loss: np.ndarray
    teacher_confidence: np.ndarray
    teacher_right: np.ndarray
    teacher_loss: np.ndarray
    probability: np.ndarray | None = None
    route: np.ndarray | None = None
    kept: np.ndarray | None = None


@dataclass(frozen=True)
class StoredRecord:
    """A record that was read. ``arrays`` as the module says."""

    arrays: Arrays

    @cached_property
    def spots(self) -> list[str]:
        return self.arrays["spots"].tolist()

    @property
    def epochs(self) -> np.ndarray:
        """Numbers of the recorded epochs, int32."""
        return self.arrays["epochs"]

    @property
    def labels(self) -> np.ndarray:
        """Of the training images, int64 [N]."""
        return self.arrays["train_labels"]

    @property
    def indices(self) -> np.ndarray:
        """Places of the training images in the data set's training split, int64 [N]."""
        return self.arrays["train_indices"]

    def kept_of(self, spot: str) -> np.ndarray:
        """Where each training image was distilled at ``spot``, by epoch: bool [epochs, N]."""
        bits = self.arrays["kept"][:, self.spots.index(spot)]
        return np.unpackbits(bits, axis=-1, count=len(self.labels)).astype(bool)

    def of(self, split: str) -> StoredSeen | None:
        """What is known of a split's images after the last epoch; None while the run is not finished."""
        if f"{split}_student_right" not in self.arrays:
            return None
        own = {key.partition("_")[2]: self.arrays[key] for key in self.arrays if key.startswith(f"{split}_")}
        return StoredSeen(**own)


class Recording:
    """The record of a run under way."""

    def __init__(self, spots: Sequence[str], labels: np.ndarray, indices: np.ndarray):
        self.known = {"spots": np.array(spots), "train_labels": labels, "train_indices": indices}
        self.epochs: list[int] = []
        self.kept: list[np.ndarray] = []
        self.checksum = hashlib.sha256()

    def add(self, epoch: int, kept: np.ndarray) -> None:
        """Take in an epoch's bits, uint8 [spots, ceil(N / 8)]."""
        self.epochs.append(epoch)
        self.kept.append(kept)
        self.checksum.update(np.int32(epoch).tobytes() + kept.tobytes())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it: numbers of its epochs, and the checksum of their bits."""
        return {"epochs": list(self.epochs), "sha256": self.checksum.hexdigest()}

    def go_on(self, path: Path, state: Mapping[str, Any]) -> None:
        """Go on after the epochs of ``state``, with their bits from the file; it may have more.

        Raises RunError if it has not what was recorded.
        """
        try:
            arrays = read_arrays(path)
            if arrays is None:
                raise RunError(f"{path}: found no such file")
            for epoch, kept in zip(arrays["epochs"].tolist(), arrays["kept"], strict=True):
                if len(self.epochs) < len(state["epochs"]):
                    self.add(epoch, kept)
            if self.state() != state:
                raise RunError(f"{path}: found other decisions than were recorded")
        except RunError as error:
            raise RunError(
                f"{error}; expected those of the {len(state['epochs'])} epochs recorded so far. Bring it "
                "back, go on without a record by record_spots=false, or move last.pt away to train from the "
                "start"
            ) from error

    def content(self, seen: Mapping[str, np.ndarray] | None = None) -> bytes:
        """The file's content; in the end with what was ``seen``, and then compressed."""
        arrays = {"kept": np.stack(self.kept), "epochs": np.array(self.epochs, np.int32), **self.known}
        buffer = io.BytesIO()
        if seen is None:
            np.savez(buffer, **arrays)
        else:
            np.savez_compressed(buffer, **{**arrays, **seen})
        return buffer.getvalue()


def read_record(folder: Path) -> StoredRecord:
    """The record of a run's folder.

    Raises RunError if there is none, or it is damaged.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise RunError(f"{folder}: found no such folder, expected a run's")
    arrays = read_arrays(path)
    if arrays is None:
        raise RunError(
            f"{path}: found no such file; runs with a teacher leave one after their first epoch, unless they "
            "have record_spots=false"
        )
    return StoredRecord(arrays)


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a record; None if there is no such file. Raises RunError if it is damaged."""
    raw = read_whole(path)
    if raw is None:
        return None
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        _check(arrays)
    except (
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        OSError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        told = " ".join(str(error).split())
        raise RunError(
            f"{path}: cannot be read ({told:.120}), expected a record as numpy writes it"
        ) from error
    return arrays


def _check(arrays: Arrays) -> None:
    """Raise ValueError, or KeyError for one that is missing, unless the arrays fit together."""
    epochs, spots, _ = arrays["kept"].shape
    if not epochs:
        raise ValueError("found no epochs")
    samples = {split: len(arrays[f"{split}_labels"]) for split in SPLITS if f"{split}_labels" in arrays}
    expected = {
        "kept": ("u", (epochs, spots, -(-samples["train"] // 8))),
        "epochs": ("i", (epochs,)),
        "spots": ("U", (spots,)),
    }
    for split, count in samples.items():
        own = [key.removeprefix(f"{split}_") for key in arrays if key.startswith(f"{split}_")]
        needed = BY_IMAGE if "student_right" in own else ("indices",)
        for name in {*own, *needed}:
            key = f"{split}_{name}"
            expected[key] = (KINDS[name], (count, spots) if name in BY_SPOT else (count,))
    for key, (kind, shape) in expected.items():
        found = arrays[key]
        if (found.dtype.kind, found.shape) != (kind, shape):
            raise ValueError(f"{key}: found {found.dtype} {found.shape}, expected {kind} {shape}")
