"""Named streams of random numbers.

Initialisation, data and policy draw from streams of their own, so that with one seed every spot mode starts
from the same weights and sees the same batches. A stream is a function of (seed, name, epoch): resuming at an
epoch needs no stored state."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def stream_seed(seed: int, name: str, epoch: int = 0) -> int:
    """63 bits that depend on all three arguments, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, name: str, epoch: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator at the start of the stream."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, name, epoch))


@contextmanager
def drawing(seed: int, name: str, epoch: int = 0, device: torch.device | str = "cpu") -> Iterator[None]:
    """What draws from the device's global generator inside, such as dropout, draws from the stream; it is
    left as it was."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stream_seed(seed, name, epoch))
        yield


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """For code that draws from the global CPU generator, as torchvision's transforms do: inside it starts at
    ``seed``; it is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def initialising(seed: int, name: str) -> AbstractContextManager[None]:
    """Modules built inside draw their weights from the stream ``init/<name>``; the global generator is left
    as it was."""
    return drawing(seed, f"init/{name}")
