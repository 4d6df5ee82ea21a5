"""Whether keys and values fit what takes them: the annotations of a constructor, or of a schema.

A value must be of its annotation's kind, strictly (true is no number, "0.1" is none either, 1 is a float),
and within its range. Where a constructor of another package has no annotation, the default tells the kind.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, is_typeddict

import annotated_types
from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError

from sakd.errors import ConfigError, did_you_mean
from sakd.imports import find
from sakd.ranges import LARGEST

Node = dict[str, Any]

STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
LISTS = (list, tuple, set, frozenset, Sequence, Iterable, AbstractSet)
KEYS_AND_VALUES = (dict, Mapping)
PATHS = (Path, PathLike)
PLAIN = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
FAR = 1e6  # bounds beyond are told to those alone who come near
LONGEST_SHOWN = 100  # characters of a value in a message
WHOLE_BELOW = 2**63  # more does not fit into a tensor
NAMED = ("name",)  # what a network's node has beside its constructor's keys


class Built:
    """Stands for what a node with a ``_target_`` will be."""

    def __init__(self, node: Node):
        self.node = node

    def __repr__(self) -> str:
        return repr(self.node)


@dataclass(frozen=True)
class Kind:
    """What a value must be."""

    adapter: TypeAdapter
    expected: str  # in words, without bounds that nobody comes near
    in_full: str  # with them
    options: tuple[str, ...] = ()  # where it is one of some words
    inner: "Kind | None" = None  # of each value, where it is keys and values

    def check(self, key: str, value: object) -> None:
        """Raise ConfigError, naming ``key``, unless ``value`` is of this kind."""
        if self.inner is not None and isinstance(value, dict):
            for name, own in value.items():
                self.inner.check(f"{key}.{name}", own)
        try:
            self.adapter.validator.validate_python(value)
        except ValidationError:
            near = did_you_mean(value, self.options) if isinstance(value, str) else ""
            expected = self.in_full if _has_large(value) else self.expected
            stop = "." if near else ""
            raise ConfigError(f"{key}: found {_shown(value)}, expected {expected}{stop}{near}") from None


@dataclass(frozen=True)
class Parameter:
    """A key that something takes."""

    kind: Kind | None  # None: anything
    required: bool
    schema: type | None = None  # of the keys inside, where it is a node that has one
    optional: bool = False  # such a node may be null


@dataclass(frozen=True)
class Takes:
    """The keys that something takes."""

    parameters: Mapping[str, Parameter]
    others: bool  # True if it takes keys of any other name


def _shown(value: object) -> str:
    """A value in one line of no more than some words."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _has_large(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_has_large, value))
    return isinstance(value, (int, float)) and not -FAR < value < FAR


def _with_placeholders(value: Any) -> Any:
    if isinstance(value, dict):
        if "_target_" in value:
            return Built(value)
        return {name: _with_placeholders(inner) for name, inner in value.items()}
    return [_with_placeholders(inner) for inner in value] if isinstance(value, list) else value


# ---- schemas


@cache
def _takes_of_schema(schema: type) -> Takes:
    hints = typing.get_type_hints(schema, include_extras=True)
    parameters = {}
    for name, hint in hints.items():
        required = get_origin(hint) is not NotRequired
        hint = hint if required else get_args(hint)[0]
        inner = [part for part in (hint, *get_args(hint)) if is_typeddict(part)]
        parameters[name] = (
            Parameter(None, required, inner[0], type(None) in get_args(hint))
            if inner
            else Parameter(kind_of(hint), required)
        )
    return Takes(parameters, others="_target_" in hints)


def check_schema(values: object, schema: type, key: str = "") -> None:
    """Raise ConfigError unless ``values`` has the keys of ``schema``, a TypedDict, with values that fit.

    A node with a ``_target_`` may have others, which are its constructor's. ``key`` is the node's own; empty
    for the whole configuration.
    """
    takes = _takes_of_schema(schema)
    if not isinstance(values, dict):
        names = ", ".join(takes.parameters)
        raise ConfigError(f"{key}: found {_shown(values)}, expected keys and values ({names})")
    before = f"{key}." if key else ""
    if not takes.others:
        for name in values:
            if name not in takes.parameters:
                raise _no_such_key(name, takes, before)
    for name, parameter in takes.parameters.items():
        if name not in values:
            if parameter.required:
                raise ConfigError(f"{before}{name}: found nothing, {key or 'a run'} needs it")
        elif parameter.schema is None:
            _check_plain(parameter.kind, f"{before}{name}", values[name])
        elif values[name] is not None or not parameter.optional:
            check_schema(values[name], parameter.schema, f"{before}{name}")


def _check_plain(kind: Kind | None, key: str, value: object) -> None:
    if kind is not None:
        kind.check(key, value)


def check_keys(values: Mapping[str, Any], schema: type, key: str) -> None:
    """Raise ConfigError unless ``values`` are all that a dataclass takes, and fit its annotations."""
    takes = _takes_of(schema, 0)
    for name in values:
        if name not in takes.parameters:
            raise _no_such_key(name, takes, f"{key}.")
    for name, parameter in takes.parameters.items():
        if name not in values:
            raise ConfigError(f"{key}.{name}: found nothing, expected the key with its value")
        _check_plain(parameter.kind, f"{key}.{name}", values[name])


