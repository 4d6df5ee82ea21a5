"""MLflow as a mirror of runs' folders: one run's while it trains, or all that a store lacks, afterwards."""

from sakd.runs.tracking.store import finished_runs, is_a_file, open_command, set_up_store
from sakd.runs.tracking.sync import catch_up, goes_on, mark_ended, mirrored, synchronise, synchronise_all
from sakd.runs.tracking.thread import Mirror, start_mirror

__all__ = [
    "Mirror",
    "catch_up",
    "finished_runs",
    "goes_on",
    "is_a_file",
    "mark_ended",
    "mirrored",
    "open_command",
    "set_up_store",
    "start_mirror",
    "synchronise",
    "synchronise_all",
]
