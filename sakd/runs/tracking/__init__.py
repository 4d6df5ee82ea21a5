"""MLflow as a mirror of runs' folders: one run's while it trains, or all that a store lacks, afterwards."""

from sakd.runs.tracking.delivery import PREPARATION, Delivery, adopt, concluded, synchronise_all
from sakd.runs.tracking.health import check_store
from sakd.runs.tracking.notes import noted
from sakd.runs.tracking.parents import (
    earlier_sweeps,
    note_end,
    note_sweep,
    noted_sweeps,
    sweep_folder,
    sweep_name,
    sweep_overrides,
    sweeps_going_on,
    under_way,
)
from sakd.runs.tracking.store import finished_runs, is_a_file, is_refusal, open_command, reason, sqlite_path
from sakd.runs.tracking.sync import goes_on, page_of, seen_at, synchronise, view_of
from sakd.runs.tracking.thread import Mirror, start_mirror

__all__ = [
    "PREPARATION",
    "Delivery",
    "Mirror",
    "adopt",
    "check_store",
    "concluded",
    "earlier_sweeps",
    "finished_runs",
    "goes_on",
    "is_a_file",
    "is_refusal",
    "note_end",
    "note_sweep",
    "noted",
    "noted_sweeps",
    "open_command",
    "page_of",
    "reason",
    "seen_at",
    "sqlite_path",
    "start_mirror",
    "sweep_folder",
    "sweep_name",
    "sweep_overrides",
    "sweeps_going_on",
    "synchronise",
    "synchronise_all",
    "under_way",
    "view_of",
]
