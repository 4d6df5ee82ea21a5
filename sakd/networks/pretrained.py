"""Weights that torchvision and timm publish, by their names: fetched once, and then found again."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch

from sakd.errors import CheckpointError, did_you_mean


def published(build: str, arguments: Mapping[str, object], name: str, key: str) -> Path:
    """The file of the weights ``name`` for the network that ``build`` makes with ``arguments``.

    torchvision's lie in torch.hub's folder, timm's in that of huggingface_hub.

    Raises CheckpointError, naming ``key``, if there are none of that name, or they cannot be fetched.
    """
    if build.startswith("torchvision."):
        return _torchvision(build.rpartition(".")[2], name, key)
    if build == "timm.create_model":
        return _timm(str(arguments["model_name"]).partition(".")[0], name, key)
    raise CheckpointError(
        f"{key}: found {name}, but {build} is neither torchvision's nor timm's; expected a file, as "
        "checkpoint"
    )


def _torchvision(network: str, name: str, key: str) -> Path:
    from torchvision.models import get_model_weights

    known = {each.name: each for each in get_model_weights(network)}
    if name not in known:
        raise _unknown(network, name, list(known), key)
    path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlparse(known[name].url).path)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(known[name].url, str(path), path.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:
            raise _unfetched(network, name, error, key) from error
    return path


def _timm(network: str, tag: str, key: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from timm.models import get_pretrained_cfg, list_pretrained

    tags = [each.partition(".")[2] for each in list_pretrained(f"{network}.*")]
    if tag not in tags:
        raise _unknown(network, tag, tags, key)
    where = get_pretrained_cfg(f"{network}.{tag}").hf_hub_id, "model.safetensors"
    stored = try_to_load_from_cache(*where)
    if isinstance(stored, str):
        return Path(stored)
    try:
        get_hf_file_metadata(hf_hub_url(*where))  # without a network the download tries for half a minute
        return Path(hf_hub_download(*where))
    except Exception as error:  # its errors of many kinds share no class
        raise _unfetched(network, tag, error, key) from error


def _unknown(network: str, name: str, known: list[str], key: str) -> CheckpointError:
    near = did_you_mean(name, known)
    return CheckpointError(f"{key}: found {name}, of {network} there are {', '.join(known) or 'none'}.{near}")


def _unfetched(network: str, name: str, error: Exception, key: str) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{key}: cannot fetch {name} of {network} ({type(error).__name__}: {reason}); is there a network? "
        f"Without one, fetch the file elsewhere and give it as {key.removesuffix('pretrained')}checkpoint"
    )
