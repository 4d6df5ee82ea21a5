"""A teacher: a trained network that learns no more, and what is known of it."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sakd.networks import StagedNet
from sakd.networks.cost import Cost, cost
from sakd.networks.folded import cast_weights, refold
from sakd.networks.fused import fuse_activations
from sakd.spots import frozen_alias
from sakd.training.execution import Execution


@dataclass(frozen=True)
class Certificate:
    """Measurements of a teacher before it taught."""

    name: str  # the network's
    accuracy: float  # percent, on the test images
    sha256: str  # of its weights file
    source: str  # the file's path

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Teacher:
    """A network in eval and without gradients, on its device.

    Its batch norm is folded where ``execution`` says so, and its weights are kept in the precision of its
    passes. Those that are loaded into ``network`` later count from the next ``refold`` on. It may teach any
    number of students at once: nothing in a step writes into what it gives.
    """

    def __init__(
        self,
        network: StagedNet,
        *,
        device: torch.device | str = "cpu",
        execution: Execution = Execution(),  # noqa: B008, immutable
    ):
        self.device, self.execution = torch.device(device), execution
        self.network = execution.place(network, self.device).requires_grad_(False).eval()
        self.frozen = frozen_alias(self.network, execution.fold_batch_norm)
        if execution.kept_as is not None:
            cast_weights(self.frozen, execution.kept_as)
        if execution.fuses_on(self.device):
            fuse_activations(self.frozen)
        self.certificate: Certificate | None = None
        self._features = execution.compiled(self.frozen.features)

    @cached_property
    def cost(self) -> Cost:
        """What its network costs, counted once for all students."""
        return cost(self.network)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of all stages, by name, without gradients. ``images``: [B, C, H, W], normalised."""
        with torch.no_grad(), self.execution.autocast(self.device):
            return self._features(self.execution.arrange(images))

    def refold(self) -> None:
        """Take over what has changed in ``network``; every epoch begins with it."""
        refold(self.frozen)
