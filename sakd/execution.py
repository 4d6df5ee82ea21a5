"""How a step's arithmetic is carried out: in which precision and memory order, and launched one by one or as one graph."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sakd.errors import ConfigError

if TYPE_CHECKING:
    from sakd.trainer import Trainer

WARM_UP_STEPS = 3  # before a capture, as PyTorch asks for: libraries set themselves up, optimizers make their buffers

Step = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Execution:
    """``precision`` of the networks: fp32, tf32 (on GPUs that have it), bf16; losses, policy and weights stay float32.
    ``memory_format``: contiguous or channels_last. ``compile``: none, default (torch.compile), graph (one CUDA graph a step).
    ``fold_batch_norm``: into the convolutions, wherever a network is in eval in a step.
    """

    precision: str = "fp32"
    memory_format: str = "contiguous"
    compile: str = "none"
    fold_batch_norm: bool = False

    def check(self, device: torch.device) -> None:
        """Raises ConfigError for what the device cannot do."""
        if self.compile == "graph" and device.type != "cuda":
            raise ConfigError(f"compile: found graph, which is for CUDA devices; expected none or default on {device.type}")

    def place(self, module: nn.Module, device: torch.device) -> nn.Module:
        """``module`` on the device, its maps' weights in the memory order."""
        return module.to(device, memory_format=self._order)

    def arrange(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self._order)

    @property
    def _order(self) -> torch.memory_format:
        return torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format

    def networks(self, device: torch.device) -> AbstractContextManager[None]:
        """What the networks' passes run in."""
        if self.precision != "bf16":
            return nullcontext()
        # Weights cast once would be stale when a captured step is replayed.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=self.compile != "graph")

    def function(self, function: Callable) -> Callable:
        """A part of a step, compiled where that is asked for."""
        return torch.compile(function) if self.compile == "default" else function

    def step(self, trainer: "Trainer") -> Step:
        """The trainer's step, as it is to be launched."""
        return GraphedStep(trainer) if self.compile == "graph" else trainer.train_step


def allow_tf32(allowed: bool) -> None:
    """Whether this process' float32 convolutions and products may be rounded to TensorFloat-32 on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class GraphedStep:
    """A step captured once and replayed as one CUDA graph: the same operations, without the cost of launching each.

    A graph holds for one batch size and one set of learning rates; others are captured when they come, which trains nothing:
    all that the capture's own steps change is put back. The measurements are overwritten by the next step.
    """

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        self.rates: dict[str, float] = {}
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], dict[str, Tensor]]] = {}

    def __call__(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
        rates = self.trainer.learning_rates()
        if rates != self.rates:
            self.rates, self.captured = rates, {}
        batch = (images, labels, indices)
        if len(labels) not in self.captured:
            self.captured[len(labels)] = self._capture(batch)
        graph, inputs, measured = self.captured[len(labels)]
        for static, given in zip(inputs, batch, strict=True):
            static.copy_(given, non_blocking=True)
        graph.replay()
        return measured

    def _capture(self, batch: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], dict[str, Tensor]]:
        inputs = [tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        with unchanged(self.trainer):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    self.trainer.train_step(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            for generator in self.trainer.generators():
                graph.register_generator_state(generator)
            self.trainer.forget_gradients()  # so that the capture makes them in the graph's own memory
            with torch.cuda.graph(graph):
                measured = self.trainer.train_step(*inputs)
        return graph, inputs, measured


class unchanged:  # noqa: N801, a context manager, as contextlib's
    """Steps taken inside leave weights, statistics, optimizers and random streams of a trainer as they were.

    In place, so that what holds the same memory sees it. What an optimizer adds at its first step is left at zero, which is
    how its second finds it after no first.
    """

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def __enter__(self) -> None:
        self.values = [(tensor, tensor.clone()) for tensor in tensors_of(self.trainer.state_dict())]
        self.streams = [(generator, generator.get_state()) for generator in self.trainer.generators()]
        self.default_streams = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def __exit__(self, *error: object) -> None:
        before = {tensor.data_ptr() for tensor, _ in self.values}
        for tensor in tensors_of(self.trainer.state_dict()):
            if tensor.data_ptr() not in before:
                tensor.zero_()
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
        for generator, state in self.streams:
            generator.set_state(state)
        on_cpu, on_gpu = self.default_streams
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_of(value)
