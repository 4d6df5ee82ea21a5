"""Passwords in the URIs of stores: used, neither shown nor stored, and sent only where the user says.

Whatever is shown or stored has *** in a password's place. The process knows it, and leaves it in
MLFLOW_TRACKING_URI to those that it starts.
"""

import os
import re
from urllib.parse import unquote

from sakd.errors import ConfigError

STORE = "MLFLOW_TRACKING_URI"  # the environment's name for the store, with its password
HIDDEN = "***"
LEAST = 5  # characters of a password that is hidden also where no URI is around it

SCHEME = r"[a-zA-Z][a-zA-Z0-9+.-]*://"
REST = rf"(?:(?!,(?:{SCHEME}|[\s'\"]|$))[^\s'\"])+"  # of a URI: a comma may part it from the next
# The password in scheme://user:password@host: all up to the last @.
OF_A_USER = re.compile(rf"((?<!/)//[^\s'\":/@]*:)({REST})(?=@)")
# The value of a query's key that says that it is secret.
OF_A_QUERY = re.compile(
    r"([?&;][^\s'\"=&;#]*(?:passw|passphrase|pwd|token|secret|credential|api_?key|access_?key)[^\s'\"=&;#]*=)"
    r"([^\s'\"&;#,]+)",
    re.IGNORECASE,
)
URI = re.compile(SCHEME + REST)
NAMES_A_STORE = re.compile(rf"\+*tracking[.=]|--[a-z]+=|{SCHEME}")  # of a command line's arguments

_uris: dict[str, str] = {}  # of stores that the user named, by what is shown of them
_passwords: set[str] = set()


def hidden(text: str) -> str:
    """The text with *** in the place of every password: in URIs, and those that are known."""
    for password in sorted(_passwords, key=len, reverse=True):
        text = text.replace(password, HIDDEN)
    return _shown(text)


def remember(uri: str) -> str:
    """Take in that the user names this store; its URI as it may be shown and stored.

    A password in it is known from here on, in this process and in those that it starts.
    """
    shown = _shown(uri)
    found = {match[2] for pattern in (OF_A_USER, OF_A_QUERY) for match in pattern.finditer(uri)} - {HIDDEN}
    if found:
        _passwords.update(text for text in (*found, *map(unquote, found)) if len(text) >= LEAST)
        _uris[shown] = os.environ[STORE] = uri
    elif uri:
        _uris.setdefault(shown, uri)
    return shown


def remember_typed(argument: str) -> str:
    """An argument of a command line as it may be shown: of a store that it names, the password is known."""
    return URI.sub(lambda uri: remember(uri[0]), argument) if NAMES_A_STORE.match(argument) else argument


def revealed(uri: str) -> str:
    """A store's URI with its password.

    Raises ConfigError where that is not known here, and for a server that the user has not named: credentials
    go with what is sent there, and anybody who writes into a shared folder may have named it.
    """
    remember(os.environ.get(STORE, ""))
    shown = _shown(uri)
    if HIDDEN in _uris.get(shown, shown):
        raise ConfigError(
            f"tracking.uri: found {shown}, expected its password in {STORE}, or `sakd sync --uri`"
        )
    if shown not in _uris and not shown.startswith(("sqlite:", "file:")):
        raise ConfigError(
            f"found the store {shown}, expected one that {STORE} or the configuration names; "
            f"`sakd sync --uri {shown}` sends there"
        )
    return _uris.get(shown, uri)


def _shown(text: str) -> str:
    return OF_A_QUERY.sub(rf"\1{HIDDEN}", OF_A_USER.sub(rf"\1{HIDDEN}", text))
