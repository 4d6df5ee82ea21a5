"""Weights files: read safely, loaded strictly, with the names under which the field shares them."""

import argparse
import io
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sakd.errors import CheckpointError
from sakd.networks.parts_of_files import COUNTER, Part, chosen, flattened, parts_for
from sakd.networks.staged import StagedNet

log = logging.getLogger("sakd")

USUAL = {"float32", "int64"}  # what networks are of


class _Beside:
    """Stands for an object that is no weights, whatever is done to it while a file is read."""

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What training scripts leave beside weights, and what is made in its place: nothing of another's code.
BESIDE = {
    "pathlib.PosixPath": _Beside,
    "pathlib.PurePosixPath": _Beside,
    "pathlib.WindowsPath": _Beside,
    "numpy.core.multiarray.scalar": _Beside,
    "numpy._core.multiarray.scalar": _Beside,
    "numpy.dtype": _Beside,
    "numpy.dtypes.Float64DType": _Beside,
    "lightning_fabric.utilities.data.AttributeDict": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors in a .safetensors file or a torch file, by name; of keys in keys by dotted names.

    What training scripts leave beside them is let in and left out: options (an argparse.Namespace), paths,
    numbers of numpy, Lightning's own. Nothing in the file is executed.

    Raises CheckpointError if it is missing, damaged, or holds no weights.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a network's weights")
    return parse_weights(path.read_bytes(), path)


def parse_weights(raw: bytes, path: Path) -> dict[str, Tensor]:
    """All tensors by name in ``raw``, the content of the file at ``path``; see ``read_weights``."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            content = load(raw)
        else:
            inert = [(stand_in, name) for name, stand_in in BESIDE.items()]
            with torch.serialization.safe_globals([argparse.Namespace, *inert]):
                content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds for a damaged file
        raise CheckpointError(
            f"{path}: cannot be read as weights ({_reason(error)}); expected a whole .safetensors or "
            "torch file"
        ) from error
    weights = flattened(content)
    if not weights:
        found = (
            f"keys {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise CheckpointError(f"{path}: found {found}; expected weights by name, or such under a key")
    return weights


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


def load_weights(
    network: StagedNet,
    weights: Mapping[str, Tensor],
    name: str,
    path: Path,
    asked: str | None = None,
    new_head: bool = False,
    say: bool = True,
) -> None:
    """Load weights strictly, by the network's own names or by the field's shared ones.

    They may lie under keys and prefixes, which are found; ``asked`` names one where several would do. Of
    batch norm the counts of batches may be absent. With ``new_head`` logits of another number of classes are
    left as they were drawn. A line says what was unwrapped, unless ``say`` is false.

    Raises CheckpointError saying what differs, or which tensor does not hold finite numbers of its kind;
    ``name`` (the network's) and ``path`` are for its message.
    """
    own = network.state_dict()
    parts = parts_for(weights, ({key: key for key in own}, network.shared_names()))
    part = chosen(parts if asked else _of_these_shapes(parts, weights, own), asked, path)
    if not part.fits:
        missing, stray = part.missing, part.strays
        raise CheckpointError(
            f"{path}: is not a {name}; of its {len(own)} weights {len(missing)} are "
            f"missing{_first(missing)}, and {len(stray)} are not its own{_first(stray)}"
        )
    found = _under(part, weights)
    for key, value in found.items():
        if (unfit := _unfit(value, own[key])) is not None:
            kind = "numbers of floating point" if own[key].is_floating_point() else "whole numbers"
            raise CheckpointError(f"{path}: found {unfit} in {part.naming[key]}, expected finite {kind}")
    differing = [key for key, value in found.items() if own[key].shape != value.shape]
    if differing:
        key = differing[0]
        is_head = all(key.startswith("logits.") for key in differing)
        if is_head and not new_head:
            raise CheckpointError(f"{path}: found {len(found[key])} classes, expected {network.classes}")
        if not is_head:
            raise CheckpointError(
                f"{path}: is not this {name}; found {part.naming[key]} of {tuple(found[key].shape)}, "
                f"expected {tuple(own[key].shape)}"
            )
    anew = (
        f"with new logits, of {network.classes} classes for {len(found[differing[0]])}" if differing else ""
    )
    if say:
        _say_unwrapped(part, weights, anew, path)
    head = {key: own[key] for key in own if key.startswith("logits.")} if differing else {}
    network.load_state_dict(own | found | head)


def _under(part: Part, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's weights by the network's own names."""
    return {
        key: weights[f"{part.prefix}{named}"]
        for key, named in part.naming.items()
        if f"{part.prefix}{named}" in weights
    }


def _of_these_shapes(
    parts: list[Part], weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> list[Part]:
    """Those parts whose shapes are the network's but for the logits', where some are: two widths of a
    network have the same names."""

    def has_shapes(part: Part) -> bool:
        found = _under(part, weights)
        body = [key for key in found if not key.startswith("logits.")]
        return part.fits and all(found[key].shape == own[key].shape for key in body)

    return [part for part in parts if has_shapes(part)] or parts


def _say_unwrapped(part: Part, weights: Mapping[str, Tensor], head: str, path: Path) -> None:
    """Say in a line what a file's weights lay under and what is unusual; ``head``: about the logits."""
    own = {key: value for key, value in weights.items() if key.startswith(part.prefix)}
    others = len(weights) - len(own)
    kinds = {str(value.dtype).removeprefix("torch.") for value in own.values()} - USUAL
    told = [
        f"under {part.label}" if part.prefix else "",
        f"{others} other tensors left out" if others else "",
        f"without {COUNTER}" if len(own) < len(part.naming) else "",
        f"of {', '.join(sorted(kinds))}" if kinds else "",
        head,
    ]
    if any(told):
        text = f"{path}: took weights {', '.join(filter(None, told))}"
        log.info("%s", text, extra={"news": (f"weights {path}", text)})


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


def _first(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})" if names else ""
