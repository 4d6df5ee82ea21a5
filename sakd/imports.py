"""What import paths name."""

from importlib import import_module
from typing import Any

from sakd.errors import did_you_mean


def find(path: str) -> Any:
    """The object at an import path, as an expression of Python would find it.

    What a package shows comes before a module of the same name: ``torchvision.models.googlenet`` is the
    function. Raises ImportError with the cause in its message, also where a module fails while it is
    imported.
    """
    first, *rest = path.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        raise ImportError(f"cannot import {path!r}: that is no import path")
    found, so_far = _module(first, path), first
    for name in rest:
        owner, so_far = so_far, f"{so_far}.{name}"
        try:
            found = getattr(found, name)
        except AttributeError:
            if not hasattr(found, "__path__"):  # no package: there are no modules in it
                near = did_you_mean(name, dir(found))
                raise ImportError(f"cannot import {path}: there is no '{name}' in {owner}.{near}") from None
            found = _module(so_far, path, dir(found))
        except Exception as error:  # of a module that is imported once it is asked for
            raise ImportError(f"cannot import {path}: {_told(error)}") from error
    return found


def _module(name: str, path: str, siblings: list[str] | None = None) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ImportError(f"cannot import {path}: {_told(error)}") from error
        owner, _, last = name.rpartition(".")
        where = f" in {owner}" if owner else ""
        near = did_you_mean(last, siblings or ())
        raise ImportError(f"cannot import {path}: there is no '{last}'{where}.{near}") from None
    except Exception as error:  # whatever the module does
        raise ImportError(f"cannot import {path}: {_told(error)}") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
