"""How a step's arithmetic is carried out: in which precision and memory order, and launched one by one or as
one graph."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sakd.errors import ConfigError

if TYPE_CHECKING:
    from sakd.training.trainer import Trainer

Step = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Execution:
    """``precision`` of the networks: fp32, tf32 (on GPUs that have it), bf16; losses, policy and weights stay
    float32. ``memory_format``: contiguous or channels_last. ``compile``: none, default (torch.compile), graph
    (one CUDA graph a step). ``fold_batch_norm``: into the convolutions, wherever a network is in eval in a
    step."""

    precision: str = "fp32"
    memory_format: str = "contiguous"
    compile: str = "none"
    fold_batch_norm: bool = False

    def check(self, device: torch.device) -> None:
        """Raises ConfigError for what the device cannot do."""
        if self.compile == "graph" and device.type != "cuda":
            raise ConfigError(
                f"compile: found graph, which is for CUDA devices; expected none or default on {device.type}"
            )

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
        from sakd.training.graphs import GraphedStep

        return GraphedStep(trainer) if self.compile == "graph" else trainer.train_step
