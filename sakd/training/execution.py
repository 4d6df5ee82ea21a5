"""Execution of a step: in which precision and memory order, and by which launches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sakd.errors import ConfigError

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Execution:
    """Choices that change a step's speed, and its numbers by rounding at most."""

    # Of the networks: fp32, tf32 (on GPUs that have it), bf16, fp16 (on CUDA); all else is float32.
    precision: str = "fp32"
    # Of images and of convolutions' weights: contiguous, channels_last, or auto: the quicker of the two.
    memory_format: str = "contiguous"
    # graph: passes and steps are captured as CUDA graphs; auto: so on CUDA, where they can be; default:
    # torch.compile
    compile: str = "none"
    fold_batch_norm: bool = False  # into the convolutions, wherever a network is in eval in a step

    def check(self, device: torch.device) -> None:
        """Raise ConfigError for what the device cannot do."""
        if self.compile == "graph" and device.type != "cuda":
            raise ConfigError(
                "compile: found graph, which is for CUDA devices; expected auto, none or default on "
                f"{device.type}"
            )
        if self.scales_losses and device.type != "cuda":
            raise ConfigError(
                f"precision: found fp16, which is for CUDA devices; expected fp32 or bf16 on {device.type}"
            )

    @property
    def scales_losses(self) -> bool:
        """True if gradients would vanish in the networks' precision without a scale."""
        return self.precision == "fp16"

    def captures_on(self, device: torch.device) -> bool:
        """True if steps are captured once and replayed there, where they can be."""
        return self.compile == "graph" or (self.falls_back and device.type == "cuda")

    @property
    def falls_back(self) -> bool:
        """True if steps that cannot be captured are launched operation by operation."""
        return self.compile == "auto"

    def refolds_on(self, device: torch.device) -> bool:
        """True if batch norms of weights that change are folded, and folded anew in every step, there.

        On CUDA they are not: a bias is a launch, as a batch norm is, and to fold anew takes six a layer.
        """
        return self.fold_batch_norm and device.type != "cuda"

    def fuses_on(self, device: torch.device) -> bool:
        """True if folded convolutions take ReLUs along, and what is added before these, there.

        torch.compile has kernels of its own for that.
        """
        return self.fold_batch_norm and device.type == "cuda" and self.compile != "default"

    def place(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Move ``module`` to the device, its maps' weights in the memory order."""
        return module.to(device, memory_format=self._order(device))

    def arrange(self, images: Tensor) -> Tensor:
        """Put images [B, C, H, W] into the memory order; they are the same tensor where they have it."""
        return images.contiguous(memory_format=self._order(images.device))

    def _order(self, device: torch.device) -> torch.memory_format:
        order = self.memory_format
        if order == "auto":  # a GPU's units for matrices, which float32 does without, want channels last
            order = "contiguous" if device.type == "cuda" and self.precision == "fp32" else "channels_last"
        return torch.channels_last if order == "channels_last" else torch.contiguous_format

    @property
    def kept_as(self) -> torch.dtype | None:
        """What weights that no step changes are kept as; None: as they are."""
        return HALVES.get(self.precision)

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Context in which the networks' passes run, in their precision."""
        if self.kept_as is None:
            return nullcontext()
        # Weights cast once would be stale when a captured step is replayed.
        return torch.autocast(device.type, self.kept_as, cache_enabled=not self.captures_on(device))

    def compiled(self, function: Callable) -> Callable:
        """Compile a part of a step where that is asked for."""
        return torch.compile(function) if self.compile == "default" else function


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Let what is launched inside go to ``device`` where it names none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Branch:
    """A part of a step that may go on beside the rest, on a stream of its own where it is ``apart``.

    On the device it begins at ``fork``, however long after it is launched, and ends at ``join``. Tensors that
    it reads must live until then: their memory is the other stream's, which uses it again once they are gone.
    """

    def __init__(self, device: torch.device, apart: bool):
        self.device = device
        self.stream = torch.cuda.Stream(device) if apart else None

    def fork(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def launching(self) -> AbstractContextManager[None]:
        """Context in which the branch's operations are launched."""
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()

    def join(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
