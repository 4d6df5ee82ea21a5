"""Optimizers as a device wants them: fused where it can, and such that captured steps see new rates."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sakd.errors import ConfigError
from sakd.training.graphs import tensors_of
from sakd.training.loss_scale import LossScale

CHANGED_BY_SCHEDULES = ("lr", "momentum", "betas")
HOW = ("capturable", "foreach", "fused")  # keys of a group that say how a step is carried out, not which


class Stepper:
    """Takes an optimizer's steps on a device.

    Where steps are captured, a fused optimizer reads its learning rates from tensors, which ``fill`` brings
    up to date: schedules go on with plain numbers. Others have to be captured anew when a rate changes.

    Backward passes add up until a step: it takes their mean over all images. The gradient's norm is at most
    ``clip`` then, where that is given. With a ``loss_scale``, a step whose gradients are not finite changes
    nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device,
        captured: bool,
        clip: float | None = None,
        loss_scale: LossScale | None = None,
    ):
        self.optimizer, self.clip, self.loss_scale = optimizer, clip, loss_scale
        self.images: list[int] = []  # in the batches since the last step
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

    def backward(self, loss: Tensor, images: int, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Add the gradients of a batch's mean ``loss``; with ``parameters`` nothing else gets any."""
        if not self.images:
            self.optimizer.zero_grad()
        self.images.append(images)
        if images != self.images[0]:
            loss = loss * (images / self.images[0])
        if self.loss_scale is not None:
            loss = self.loss_scale.scaled(loss)
        if parameters is None:
            loss.backward()
            return
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def step(self) -> None:
        """Let the optimizer go a step by what backward passes have added up."""
        parameters = [own for group in self.optimizer.param_groups for own in group["params"]]
        gradients = [own.grad for own in parameters if own.grad is not None]
        if len(self.images) > 1:
            torch._foreach_mul_(gradients, self.images[0] / sum(self.images))
        self.images.clear()
        is_first = not self.optimizer.state
        if self.loss_scale is not None:
            self.optimizer.found_inf = self.loss_scale.unscale(gradients)  # a fused step looks for it
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        with self._rates_in_tensors():
            self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.update(self.optimizer.found_inf)
            if is_first:
                self._clear_where(self.optimizer.found_inf)
            del self.optimizer.found_inf

    @torch.no_grad()
    def _clear_where(self, skipped: Tensor) -> None:
        """Make the state zero if ``skipped``: SGD's of a first step that is left out is what memory held."""
        for value in tensors_of(list(self.optimizer.state.values())):
            value.copy_(torch.where(skipped > 0, torch.zeros_like(value), value))

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
            f"{key}._target_: found {type(optimizer).__name__}, which is not fused, with schedule.by=step: "
            "each step would be captured anew; expected SGD, Adam or AdamW, or schedule.by=epoch, or "
            "compile=none"
        )
    if not isinstance(optimizer, torch.optim.SGD) and any(
        "capturable" not in group for group in optimizer.param_groups
    ):
        raise ConfigError(
            f"{key}._target_: found {type(optimizer).__name__}, whose steps cannot be captured; expected SGD "
            "or one that takes `capturable`, or compile=none"
        )


def check_skips(optimizer: Optimizer, key: str) -> None:
    """Raise ConfigError, naming ``key``, unless the optimizer leaves a step out without a wait."""
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise ConfigError(
            f"{key}._target_: found {type(optimizer).__name__}, which is not fused, with precision=fp16: a "
            "step whose gradients are not finite could not be left out; expected SGD, Adam or AdamW, or "
            "another precision"
        )


def _make_capturable(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
