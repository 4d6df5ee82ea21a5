"""Optimizers as a device wants them: fused where it can, and such that captured steps see new rates."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from sakd.errors import ConfigError

CHANGED_BY_SCHEDULES = ("lr", "momentum", "betas")
HOW = ("capturable", "foreach", "fused")  # keys of a group that say how a step is carried out, not which


class Stepper:
    """Takes an optimizer's steps on a device.

    Where steps are captured, a fused optimizer reads its learning rates from tensors, which ``fill`` brings
    up to date: schedules go on with plain numbers. Others have to be captured anew when a rate changes.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, captured: bool):
        self.optimizer = optimizer
        if captured:
            _make_capturable(optimizer)
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.rates = [
            torch.full((), group["lr"], device=device)
            for group in optimizer.param_groups
            if captured and fused
        ]
        self.filled = [group["lr"] for group in optimizer.param_groups]

    @property
    def settings(self) -> tuple[object, ...]:
        """Values that a captured step has read once and for all: also a momentum that a schedule changes."""
        filled = ("lr",) if self.rates else ()
        return tuple(
            value
            for group in self.optimizer.param_groups
            for key, value in group.items()
            if key in CHANGED_BY_SCHEDULES and key not in filled
        )

    def fill(self) -> None:
        """Let the next replay see the learning rates as they are now."""
        for place, (rate, group) in enumerate(zip(self.rates, self.optimizer.param_groups, strict=False)):
            if group["lr"] != self.filled[place]:
                rate.fill_(group["lr"])
                self.filled[place] = group["lr"]

    def step(self) -> None:
        with self._rates_in_tensors():
            self.optimizer.step()

    @contextmanager
    def _rates_in_tensors(self) -> Iterator[None]:
        groups = self.optimizer.param_groups[: len(self.rates)]
        numbers = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that may have been saved where steps are carried out in another way."""
        own = [{key: group[key] for key in HOW if key in group} for group in self.optimizer.param_groups]
        groups = [{**saved, **how} for saved, how in zip(state["param_groups"], own, strict=True)]
        self.optimizer.load_state_dict({**state, "param_groups": groups})


def fuse(optimizer: Optimizer) -> None:
    """Choose the fused step where the class has one and the user has not chosen.

    Not where it has made its state already, as Adagrad does: for a step that is not fused.
    """
    for group in optimizer.param_groups if not optimizer.state else ():
        if "fused" in group and group["fused"] is None and not group.get("foreach"):
            group["fused"] = True


def check_capturable(optimizer: Optimizer, key: str, by_step: bool = False) -> None:
    """Raise ConfigError, naming ``key``, if the optimizer's steps cannot be captured.

    ``by_step``: its rate changes with each of them, so that it must be one that reads rates from tensors.
    """
    if by_step and not all(group.get("fused") for group in optimizer.param_groups):
        raise ConfigError(
            f"{key}._target_: found {type(optimizer).__name__}, which is not fused, with schedule.by=step, "
            "so that each step would be captured anew; expected SGD, Adam or AdamW, schedule.by=epoch, or "
            "compile=none"
        )
    if not isinstance(optimizer, torch.optim.SGD) and any(
        "capturable" not in group for group in optimizer.param_groups
    ):
        raise ConfigError(
            f"{key}._target_: found {type(optimizer).__name__}, whose steps cannot be captured; expected SGD "
            "or one that takes `capturable`, or compile=none"
        )


def _make_capturable(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
