"""Functions of a batch, captured once as CUDA graphs and replayed.

The operations are the same, launched at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sakd.data import Batch

# Before a capture, as PyTorch asks for: libraries set themselves up, optimizers make buffers.
WARM_UP_CALLS = 3
# From this version of PyTorch on, captures find the generators that they draw from.
REGISTERED_BY_CAPTURE = (2, 14)


class PlacedBatches:
    """Copies each batch to where the last one of its size lay.

    A captured function reads the same memory again.
    """

    def __init__(self):
        self.places: dict[int, Batch] = {}

    def __call__(self, batch: Batch) -> Batch:
        place = self.places.setdefault(len(batch.labels), Batch(*(tensor.clone() for tensor in batch)))
        for static, given in zip(place, batch, strict=True):
            static.copy_(given, non_blocking=True)
        return place


class Captured:
    """A ``function`` of a batch in a place of its own and, perhaps, of features in theirs, as CUDA graphs.

    It is captured at the first call for each batch size, and anew when ``settings()`` gives another value,
    such as other learning rates. Capturing trains nothing: what its own calls change is put back by
    ``unchanged()``. What it returns is overwritten by the next call. Replays run on a stream of their own,
    behind what the current stream has to do; ``join`` makes that wait for them.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        *,
        settings: Callable[[], object] = lambda: None,
        unchanged: Callable[[], AbstractContextManager] = nullcontext,
        forget: Callable[[], None] = lambda: None,  # what must be made in the graph's own memory
        generators: Sequence[torch.Generator] = (),
    ):
        self.function, self.settings, self.unchanged, self.forget = function, settings, unchanged, forget
        self.generators = generators
        self.stream = torch.cuda.Stream(device)
        self.captured_with: object = None
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, images: Tensor, *others: Any) -> Any:
        settings = self.settings()
        if settings != self.captured_with:
            self.captured_with, self.captured = settings, {}
        if len(images) not in self.captured:
            self.captured[len(images)] = self._capture(images, *others)
        graph, outputs = self.captured[len(images)]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.replay()
        return outputs

    def join(self) -> None:
        """Let the current stream wait for the last replay."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, *inputs: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with self.unchanged():
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP_CALLS):
                    self.function(*inputs)
            self.join()
            if torch.__version__ < REGISTERED_BY_CAPTURE:
                for generator in self.generators:
                    graph.register_generator_state(generator)
            self.forget()
            # Threads that pin memory for batches may allocate meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self.function(*inputs)
        return graph, outputs


@contextmanager
def unchanged(
    state: Callable[[], Mapping[str, Any]], generators: Sequence[torch.Generator], device: torch.device
) -> Iterator[None]:
    """Put back, at the end, the tensors of ``state()`` and all random generators.

    In place, so that what holds the same memory sees it. What an optimizer adds at its first step is left at
    zero, which is how its second finds it after no first.
    """
    before = [(tensor, tensor.clone()) for tensor in tensors_of(state())]
    own_draws = [(generator, generator.get_state()) for generator in generators]
    on_cpu = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        known = {tensor.data_ptr() for tensor, _ in before}
        for tensor in tensors_of(state()):
            if tensor.data_ptr() not in known:
                tensor.zero_()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        for generator, drawn in own_draws:
            generator.set_state(drawn)
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_of(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_of(value)
