"""The life of a plug-in beside a training: the same for distillers (*what*) and spot modes (*where*)."""

import torch
from torch import Tensor, nn


class Plugin(nn.Module):
    """A module that a trainer prepares once, tells of each epoch, saves and restores.

    Parameters and buffers are saved with every epoch and restored strictly, but for buffers that are not
    persistent. Random numbers in training come from ``stream`` alone, which the trainer starts anew each
    epoch.
    """

    stream: torch.Generator
    labels: Tensor
    classes: int

    def prepare(self, labels: Tensor, classes: int, stream: torch.Generator) -> None:
        """Build what depends on the training set; called once, before training or loading a saved state.

        ``labels``: [N], of the whole training set, on the device that trains: ``self.labels[indices]`` are a
        batch's. What is built here are buffers: the optimizer knows the parameters already.

        Raises ConfigError if there is nothing to learn from such a training set.
        """
        self.register_buffer("labels", labels, persistent=False)
        self.classes = classes
        self.stream = stream

    def begin_epoch(self, epoch: int) -> None:
        """Take note of an epoch that begins, counted from 1."""
