"""Functions of a batch, captured once as CUDA graphs and replayed.

The operations are the same, launched at once.
"""

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sakd.data import Batch, Mixing
from sakd.errors import CaptureError, in_one_line

log = logging.getLogger("sakd")

Parts = Batch | Mixing

# Before a capture, as PyTorch asks for: libraries set themselves up, optimizers make buffers.
WARM_UP_CALLS = 2  # and one more, which is watched
# From this version of PyTorch on, captures find the generators that they draw from.
REGISTERED_BY_CAPTURE = (2, 14)


class Placed:
    """Copies the tensors of each batch to where those of the last one of its size lay.

    A captured function reads the same memory again.
    """

    def __init__(self):
        self.places: dict[int, Parts] = {}

    def __call__(self, batch: Parts) -> Parts:
        size = len(batch.labels)
        if size not in self.places:
            self.places[size] = type(batch)(*map(torch.empty_like, batch))
        place = self.places[size]
        for static, given in zip(place, batch, strict=True):
            static.copy_(given, non_blocking=True)
        return place


class Captured:
    """A ``function`` of a batch in a place of its own and, perhaps, of features in theirs, as CUDA graphs.

    The first call is carried out as it is, since optimizers and libraries set themselves up in it. From the
    second on it is captured, once for each batch size, and anew when ``settings()`` gives another value, such
    as learning rates that are no tensors; ``refresh()`` comes before each replay. Capturing trains nothing:
    what its own calls change is put back by ``unchanged()``. What it returns is overwritten by the next call.
    Replays run on a stream of their own, behind what the current stream has to do; ``join`` makes that wait
    for them. All sizes share their memory, since one is replayed at a time.

    Raises CaptureError for a function that waits for the device, or launches nothing there, or something on
    another one or on a stream that is not captured: replays would do without it. Where it ``falls_back``, it
    is said instead, and from then on each call is carried out as it is.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        *,
        settings: Callable[[], object] = lambda: None,
        refresh: Callable[[], None] = lambda: None,
        unchanged: Callable[[], AbstractContextManager] = nullcontext,
        forget: Callable[[], None] = lambda: None,  # what must be made in the graph's own memory
        generators: Sequence[torch.Generator] = (),
        falls_back: bool = False,
    ):
        self.falls_back, self.fell_back = falls_back, False
        self.function, self.settings, self.refresh = function, settings, refresh
        self.unchanged, self.forget, self.generators = unchanged, forget, generators
        self.stream = torch.cuda.Stream(device)
        self.memory = torch.cuda.graph_pool_handle()
        self.called = False
        self.captured_with: object = None
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, images: Tensor, *others: Any) -> Any:
        self.refresh()
        if not self.called or self.fell_back:
            self.called = True
            return self.function(images, *others)
        settings = self.settings()
        if settings != self.captured_with:
            self.captured_with, self.captured = settings, {}
        if len(images) not in self.captured:
            try:
                self.captured[len(images)] = self._capture(images, *others)
            except (CaptureError, torch.OutOfMemoryError) as error:
                if not self.falls_back:
                    raise
                self._fall_back(error)
                return self.function(images, *others)
        graph, outputs = self.captured[len(images)]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.replay()
        return outputs

    def join(self) -> None:
        """Let the current stream wait for the last replay."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def _fall_back(self, error: Exception) -> None:
        say_not_captured(error)
        self.fell_back = True
        self.captured.clear()
        self.forget()

    def _capture(self, *inputs: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with self.unchanged():
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP_CALLS):
                    self.function(*inputs)
                with _no_waits():
                    self.function(*inputs)
            self.join()
            if torch.__version__ < REGISTERED_BY_CAPTURE:
                for generator in self.generators:
                    graph.register_generator_state(generator)
            self.forget()
            with (
                _not_empty(),
                torch.cuda.graph(
                    graph,
                    pool=self.memory,
                    stream=self.stream,  # of this device; CUDA would choose one of the current device's
                    capture_error_mode="thread_local",  # threads that pin memory may allocate meanwhile
                ),
                _NothingEscapes(),
            ):
                outputs = self.function(*inputs)
        return graph, outputs


def say_not_captured(reason: Exception) -> None:
    """Say in one line that steps are launched operation by operation, and why, where that is no error."""
    text = f"{in_one_line(reason)}. compile=auto goes on as compile=none here"
    log.info("%s", text, extra={"news": ("compile", text)})


@contextmanager
def _no_waits() -> Iterator[None]:
    """Raise CaptureError for a wait for the device inside; in a capture, nothing would go on behind it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise CaptureError(
            "compile: found a step that waits for its device, as .item() does; expected one that never does, "
            "or compile=none"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _NothingEscapes(TorchDispatchMode):
    """Raises CaptureError for an operation on a stream that is not captured, forwards and backwards.

    Inside a capture, of which there are a few in a run: looking at each operation takes microseconds.
    """

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Collection[type],
        arguments: Sequence[Any] = (),
        keys: Mapping[str, Any] | None = None,
    ) -> Any:
        given = operation(*arguments, **(keys or {}))
        devices = {tensor.device for tensor in tensors_of((arguments, keys, given)) if tensor.is_cuda}
        for device in devices:
            with torch.cuda.device(device):
                is_captured = torch.cuda.is_current_stream_capturing()
            if not is_captured:
                raise CaptureError(
                    f"compile: found {operation} on {device}, beside the stream that is captured, so that "
                    "replays would do without it; expected a whole step on one stream, or compile=none"
                )
        return given


@contextmanager
def _not_empty() -> Iterator[None]:
    """Raise CaptureError where PyTorch would warn that what was captured inside launched nothing."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    for warning in told:
        if "graph is empty" in str(warning.message).lower():
            raise CaptureError(
                "compile: found a step that launches nothing on its device, so that replays would train "
                "nothing; expected one on it, or compile=none"
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def unchanged(
    state: Callable[[], Mapping[str, Any]], generators: Sequence[torch.Generator], device: torch.device
) -> Iterator[None]:
    """Put back, at the end, the tensors of ``state()`` and all random generators.

    In place, so that what holds the same memory sees it. Raises CaptureError if there are tensors in it at
    the end that were not there before: an optimizer that adds some after its first step cannot be captured.
    """
    before = [(tensor, tensor.clone()) for tensor in tensors_of(state())]
    own_draws = [(generator, generator.get_state()) for generator in generators]
    on_cpu = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        for generator, drawn in own_draws:
            generator.set_state(drawn)
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)
    known = {tensor.data_ptr() for tensor, _ in before}
    if any(tensor.data_ptr() not in known for tensor in tensors_of(state())):
        raise CaptureError(
            "compile: found an optimizer that adds to its state after the first step; expected one that "
            "does not, or compile=none"
        )


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
