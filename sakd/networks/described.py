"""What a weights file says of its network beside the weights, so that the file alone is enough."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sakd.errors import CheckpointError
from sakd.names import START_KEYS

KEY = "sakd"  # of the metadata; one alone, since safetensors writes several in any order
LENGTH = 8  # bytes before a safetensors header that say how long it is


@dataclass(frozen=True)
class Description:
    """A network as its configuration builds it, and what it gets.

    ``network``: a node with its ``_target_``; ``input``: channels, height, width; ``mean`` and ``std``: per
    channel, of pixels in [0, 1]; ``dataset`` and ``run``: names of what it learned from, and in which run.
    """

    network: dict[str, Any]
    classes: int
    input: list[int]
    mean: list[float]
    std: list[float]
    dataset: str
    run: str

    def metadata(self) -> dict[str, str]:
        """What a safetensors file takes, the same for the same network."""
        return {KEY: json.dumps(asdict(self), sort_keys=True)}


def described(
    network: Mapping[str, Any], config: Mapping[str, Any], result: Mapping[str, Any]
) -> Description:
    """A network of a run, as its node, and what images it gets by the run's configuration.

    The run's result has the moments that the configuration leaves open.
    """
    student, data = config["student"], {**config["dataset"], **result.get("moments", {})}
    size = student["image_size"]
    return Description(
        {key: value for key, value in network.items() if key not in START_KEYS},
        student["num_classes"],
        [student["in_channels"], size, size],
        list(data["mean"]),
        list(data["std"]),
        data["name"],
        result["run"],
    )


def read_description(raw: bytes, path: Path) -> Description:
    """What a whole safetensors file, of the content ``raw``, says of its network.

    Raises CheckpointError if it says nothing, or not what a run writes.
    """
    header = json.loads(raw[LENGTH : LENGTH + int.from_bytes(raw[:LENGTH], "little")])
    text = header.get("__metadata__", {}).get(KEY)
    expected = "expected what a run writes beside its weights"
    if text is None:
        raise CheckpointError(
            f"{path}: found no word of its network, {expected}; give the run's folder, or a file that "
            "`sakd export` writes"
        )
    try:
        found = Description(**json.loads(text))
        channels = found.input[0]
        fits = isinstance(found.network["name"], str) and {len(found.mean), len(found.std)} == {channels}
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: found {text:.80}, {expected} ({error})") from error
    if not fits:
        raise CheckpointError(f"{path}: found {text:.80}, {expected}")
    return found
