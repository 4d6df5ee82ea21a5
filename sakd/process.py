"""Setting up a process that trains: its memory, its threads, its arithmetic."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# glibc's mallopt: parameters by number, and the highest values that it takes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
UNTRIMMED = 2**31 - 1
LARGEST_IN_HEAP = (2**28, 2**25)  # bytes, the second for releases of glibc that take no more
SPINS = "1000"  # rounds that an idle thread of OpenMP waits awake


def set_up() -> None:
    """Arrange what a process that trains wants; to be called before torch is imported.

    It reads the environment then. What this says already is left as it is.
    """
    # Idle OpenMP threads give way soon: where runs share cores, spinning ones make them several times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let the heap keep what a step frees for the next one; True if that could be arranged.

    Otherwise glibc gives a step's activations back to the system again and again, which hands them out anew
    page by page, filled with zeros. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # First the size from which blocks lie outside of the heap: any parameter that is set ends glibc's own
    # adapting of it.
    if mallopt is None or not any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST_IN_HEAP):
        return False
    return bool(mallopt(TRIM_THRESHOLD, UNTRIMMED))


@contextmanager
def uncollected() -> Iterator[None]:
    """Let Python look for no cycles inside, where many objects are made that stay: each look sees them
    all."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Say whether float32 convolutions and products may be rounded to TensorFloat-32 on a GPU, inside."""
    before = [backend.allow_tf32 for backend in _backends()]
    for backend in _backends():
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, was_allowed in zip(_backends(), before, strict=True):
            backend.allow_tf32 = was_allowed


@contextmanager
def quickest_convolutions() -> Iterator[None]:
    """Let cuDNN try its ways to convolve at each new shape, inside, and keep to the quickest.

    That pays where shapes come again, as those of batches do. Which way is the quickest may differ from
    process to process, and numbers on a GPU then by rounding. A CPU is not concerned.
    """
    _, cudnn = _backends()
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


def _backends() -> tuple[Any, Any]:
    import torch  # here, since all else is to be arranged before it

    return torch.backends.cuda.matmul, torch.backends.cudnn