def _no_such_key(name: object, takes: Takes, before: str) -> ConfigError:
    near = did_you_mean(name, takes.parameters)
    return ConfigError(f"{before}{name}: no such key; expected one of {', '.join(takes.parameters)}.{near}")


# ---- constructors


def check_node(
    node: object,
    key: str,
    positional: int = 0,
    leave: Sequence[str] = NAMED,
    ranges: Mapping[str, Any] | None = None,
) -> None:
    """Raise ConfigError unless a node's ``_target_`` can be imported and takes its keys and their values.

    Nodes among its values are checked, too. ``positional``: so many arguments stand before the keys. The keys
    to ``leave`` are left out. ``ranges``: kinds by a parameter's name, for constructors that say less.
    """
    _check_call(node, key, positional, leave, ranges or {})


def _check_call(
    node: object, key: str, positional: int, left: Sequence[str], ranges: Mapping[str, Any]
) -> None:
    target = target_of(node, key)
    own = {name: value for name, value in node.items() if name not in left}
    for name in own:
        if str(name).startswith("_") and name != "_target_":
            raise ConfigError(
                f"{key}.{name}: found a key of Hydra's instantiation, expected _target_ and what it takes"
            )
    takes = _takes_of(target, positional)
    if takes is not None:
        _check_keys(takes, own, key, besides=[name for name in left if name != "name"])
    for name, value in own.items():
        if name == "_target_":
            continue
        if name in ranges:
            kind_of(ranges[name]).check(f"{key}.{name}", _with_placeholders(value))
        elif takes is not None and name in takes.parameters:
            _check_plain(takes.parameters[name].kind, f"{key}.{name}", _with_placeholders(value))
    for name, value in own.items():
        _check_inner(value, f"{key}.{name}", ranges)


def _check_inner(value: Any, key: str, ranges: Mapping[str, Any]) -> None:
    if isinstance(value, dict) and "_target_" in value:
        _check_call(value, key, 0, (), ranges)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_inner(inner, f"{key}.{name}", ranges)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _check_inner(inner, f"{key}.{place}", ranges)


def target_of(node: object, key: str) -> Callable[..., Any]:
    """The callable that a node's ``_target_`` names.

    Raises ConfigError if that is nothing, or nothing to call.
    """
    if not isinstance(node, dict):
        raise ConfigError(f"{key}: found {node!r}, expected keys and values")
    path = node.get("_target_")
    if not isinstance(path, str):
        raise ConfigError(f"{key}._target_: found {path!r}, expected the import path of what to build")
    try:
        target = find(path)
    except ImportError as error:
        raise ConfigError(f"{key}._target_: {error}") from error
    if not callable(target):
        raise ConfigError(
            f"{key}._target_: found {path}, a {type(target).__name__}, expected what can be called"
        )
    return target


def _check_keys(takes: Takes, node: Node, key: str, besides: Sequence[str]) -> None:
    if not takes.others:
        names = [*takes.parameters, *besides]
        for name in node:
            if name != "_target_" and name not in names:
                near = did_you_mean(name, names)
                raise ConfigError(
                    f"{key}.{name}: no such key; expected {', '.join(names) or 'none'}.{near} "
                    f"(~{key}.{name} removes it)"
                )
    for name, parameter in takes.parameters.items():
        if parameter.required and name not in node:
            raise ConfigError(f"{key}.{name}: found nothing, {node['_target_']} needs it")


@cache
def _takes_of(target: Callable[..., Any], positional: int) -> Takes | None:
    """The keys that a callable takes behind so many positional arguments; None where it does not tell."""
    try:
        signature = list(inspect.signature(target).parameters.values())[positional:]
    except (ValueError, TypeError):  # some built-in callables
        return None
    hints = _hints_of(target)
    parameters = {
        parameter.name: Parameter(
            _kind_of_parameter(parameter, hints), required=parameter.default is parameter.empty
        )
        for parameter in signature
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    return Takes(parameters, any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature))


