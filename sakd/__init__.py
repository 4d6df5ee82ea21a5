"""Spot-adaptive knowledge distillation.

Where, not only what, a student learns from its teacher.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``sakd.load``, which needs torch, once it is asked for."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sakd.trained import load

    return load
