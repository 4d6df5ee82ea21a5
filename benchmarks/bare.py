"""Stand-ins for packages that a machine with torch alone lacks.

Annotations say nothing then, and values are not held to them: they were when they were composed.
"""

import sys
from importlib.util import find_spec
from types import ModuleType


class Anything:
    """Stands for an annotation that says nothing, and for what would hold a value to it."""

    def __init__(self, *_: object, **__: object):
        pass

    @property
    def validator(self) -> "Anything":
        return self

    def validate_python(self, value: object) -> object:
        return value


class StandIn(ModuleType):
    """Stands for a package: each of its names is a class of its own."""

    def __getattr__(self, name: str) -> type[Anything]:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Anything,), {})
        setattr(self, name, made)
        return made


def stand_in_for_missing() -> None:
    for name in ("annotated_types", "pydantic"):
        if find_spec(name) is None:
            sys.modules[name] = StandIn(name)
