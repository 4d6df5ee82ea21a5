"""What commands share: the folder that they look into, and how they end that the user can mend."""

from collections.abc import Iterator
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
    """Raise ConfigError where there is no folder for the file at ``path``, before any work is done for it."""
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: found no folder {str(path.parent)!r}, expected one for {path.name}")
