"""Finished runs' networks, used: loaded, evaluated, exported."""

from sakd.trained.load import Trained, load, read, teacher_of

__all__ = ["Trained", "load", "read", "teacher_of"]
