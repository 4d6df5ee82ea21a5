"""Learning rates from step to step: a schedule of PyTorch's, gone on with by epoch or by step, warmed up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from sakd.ranges import Positive, Share


@dataclass(frozen=True)
class Schedule:
    """What learning rates are to do.

    ``build`` makes a schedule from an optimizer and the number of times that an epoch goes on with it: 1, or,
    with ``by_step``, the optimizer's steps. In the first ``warmup_epochs`` the rate is a share of the
    schedule's, which rises in a line from ``warmup_start`` to 1.
    """

    build: Callable[[Optimizer, int], LRScheduler]
    by_step: bool = False
    warmup_epochs: float = 0.0
    warmup_start: float = 0.01  # as an absent key counts in a run's identity


class Rates:
    """An optimizer's learning rates, as a schedule has them. ``steps``: of the optimizer, in an epoch."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule, steps: int):
        self.optimizer, self.by_step = optimizer, schedule.by_step
        moves = steps if schedule.by_step else 1
        self.schedule = schedule.build(optimizer, moves)
        self.warmup, self.start = schedule.warmup_epochs * moves, schedule.warmup_start
        self._warm_up()

    def step(self) -> None:
        """Go on to the next epoch's rates, or the next step's."""
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate  # without the warm-up: some schedules go on from the rate that they find
        self.schedule.step()
        self._warm_up()

    def _warm_up(self) -> None:
        if self.warmup and self.schedule.last_epoch < self.warmup:
            share = self.start + (1 - self.start) * self.schedule.last_epoch / self.warmup
            for group in self.optimizer.param_groups:
                group["lr"] *= share

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state)


class OneCycle(OneCycleLR):
    """PyTorch's OneCycleLR, with the optimizer's own rate as the highest; momentum stays as it is."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        pct_start: Share,
        anneal_strategy: Literal["cos", "linear"],
        div_factor: Positive,
        final_div_factor: Positive,
    ):
        super().__init__(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total_steps,
            pct_start=pct_start,
            anneal_strategy=anneal_strategy,
            cycle_momentum=False,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
        )
