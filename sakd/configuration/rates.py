"""Rates that a finished run kept at its spots: `spot_mode=random spot_mode.p=from:adaptive` is its control.

What is kept is then of the same amount, and of no choice.
"""

import glob
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sakd import names
from sakd.configuration.folders import find_run, read_config
from sakd.configuration.identity import identity, short_names
from sakd.configuration.prerequisites import Config
from sakd.errors import ConfigError, RunError
from sakd.files import read_json

FROM = "from:"
EXPECTED = (
    "a finished run's folder, its name in `runs` or its beginning, or the spot mode of a run that differs in "
    "that alone"
)


def asks_for_rates(config: Mapping[str, Any]) -> bool:
    """True if ``spot_mode.p`` names a run, which may be another one for each cell of a sweep."""
    mode = config.get("spot_mode")
    wanted = mode.get("p") if isinstance(mode, Mapping) else None
    return isinstance(wanted, str) and wanted.startswith(FROM)


def with_rates(config: Config) -> Config:
    """The configuration with numbers in the place of ``spot_mode.p: from:RUN``.

    They are means over RUN's epochs, by spot. RUN: EXPECTED. Raises ConfigError where there is none such.
    """
    if not asks_for_rates(config):
        return config
    mode = config["spot_mode"]
    wanted = mode["p"]
    folder = _folder(config, wanted.removeprefix(FROM))
    result = read_json(folder / "result.json")
    if result is None:
        raise ConfigError(f"spot_mode.p: found {wanted}, expected a finished run in {folder}")
    rates = result.get("kept_mean")
    if not isinstance(rates, dict) or not rates:
        raise ConfigError(
            f"spot_mode.p: found no kept_mean in {folder / 'result.json'}, expected rates by spot: that run "
            "has no teacher, or an earlier version finished it"
        )
    return {**config, "spot_mode": {**mode, "p": rates}}


def _folder(config: Config, wanted: str) -> Path:
    """The run that is meant: the finished twin in the spot mode of that name, or one that is called so."""
    twins = _twins(config, wanted)
    if len(twins) == 1:
        return twins[0]
    if twins:
        found = ", ".join(twin.name for twin in twins)
        raise ConfigError(
            f"spot_mode.p: found {FROM}{wanted}, which may mean {found}; expected one: {EXPECTED}"
        )
    try:
        return find_run(wanted, Path(config["runs"]))
    except RunError as error:
        raise ConfigError(f"spot_mode.p: found {FROM}{wanted}, expected {EXPECTED} ({error})") from error


def _twins(config: Config, mode: str) -> list[Path]:
    """Finished runs that differ in their spot mode alone, which has that name."""
    *parts, seed = short_names({**config, "spot_mode": {"name": mode}}).values()
    beginning = glob.escape(names.folder(*parts, f"seed{seed}"))
    own, found = _beside_mode(config), []
    for path in sorted(Path(config["runs"]).glob(f"{beginning}-*/result.json")):
        with suppress(RunError):  # it is none, as far as can be told
            if own is not None and _beside_mode(read_config(path.parent)) == own:
                found.append(path.parent)
    return found


def _beside_mode(config: Any) -> Config | None:
    """What a run's result depends on but for its spot mode; None of what is no configuration."""
    try:
        return {key: value for key, value in identity(config).items() if key != "spot_mode"}
    except (AttributeError, KeyError, TypeError, OSError):
        return None
