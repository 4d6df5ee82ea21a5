"""What a network makes of its last map, as distillers that look there see it."""

from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sakd.errors import ConfigError
from sakd.networks import StagedNet
from sakd.networks.staged import Pooled


class Classifier:
    """The stages behind a network's last map: up to where it is pooled, and from the pooled vector on.

    It is no module, so that a distiller which holds one does not have the network's weights a second time, in
    its state or before the optimizer: they are the student's own, which learn by it, or the teacher's, which
    are frozen. The network's statistics (batch norm's) are read as its own pass reads them and left alone:
    that pass has moved them already.

    Raises ConfigError, in which the network is called ``role``, where its embedding is not the mean of a map.
    """

    def __init__(self, network: StagedNet, role: str):
        self.last_map, self.classes = network.maps[-1], network.classes
        embedding, self._head = network.embedding, network.logits
        pools = isinstance(embedding, Pooled)
        self._before_pooling = nn.Sequential(*(list(embedding)[:-2] if pools else []))
        if not pools and not _is_mean(network):
            raise ConfigError(
                f"found a {role} ({network.family}) whose embedding is not the mean of a map; expected one "
                "that pools its last map by its mean"
            )

    def map(self, last_map: Tensor) -> Tensor:
        """The map that is pooled, of the output of the stage ``last_map``: [B, C, H, W] to [B, d, H, W]."""
        return _reading_alone(self._before_pooling, last_map)

    def logits(self, vectors: Tensor) -> Tensor:
        """Logits of pooled vectors: [N, d] to [N, classes]."""
        return _reading_alone(self._head, vectors)


def _reading_alone(module: nn.Module, x: Tensor) -> Tensor:
    """What ``module`` gives, which writes into none of its buffers."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, buffers, (x,))


def _is_mean(network: StagedNet) -> bool:
    """True if a network of whichever make pools its last map by its mean."""
    shape = network.shapes[network.maps[-1]]
    example = torch.arange(prod(shape)).sin().reshape(1, *shape)
    example = example.to(next(network.parameters()))  # a teacher of several students may be placed already
    training = network.training
    with torch.no_grad():
        embedding = network.eval().between(network.maps[-1], "embedding")(example)
    network.train(training)
    mean = example.mean((2, 3))
    return embedding.shape == mean.shape and torch.allclose(embedding, mean, atol=1e-5)
