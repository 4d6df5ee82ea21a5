"""What a network costs: its parameters, and the multiply-adds of an image."""

import logging
import math

import torch

from sakd.networks.staged import StagedNet

Cost = dict[str, int | None]
FLOAT = 4  # bytes
MUCH = 4e9  # bytes of stages' outputs; training takes several times that, for what lies between them


log = logging.getLogger("sakd")


def warn_of_memory(key: str, name: str, network: StagedNet, batch_size: int) -> None:
    """Say in one line where a batch takes tens of GB, as with the stems that the field made for small images.

    ``key`` and ``name``: the network's.
    """
    needed = FLOAT * batch_size * sum(math.prod(shape) for shape in network.shapes.values())
    if needed > MUCH:
        height = network.shapes["stem" if "stem" in network.shapes else network.maps[0]][1]
        text = (
            f"{key}: found {name}, whose first maps of {network.input_shape[1]} pixels are {height} wide: a "
            f"batch of {batch_size} has {needed / 1e9:.1f} GB in stages' outputs alone, and training takes "
            "several times that. Networks for large images (torchvision_…) halve theirs first; or take a "
            "smaller batch_size"
        )
        log.warning("%s", text, extra={"news": (f"memory of {name}", text)})


@torch.no_grad()
def cost(network: StagedNet) -> Cost:
    """Count ``parameters``, and the ``multiply_adds`` of convolutions and products for one image.

    The latter are None for a network that PyTorch cannot count: that ends no run. Its mode is put back.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a tenth of a second

    parameters = sum(parameter.numel() for parameter in network.parameters())
    device, training = next(network.parameters()).device, network.training
    try:
        with FlopCounterMode(display=False) as counter:
            network.eval()(torch.zeros(1, *network.input_shape, device=device))
    except Exception:  # of any kind: layers may be another package's
        return {"parameters": parameters, "multiply_adds": None}
    finally:
        network.train(training)
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}
