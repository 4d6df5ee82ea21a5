"""A step captured as one CUDA graph."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sakd.training.trainer import Trainer

WARM_UP_STEPS = (
    3  # before a capture, as PyTorch asks for: libraries set themselves up, optimizers make their buffers
)


class GraphedStep:
    """A step captured once and replayed as one CUDA graph: the same operations, without the cost of launching
    each.

    A graph holds for one batch size and one set of learning rates; others are captured when they come, which
    trains nothing: all that the capture's own steps change is put back. The measurements are overwritten by
    the next step."""

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

    def _capture(
        self, batch: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], dict[str, Tensor]]:
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

    In place, so that what holds the same memory sees it. What an optimizer adds at its first step is left at
    zero, which is how its second finds it after no first."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def __enter__(self) -> None:
        self.values = [(tensor, tensor.clone()) for tensor in tensors_of(self.trainer.state_dict())]
        self.streams = [(generator, generator.get_state()) for generator in self.trainer.generators()]
        self.default_streams = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        )

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
