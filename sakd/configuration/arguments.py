"""What a command line says, before Hydra reads it: groups by name, distillers summed.

Hydra takes a group's file by its name, or a list of names, which it merges key by key.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType
from hydra.errors import HydraException

from sakd.configuration import sums
from sakd.configuration.groups import choices, folder_of
from sakd.errors import ConfigError

log = logging.getLogger("sakd")

NEEDED = ("dataset", "teacher", "student", "distiller", "spot_mode", "tracking")
MADE_TO_BE_MERGED = ("experiment",)
OF_TRAININGS = ("optimizer", "schedule")  # chosen by name, or written as keys and values; of a teacher, too

_CHOICE = re.compile(r"(\+{0,2}([a-z_/]+)(?:@[\w.]+)?)=.*", re.DOTALL)
_WITHIN_A_CHOICE = re.compile(rf"(\+{{0,2}}(?:{'|'.join((*NEEDED, *OF_TRAININGS))})\.[^=]+)=(.+)", re.DOTALL)
_OF_TEACHERS = re.compile(rf"teacher\.training\.({'|'.join(OF_TRAININGS)})=(.*)", re.DOTALL)
_ONE_CHOICE = re.compile(r"([^=]+)=choice\((.*)\)", re.DOTALL)
_ONE_NULL = re.compile(r"([^=]+)=(null),\2", re.IGNORECASE)  # Hydra knows no choice(null)


def understood(arguments: Sequence[str], multirun: bool = False) -> list[str]:
    """Arguments of a command line as Hydra is to read them.

    ``distiller=kd,[at,sp]`` is ``distiller=kd,at+sp``, and a ``~`` that begins a path the user's home.
    ``teacher.training.optimizer=adamw`` chooses a file, as ``optimizer=adamw`` does; ``schedule=null`` none.
    In a ``multirun`` what is set within a group counts for the cells alone: Hydra would look for it in the
    default's file, too.

    Raises ConfigError for a group that is chosen by anything but a name, and for a value without a key.
    """
    for argument in arguments:
        if re.match(r"[+~]*[@=]", argument):
            raise ConfigError(f"{argument}: found no key, expected key=value")
    arguments = [_with_names(_of_trainings(_with_home(argument))) for argument in arguments]
    return [_for_the_cells(argument) for argument in arguments] if multirun else arguments


def warn_of_two_values(arguments: Iterable[str]) -> None:
    """Say which keys have two values: as in any of Hydra's programs, the last counts.

    So a script's own overrides may stand before a user's; who wants both is told how.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        override = None if argument.startswith("-") else _parsed(argument)
        if override is None or override.type == OverrideType.DEL:
            continue
        package = "" if override.package is None else f"@{override.package}"
        key, value = f"{override.key_or_group}{package}", argument.partition("=")[2]
        before = values.get(key, value)
        if before != value:
            log.warning(
                "%s: found two values, %s and %s; the last counts (-m %s=%s,%s runs both)",
                *(key, before, value, key, before, value),
            )
        values[key] = value


def as_typed(argument: str) -> str:
    """An argument without what ``understood`` put around its value."""
    null, one = _ONE_NULL.fullmatch(argument), _ONE_CHOICE.fullmatch(argument)
    if null is not None:
        return f"{null[1]}={null[2]}"
    return argument if one is None or _is_sweep(argument) else f"{one[1]}={one[2]}"


def _parsed(argument: str) -> Override | None:
    """The override that an argument is; None for a flag, and for what Hydra will tell what is wrong with."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _with_home(argument: str) -> str:
    """Shells leave ``dataset.root=~/photos`` as it is, and to Hydra it is no value."""
    return re.sub(r"(?<=[=,])~(?=/)", lambda _: os.path.expanduser("~"), argument)


def _of_trainings(argument: str) -> str:
    """The group in the place of a teacher's key, and a removed choice in that of one that is null."""
    of_teacher = _OF_TEACHERS.fullmatch(argument)
    override = _parsed(argument)
    if override is None or override.type != OverrideType.CHANGE:
        return argument
    value = override.value()
    if of_teacher is not None and not isinstance(value, dict):
        argument = f"{of_teacher[1]}@teacher.training.{of_teacher[1]}={of_teacher[2]}"
    key = argument.partition("=")[0]
    return f"~{key}" if value is None and key.partition("@")[0] == "schedule" else argument


def _with_names(argument: str) -> str:
    start = _CHOICE.fullmatch(argument)
    group = "" if start is None else start[2]
    if not group or not folder_of(group).is_dir():
        return argument
    override = _parsed(argument)
    if override is None:
        return argument
    value = override.value()
    if override.is_sweep_override() and not isinstance(value, ChoiceSweep):
        return argument  # a range, or glob(*): Hydra knows what is in it
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    chosen = [getattr(each, "text", each) for each in values]
    names = [_name(group, each, start[1].rpartition("@")[2]) for each in chosen]
    return argument if names == chosen else f"{start[1]}={','.join(names)}"


def _name(group: str, chosen: Any, key: str) -> Any:
    if (group in OF_TRAININGS and isinstance(chosen, dict)) or (group == "schedule" and chosen is None):
        return chosen
    several = isinstance(chosen, list) and bool(chosen) and all(isinstance(name, str) for name in chosen)
    if several and group == sums.GROUP:
        return sums.PLUS.join(chosen)
    if not isinstance(chosen, str) and not (several and group in MADE_TO_BE_MERGED):
        form = ", or several to sum: [at,sp]" if group == sums.GROUP else ""
        found = f"[{','.join(map(str, chosen))}]" if isinstance(chosen, list) else chosen
        raise ConfigError(
            f"{key}: found {'null' if chosen is None else found}, expected one of "
            f"{', '.join(sorted(choices(group)))}{form}"
        )
    return chosen


def _for_the_cells(argument: str) -> str:
    within, override = _WITHIN_A_CHOICE.fullmatch(argument), _parsed(argument)
    if within is None or override is None or _is_sweep(argument):
        return argument
    if override.value() is None:
        return f"{within[1]}={within[2]},{within[2]}"
    return f"{within[1]}=choice({within[2]})"


def _is_sweep(argument: str) -> bool:
    """True for several values: a sweep of one is none."""
    override = _parsed(argument)
    if override is None or not override.is_sweep_override():
        return False
    value = override.value()
    return not isinstance(value, ChoiceSweep) or len(value.list) > 1


def refuse_merged(chosen: Mapping[str, Any]) -> None:
    """Raise ConfigError for a group that a run needs and of which not one file was chosen.

    A list in a file's defaults is merged by Hydra, key by key, so that one method's weight, or one network's
    layers, would be another's. ``chosen``: files by group, as Hydra notes them.
    """
    for group in NEEDED:
        if group not in chosen:
            form = f"; a sum is written {group}: at+sp" if group == sums.GROUP else ""
            raise ConfigError(f"{group}: found none of its files, or several in a list, expected one{form}")
