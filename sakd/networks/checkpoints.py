"""Weights files: read safely, loaded strictly, with the names under which the field shares them."""

import argparse
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sakd.errors import CheckpointError
from sakd.networks.staged import StagedNet

PARALLEL = "module."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name from a .safetensors file or a torch file (a state dict, or one under "model").

    A training script's options beside them (an argparse.Namespace) are let in, and the prefix that
    DataParallel puts before every name is taken off. Nothing in the file is executed.

    Raises CheckpointError if it is missing, damaged, or holds no weights.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a network's weights")
    return parse_weights(path.read_bytes(), path)


def parse_weights(raw: bytes, path: Path) -> dict[str, Tensor]:
    """Weights by name from ``raw``, the content of the file at ``path``; see ``read_weights``."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            content = load(raw)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds for a damaged file
        raise CheckpointError(
            f"{path}: cannot be read as weights ({_reason(error)}); expected a whole .safetensors or "
            "torch file"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(name, str) and isinstance(v, Tensor) for name, v in content.items())
    ):
        found = (
            f"keys {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise CheckpointError(f"{path}: found {found}; expected weights by name, or such under 'model'")
    if all(name.startswith(PARALLEL) for name in content):
        content = {name.removeprefix(PARALLEL): value for name, value in content.items()}
    return dict(content)


def _reason(error: Exception) -> str:
    """The reason why weights were refused, without PyTorch's advice to load them all the same."""
    by_pickle = isinstance(error, (pickle.UnpicklingError, LookupError, EOFError))
    if by_pickle or "weights_only" in str(error):
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        return (
            "it is damaged or holds more than weights"
            if refused is None
            else f"it holds {refused[1]}, which is no weights"
        )
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def shared_weights(network: StagedNet) -> dict[str, Tensor]:
    """The network's weights by their names in the field's shared files; empty if its family has none."""
    own = network.state_dict()
    return {shared: own[name] for name, shared in network.shared_names().items()}


def load_weights(network: StagedNet, weights: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Load weights strictly, by the network's own names or by the field's shared ones.

    Those names count of which the weights have more. Raises CheckpointError saying what differs, or which
    tensor does not hold finite numbers of its kind; ``name`` (the network's) and ``path`` are for its
    message.
    """
    own = network.state_dict()
    namings = ({key: key for key in own}, network.shared_names())
    naming = max(namings, key=lambda naming: len(weights.keys() & naming.values()))
    missing, stray = sorted(naming.values() - weights.keys()), sorted(weights.keys() - set(naming.values()))
    if missing or stray:
        raise CheckpointError(
            f"{path}: is not a {name}; of its {len(own)} weights {len(missing)} are "
            f"missing{_first(missing)}, and {len(stray)} are not its own{_first(stray)}"
        )
    for key, named in naming.items():
        if (found := _unfit(weights[named], own[key])) is not None:
            kind = "numbers of floating point" if own[key].is_floating_point() else "whole numbers"
            raise CheckpointError(f"{path}: found {found} in {named}, expected finite {kind}")
    differing = [(key, named) for key, named in naming.items() if own[key].shape != weights[named].shape]
    if differing:
        key, named = differing[0]
        if all(key.startswith("logits.") for key, _ in differing):
            raise CheckpointError(f"{path}: found {len(weights[named])} classes, expected {network.classes}")
        raise CheckpointError(
            f"{path}: is not this {name}; found {named} of {tuple(weights[named].shape)}, expected "
            f"{tuple(own[key].shape)}"
        )
    network.load_state_dict({key: weights[named] for key, named in naming.items()})


def _unfit(found: Tensor, own: Tensor) -> str | None:
    """What keeps a tensor from being the weights of ``own``, whatever its shape; None if nothing does."""
    if found.is_nested or found.layout != torch.strided:
        return "a tensor that is not dense"
    if found.is_quantized:
        return "quantised numbers"
    if found.is_meta:
        return "no numbers (a tensor of the device meta)"
    if found.is_complex() or found.is_floating_point() != own.is_floating_point():
        return str(found.dtype)
    if not found.to(own.dtype).isfinite().all():  # in the type that it is to be
        return "NaN or infinite numbers"
    return None


def _first(names: list[str]) -> str:
    return f" ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})" if names else ""
