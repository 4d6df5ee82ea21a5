"""How commands end that the user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from sakd.credentials import hidden
from sakd.errors import SakdError


@contextmanager
def errors_told() -> Iterator[None]:
    """End with one line, and exit code 1, for what the user can mend."""
    try:
        yield
    except SakdError as error:
        raise click.ClickException(hidden(str(error))) from error
