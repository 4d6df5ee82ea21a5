"""Named streams of random numbers.

Initialisation, data and policy draw from streams of their own, so that with one seed every spot mode starts
from the same weights and sees the same batches. A stream is a function of (seed, name, epoch): resuming at an
epoch needs no stored state.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_seed(seed: int, name: str, epoch: int = 0) -> int:
    """Seed of a stream: 63 bits that depend on all three arguments, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, name: str, epoch: int = 0) -> torch.Generator:
    """A fresh generator on the CPU, at the start of the stream."""
    return torch.Generator().manual_seed(stream_seed(seed, name, epoch))


class GlobalDraws:
    """A stream for what draws from the device's global generators, such as dropout.

    It can be put in their place again and again: networks that take steps in turn draw as each would alone.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.on_cpu = torch.Generator()
        self.on_gpu = torch.Generator(self.device) if self.device.type == "cuda" else None

    def restart(self, seed: int, name: str, epoch: int) -> None:
        """Begin the stream of this seed, name and epoch."""
        for generator in (self.on_cpu, self.on_gpu):
            if generator is not None:
                generator.manual_seed(stream_seed(seed, name, epoch))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Let global draws inside come from the stream; outside they go on as if it had not been."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self.on_cpu.get_state())
        try:
            with self._on_gpu():
                yield
        finally:
            self.on_cpu.set_state(torch.get_rng_state())
            torch.set_rng_state(outer)

    @contextmanager
    def _on_gpu(self) -> Iterator[None]:
        """Put the stream in the place of the GPU's generator.

        The states themselves change places, not their values: a captured graph draws from the one it has
        seen.
        """
        if self.on_gpu is None:
            yield
            return
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        shared = torch.cuda.default_generators[index]
        outer = shared.graphsafe_get_state()
        shared.graphsafe_set_state(self.on_gpu.graphsafe_get_state())
        try:
            yield
        finally:
            shared.graphsafe_set_state(outer)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let the global CPU generator start at ``seed`` inside, and leave it as it was.

    Code draws from it that takes no generator, such as torchvision's transforms.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def initialising(seed: int, name: str) -> Iterator[None]:
    """Let modules that are built inside draw their weights from the stream ``init/<name>``.

    The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, f"init/{name}"))
        yield
