"""The scale of a loss whose gradients are in half precision, kept on the device: nothing waits for it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FIRST_SCALE = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
STEPS_TO_GROWTH = 2000  # without a gradient that is not finite


class LossScale(nn.Module):
    """What a loss is multiplied by, so that small gradients do not vanish in float16.

    It is halved where gradients are not finite, and doubled after 2,000 steps in which they were, as
    ``torch.amp.GradScaler`` does; that one gives its state, and steps optimizers that are not fused, by
    waiting for the device.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("scale", torch.full((), FIRST_SCALE, device=device))
        self.register_buffer("finite_steps", torch.zeros((), dtype=torch.int32, device=device))

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> Tensor:
        """Divide by the scale in place. A float scalar: 1 where one of the values is not finite, else 0."""
        found = torch.zeros_like(self.scale)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self.scale.reciprocal())
        return found

    def update(self, found: Tensor) -> None:
        """Choose the next step's scale by what ``unscale`` gave."""
        torch._amp_update_scale_(self.scale, self.finite_steps, found, GROWTH, BACKOFF, STEPS_TO_GROWTH)
