"""Where in a weights file a network's weights lie: under which keys and prefixes, and under whose names."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sakd.errors import CheckpointError

COUNTER = "num_batches_tracked"  # of batch norm: older and other frameworks' files do not have it

Naming = Mapping[str, str]  # from a network's own names to those in a file


def flattened(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors under keys of text in a file's content, by dotted names; lists are not looked into."""
    tensors = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(key, str):
            tensors |= flattened(value, f"{prefix}{key}.")
    return tensors


@dataclass(frozen=True)
class Part:
    """Weights under one prefix of a file (``"state_dict.model."``; the empty one: all of it).

    ``naming``: whose names they have there. ``missing`` and ``strays``: names that the network has alone, and
    the file's, behind the prefix.
    """

    prefix: str
    naming: Naming
    missing: tuple[str, ...]
    strays: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.missing and not self.strays

    @property
    def label(self) -> str:
        return self.prefix.removesuffix(".") or "the top"

    def is_called(self, asked: str) -> bool:
        """True if the keys of ``asked``, such as ``ema`` or ``state_dict.teacher``, are in its prefix."""
        return f".{asked}." in f".{self.prefix}"


def parts_for(weights: Mapping[str, Tensor], namings: Iterable[Naming]) -> list[Part]:
    """Parts of a file that have some of a network's names, those with the most first.

    Each is under the naming that it has more of; ``namings`` are tried in their order.
    """
    parts: dict[str, tuple[int, Part]] = {}
    for naming in namings:
        names = set(naming.values())
        counts = Counter(
            prefix for key in weights for prefix in _prefixes(key) if key[len(prefix) :] in names
        )
        for prefix, count in (counts or {"": 0}).items():
            if prefix not in parts or count > parts[prefix][0]:
                parts[prefix] = count, _part(weights, prefix, naming)
    return [part for _, part in sorted(parts.values(), key=lambda counted: -counted[0])]


def _prefixes(key: str) -> list[str]:
    """``a.b.weight`` may lie under nothing, ``a.`` or ``a.b.``."""
    return ["", *(key[: place + 1] for place, sign in enumerate(key) if sign == ".")]


def _part(weights: Mapping[str, Tensor], prefix: str, naming: Naming) -> Part:
    there = {key[len(prefix) :] for key in weights if key.startswith(prefix)}
    names = set(naming.values())
    missing = sorted(name for name in names - there if name.rpartition(".")[2] != COUNTER)
    return Part(prefix, naming, tuple(missing), tuple(sorted(there - names)))


def chosen(parts: list[Part], asked: str | None, path: object) -> Part:
    """The part to take: the one that fits, among those that ``asked`` names; else the nearest.

    Raises CheckpointError where several fit, or none is called so, naming those that there are.
    """
    fitting = [part for part in parts if part.fits]
    called = parts if asked is None else [part for part in parts if part.is_called(asked)]
    candidates = [part for part in called if part.fits]
    labels = ", ".join(part.label for part in fitting) or "none"
    if not called:
        raise CheckpointError(
            f"{path}: found no weights under {asked}; expected one of those there: {labels}"
        )
    if len(candidates) > 1:
        raise CheckpointError(
            f"{path}: found weights of this network under {', '.join(part.label for part in candidates)}; "
            "expected one, or a checkpoint_part that names it"
        )
    return (candidates or called)[0]
