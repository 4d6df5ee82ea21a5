"""What commands share: the folder that they look into, and how they end that the user can mend."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from sakd.credentials import hidden
from sakd.errors import ConfigError, SakdError

FOLDER = click.Path(path_type=Path)
FORM = click.Choice(["terminal", "json"])
from_folder = click.option(
    "--from", "folder", type=FOLDER, default="runs", show_default=True, help="A folder of runs."
)


@contextmanager
def errors_told() -> Iterator[None]:
    """End with one line, and exit code 1, for what the user can mend."""
    try:
        yield
    except SakdError as error:
        raise click.ClickException(hidden(str(error))) from error


def check_output(path: Path, option: str = "--output") -> None:
    """Raise ConfigError where no file can be written at ``path``, before any work is done for it.

    What lies there is replaced: a device, say, would be no device any more.
    """
    if not path.name or (path.exists() and not path.is_file()):
        raise ConfigError(f"{option}: found {str(path)!r}, expected the name of a file, or of none yet")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: found no folder {str(path.parent)!r}, expected one for {path.name}")


def check_outputs(paths: Mapping[str, Path], sources: Iterable[Path]) -> None:
    """Check the outputs of one command, by option, which reads ``sources``: no two are one file.

    Raises ConfigError.
    """
    taken = {source.resolve(): "--from" for source in sources}
    for option, path in paths.items():
        check_output(path, option)
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise ConfigError(f"{option}: found {str(path)!r}, as in {other}; expected a file of its own")
