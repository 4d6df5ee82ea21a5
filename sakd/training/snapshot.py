"""Copies of a state, taken while it goes on changing."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from sakd.training.graphs import tensors_of


def snapshot(state: dict[str, Any], device: torch.device) -> Callable[[], dict[str, Any]]:
    """Copy a ``state`` whose tensors are on ``device``; what is returned gives the copy, on the CPU.

    On CUDA this waits for nothing: whatever is launched next comes after the copying, and who asks for the
    copy, from any thread, waits for it.
    """
    # A copy from CUDA that nobody waits for goes to pinned memory, which PyTorch keeps for the next one.
    tensors = {
        id(tensor): tensor.detach().to("cpu", non_blocking=True, copy=True) for tensor in tensors_of(state)
    }
    copied = copy.deepcopy(state, tensors)
    if device.type != "cuda":
        return lambda: copied
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))

    def once_done() -> dict[str, Any]:
        done.synchronize()
        return copied

    return once_done