def _hints_of(target: Callable[..., Any]) -> Mapping[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # of other packages, with names that only a type checker knows
        return {}


def _kind_of_parameter(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Kind | None:
    default = parameter.default
    if parameter.name in hints:
        annotation = hints[parameter.name]
        return kind_of(annotation | None if default is None and annotation is not Any else annotation)
    if type(default) in (bool, str):
        return kind_of(type(default))
    if type(default) in (int, float):
        return kind_of(float)
    if isinstance(default, (list, tuple)):
        return kind_of(list)
    return None


# ---- words


def expected_of_schema(schema: type, node: str = "") -> dict[str, str]:
    """What each key may be, in words, of a schema's node at the path ``node``; nothing where it has none."""
    for name in filter(None, node.split(".")):
        inner = _takes_of_schema(schema).parameters.get(name)
        if inner is None or inner.schema is None:
            return {}
        schema = inner.schema
    return _expected(_takes_of_schema(schema))


def expected_of_target(target: Callable[..., Any], ranges: Mapping[str, Any]) -> dict[str, str]:
    """What each key may be, in words, that a callable takes; see ``check_node`` for ``ranges``."""
    takes = _takes_of(target, 0)
    if takes is None:
        return {}
    return _expected(takes) | {
        name: kind_of(ranges[name]).expected for name in takes.parameters if name in ranges
    }


def _expected(takes: Takes) -> dict[str, str]:
    return {
        name: _expected_node(taken) if taken.kind is None else taken.kind.expected
        for name, taken in takes.parameters.items()
    }


def _expected_node(taken: Parameter) -> str:
    return "" if taken.schema is None else "keys and values" + (" or null" if taken.optional else "")


# ---- kinds


def kind_of(annotation: Any) -> Kind:
    """What a value must be for an annotation."""
    try:
        return _kind_of(annotation)
    except TypeError:  # one that cannot be hashed
        return _kind_of.__wrapped__(annotation)


@cache
def _kind_of(annotation: Any) -> Kind:
    plain = _plain(annotation)
    options = get_args(plain) if get_origin(plain) is Literal else ()
    inner = kind_of(get_args(annotation)[1]) if get_origin(plain) is dict and get_args(annotation) else None
    words = _in_words(plain, False), _in_words(plain, True)
    return Kind(TypeAdapter(plain, config=STRICT), *words, tuple(map(str, options)), inner)


def _plain(annotation: Any) -> Any:
    """The part of an annotation that a configuration can give; what only a ``_target_`` can is Built."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[_plain(arguments[0]), *annotation.__metadata__]
    if origin in (Union, types.UnionType):
        return Union[*(_plain(part) for part in arguments)]
    if origin is Literal or annotation in (Any, bool, str, None, type(None)):
        return annotation
    if annotation is object or annotation is inspect.Parameter.empty:
        return Any
    if annotation is float:
        return Annotated[float, annotated_types.Ge(-LARGEST), annotated_types.Le(LARGEST)]
    if annotation is int:
        return Annotated[int, annotated_types.Ge(-WHOLE_BELOW), annotated_types.Lt(WHOLE_BELOW)]
    kind = origin or annotation
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return Annotated[tuple[*(_plain(part) for part in arguments)], Strict(False)]
    if kind in LISTS:
        return list[_plain(arguments[0])] if arguments else list[Any]
    if kind in KEYS_AND_VALUES:
        return dict[_plain(arguments[0]), _plain(arguments[1])] if arguments else dict[str, Any]
    return str if kind in PATHS else Built


def _in_words(plain: Any, in_full: bool) -> str:
    origin, arguments = get_origin(plain), get_args(plain)
    if origin is Annotated:
        return _bounded(arguments[0], arguments[1:], in_full)
    if origin in (Union, types.UnionType):
        known = [part for part in arguments if part is not Built]
        parts = known if {*known} - {type(None)} else arguments
        return " or ".join(dict.fromkeys(_in_words(part, in_full) for part in parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is list:
        return "a list" if arguments[0] is Any else f"a list of {_plural(_in_words(arguments[0], in_full))}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(_in_words(part, in_full) for part in arguments)}"
    if origin is dict:
        return (
            "keys and values"
            if arguments[1] is Any
            else f"keys, each with {_in_words(arguments[1], in_full)}"
        )
    if plain is Built:
        return "keys and values with a _target_"
    return PLAIN.get(plain, "null" if plain is None else "anything")


def _plural(words: str) -> str:
    return re.sub(r"\ba (whole number|number)\b", r"\1s", words)


def _bounded(inner: Any, constraints: Sequence[Any], in_full: bool) -> str:
    """Words for a kind with a range."""
    for constraint in constraints:
        if isinstance(constraint, annotated_types.DocInfo):
            return constraint.documentation
    if get_origin(inner) is Annotated:
        inner, constraints = get_args(inner)[0], (*get_args(inner)[1:], *constraints)
    low = high = order = ""
    least = "" if any(isinstance(part, annotated_types.MaxLen) for part in constraints) else "at least "
    for constraint in constraints:
        match constraint:
            case annotated_types.Ge(ge=bound) if in_full or bound > -FAR:
                low = f"from {_figure(bound)}"
            case annotated_types.Gt(gt=bound):
                low = f"above {_figure(bound)}"
            case annotated_types.Le(le=bound) if in_full or bound < FAR:
                high = f"to {_figure(bound)}"
            case annotated_types.Lt(lt=bound) if in_full or bound < FAR:
                high = f"to below {_figure(bound)}"
            case annotated_types.Predicate():
                order = ", in ascending order"
            case annotated_types.MinLen(min_length=1):
                order = " that is not empty"
            case annotated_types.MinLen(min_length=count) | annotated_types.Len(min_length=count):
                order = f", {least}{count} of them{order}"
    if low and not high:
        low = low.replace("from", "of at least")
    return " ".join(filter(None, [_in_words(inner, in_full), low, high])) + order


def _figure(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
