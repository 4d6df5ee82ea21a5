"""Rates that a finished run kept at its spots: `spot_mode=random spot_mode.p=from:adaptive` is its control.

What is kept is then of the same amount, and of no choice; with `epochs:adaptive` in each epoch, too.
"""

import glob
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sakd import names
from sakd.configuration.folders import find_run, read_config
from sakd.configuration.identity import identity, short_names
from sakd.configuration.prerequisites import Config
from sakd.errors import ConfigError, RunError
from sakd.files import parse_json, read_json, read_whole

FROM, BY_EPOCH = "from:", "epochs:"
DIGITS = 6  # of a rate by epoch: hundreds of them stay a parameter that MLflow takes
EXPECTED = (
    "a finished run's folder, its name in `runs` or its beginning, or the spot mode of a run that differs in "
    "that alone"
)


def asks_for_rates(config: Mapping[str, Any]) -> bool:
    """True if ``spot_mode.p`` names a run, which may be another one for each cell of a sweep."""
    mode = config.get("spot_mode")
    wanted = mode.get("p") if isinstance(mode, Mapping) else None
    return isinstance(wanted, str) and wanted.startswith((FROM, BY_EPOCH))


def with_rates(config: Config) -> Config:
    """The configuration with numbers in the place of ``spot_mode.p: from:RUN``, or ``epochs:RUN``.

    They are means over RUN's epochs, by spot, or lists of each epoch's. RUN: EXPECTED. Raises ConfigError
    where there is none such.
    """
    if not asks_for_rates(config):
        return config
    mode = config["spot_mode"]
    wanted = mode["p"]
    folder = _folder(config, *wanted.partition(":")[::2])
    result = read_json(folder / "result.json")
    if result is None:
        raise ConfigError(f"spot_mode.p: found {wanted}, expected a finished run in {folder}")
    rates = result.get("kept_mean")
    if not isinstance(rates, dict) or not rates:
        raise ConfigError(
            f"spot_mode.p: found no kept_mean in {folder / 'result.json'}, expected rates by spot: that run "
            "has no teacher, or an earlier version finished it"
        )
    if wanted.startswith(BY_EPOCH):
        rates = _by_epoch(folder / "metrics.jsonl", rates, config.get("epochs"))
    return {**config, "spot_mode": {**mode, "p": rates}}


def _by_epoch(path: Path, spots: Iterable[str], epochs: int) -> dict[str, list[float]]:
    """What a finished run kept at the spots in each epoch, of which there are to be so many."""
    try:
        lines = [parse_json(line) for line in (read_whole(path) or b"").splitlines()]
        rates = {spot: [round(line[names.safe(f"kept/{spot}")], DIGITS) for line in lines] for spot in spots}
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"spot_mode.p: found no shares kept by epoch in {path} ({error})") from error
    if len(lines) != epochs:
        raise ConfigError(
            f"spot_mode.p: found {len(lines)} epochs in {path}, expected {epochs}, as this run is to have"
        )
    return rates


def _folder(config: Config, how: str, wanted: str) -> Path:
    """The run that is meant: the finished twin in the spot mode of that name, or one that is called so."""
    twins = _twins(config, wanted)
    if len(twins) == 1:
        return twins[0]
    if twins:
        found = ", ".join(twin.name for twin in twins)
        raise ConfigError(
            f"spot_mode.p: found {how}:{wanted}, which may mean {found}; expected one: {EXPECTED}"
        )
    try:
        return find_run(wanted, Path(config["runs"]))
    except RunError as error:
        raise ConfigError(f"spot_mode.p: found {how}:{wanted}, expected {EXPECTED} ({error})") from error


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
