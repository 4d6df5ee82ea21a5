"""Runs' folders by what their users call them, and the configurations that lie in them."""

from pathlib import Path

import yaml

from sakd.configuration.identity import parameters
from sakd.configuration.prerequisites import Config
from sakd.errors import RunError, did_you_mean
from sakd.files import read_whole

FILE = "config.yaml"
NAMED = 3  # runs in an error
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where PyYAML has it


def find_run(called: str, runs: Path) -> Path:
    """A run's folder: ``called`` is a folder, the name of one in ``runs``, or the beginning of one name.

    Raises RunError if there is no such run, or more than one.
    """
    for folder in (Path(called).expanduser(), runs / called):
        if (folder / FILE).is_file():
            return folder
    names = sorted(path.parent.name for path in runs.glob(f"*/{FILE}"))
    found = [name for name in names if called and name.startswith(called)]
    if len(found) == 1:
        return runs / found[0]
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise RunError(
            f"{called!r}: found {len(found)} runs in {runs} whose names begin so, {', '.join(found[:NAMED])}"
            f"{more}; expected one"
        )
    raise RunError(
        f"{called}: found no such run, expected a run's folder, or a name in {runs} or its beginning."
        f"{did_you_mean(called, names)}"
    )


def read_config(folder: Path) -> Config:
    """The configuration of a run's folder. Raises RunError if it is damaged or foreign."""
    path = folder / FILE
    way_out = "bring it back, or move the folder away"
    try:
        raw = read_whole(path)
        if raw is None:
            raise RunError(f"{path}: found no such file; {way_out}")
        config = yaml.load(raw.decode(), SafeLoader)
        parameters(config), int(config["epochs"])
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path}: found no valid YAML ({' '.join(str(error).split()):.160}); {way_out}"
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: is not a run's configuration ({error!r}); {way_out}") from error
    return config
