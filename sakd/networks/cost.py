"""What a network costs: its parameters, and the multiply-adds of an image."""

import torch

from sakd.networks.staged import StagedNet

Cost = dict[str, int | None]


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
