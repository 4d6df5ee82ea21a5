"""MLflow as a mirror of a run's folder."""

from sakd.runs.tracking.sync import (
    Mirror,
    catch_up,
    finished_runs,
    goes_on,
    is_a_file,
    mirrored,
    open_command,
    prepare,
    settle,
    start_mirror,
    synchronise,
    synchronise_all,
)

__all__ = [
    "Mirror",
    "catch_up",
    "finished_runs",
    "goes_on",
    "is_a_file",
    "mirrored",
    "open_command",
    "prepare",
    "settle",
    "start_mirror",
    "synchronise",
    "synchronise_all",
]
