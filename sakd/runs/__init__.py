"""Runs, and what each leaves: its folder, its place in MLflow, the code that it ran.

`sakd.runs.job` trains one.
"""

from sakd.runs.run import ENDED_EARLY, Run, is_locked, last_words
from sakd.runs.stored import Metrics, last_metrics, read_metrics, read_result

__all__ = [
    "ENDED_EARLY",
    "Metrics",
    "Run",
    "is_locked",
    "last_metrics",
    "last_words",
    "read_metrics",
    "read_result",
]
