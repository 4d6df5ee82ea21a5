"""Sums of distillers: what is beside each other in ``distiller=[at,sp]`` is one distiller, ``at+sp``.

Hydra would merge the files of a group's list key by key, one method's weight in the place of the other's.
Here ``at+sp`` is a file that nobody has to write: it has the losses of both, KD once, each with its own
weight, and is named, overridden and swept as any other.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.default_element import ConfigDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from sakd.errors import ConfigError, did_you_mean

GROUP = "distiller"
PLUS = "+"

Node = dict[str, Any]
Load = Callable[[str], ConfigResult | None]


def is_sum(path: str) -> bool:
    """True for the path of a group's file, such as ``distiller/at+sp``, that stands for a sum."""
    return path.startswith(f"{GROUP}/") and PLUS in path


def sum_of(path: str, load: Load, options: Sequence[str]) -> Node:
    """The file of a sum, as plain values. ``load`` reads the group's other files, which are ``options``.

    Raises ConfigError for what cannot be summed.
    """
    names = path.removeprefix(f"{GROUP}/").split(PLUS)
    whole = f"{GROUP}={PLUS.join(names)}"
    if len(set(names)) < len(names):
        raise ConfigError(f"{whole}: found one of them twice, expected each once")
    own: dict[str, Node] = {}
    below: dict[str, list[str]] = {}  # the files that each stands on: kd
    for name in names:
        if name not in options:
            raise ConfigError(
                f"{whole}: found no distiller {name!r}, expected names out of {', '.join(options)}."
                f"{did_you_mean(name, options)}"
            )
        own[name], below[name] = _file(f"{GROUP}/{name}", load, whole)
    bases = dict.fromkeys(base for names_below in below.values() for base in names_below)  # each once
    shared = {base: _file(f"{GROUP}/{base}", load, whole)[0] for base in bases}
    parts = [*shared.values()]
    parts += [
        _inlined(node, name, {base: shared[base] for base in below[name]}, whole)
        for name, node in own.items()
        if name not in shared  # KD itself, beside one that has it
    ]
    losses: Node = {}
    for part in parts:
        for loss, node in part.get("losses", {}).items():
            if loss in losses:
                raise ConfigError(f"{whole}: found the loss {loss!r} twice, expected each once")
            losses[loss] = node
    pretrainings = [
        {**node["pretraining"], "distiller": node["name"]}  # so that it is the run that it is alone
        for node in parts
        if node.get("pretraining") is not None
    ]
    if len(pretrainings) > 1:
        raise ConfigError(f"{whole}: found {len(pretrainings)} with a pretraining, expected at most one")
    products = [node["product"] for node in parts if node.get("product") is not None]
    if len(products) > 1:
        raise ConfigError(f"{whole}: found {len(products)} with a product, expected at most one")
    summed: Node = {
        "name": PLUS.join(str(node["name"]) for node in own.values()),
        "reference": None,  # each has its own
    }
    for node in shared.values():  # their keys, as distiller.alpha, act on all
        summed |= {
            key: value for key, value in node.items() if key not in (*summed, "pretraining", "product")
        }
    summed["losses"] = losses
    summed |= {"product": products[0]} if products else {}
    return summed | ({"pretraining": pretrainings[0]} if pretrainings else {})


def _file(path: str, load: Load, whole: str) -> tuple[Node, list[str]]:
    """A distiller's file as plain values, uncomputed, and the distillers that it stands on."""
    found = load(path)
    node = OmegaConf.to_container(found.config, resolve=False)
    bases = [default for default in found.defaults_list or [] if default.get_name() != "_self_"]
    plain = all(isinstance(base, ConfigDefault) and "/" not in base.path for base in bases)
    if not plain or any(found.header.values()):
        raise ConfigError(
            f"{whole}: conf/{path}.yaml cannot be summed; expected defaults out of the same group alone"
        )
    names = [base.get_name() for base in bases]
    for name in names:
        if _file(f"{GROUP}/{name}", load, whole)[1]:
            raise ConfigError(
                f"{whole}: conf/{path}.yaml stands on {name}, which stands on others; cannot be summed"
            )
    if not isinstance(node.get("losses", {}), dict) or "name" not in node:
        raise ConfigError(f"{whole}: conf/{path}.yaml has no name or no losses, expected both")
    if not node.get("losses") and not names:
        raise ConfigError(f"{whole}: {path.removeprefix(f'{GROUP}/')} has no loss, expected some to sum")
    return node, names


def _inlined(node: Node, name: str, bases: dict[str, Node], whole: str) -> Node:
    """A file's losses and pretraining with the file's own keys, ``${distiller.beta}``, put in.

    Raises ConfigError if the file changes what it stands on, and others with it.
    """
    for base, shared in bases.items():
        keys = {*shared} - {"name", "reference", "losses"}
        changed = sorted({*node} & keys) + [
            f"losses.{loss}" for loss in node.get("losses", {}) if loss in shared["losses"]
        ]
        if changed:
            raise ConfigError(
                f"{whole}: {name} changes {base}'s {', '.join(changed)}, so it cannot be summed"
            )
    nodes = ("losses", "pretraining", "product")
    keys = {key: value for key, value in node.items() if key not in nodes}
    own = {key: _with_keys(node[key], keys) for key in nodes if key in node}
    return {"name": node["name"], **own}


def _with_keys(value: Any, keys: Node) -> Any:
    """A copy of a node in which ``${distiller.key}`` is the key's value."""
    if isinstance(value, dict):
        return {name: _with_keys(inner, keys) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_keys(inner, keys) for inner in value]
    for key, own in keys.items():
        asked = f"${{{GROUP}.{key}}}"
        if value == asked:
            return own
        if isinstance(value, str) and asked in value:
            value = re.sub(re.escape(asked), lambda _, own=own: str(own), value)
    return value
