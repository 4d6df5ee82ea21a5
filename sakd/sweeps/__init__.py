"""Sweeps: what is to be done, trained here in cohorts or handed to SLURM or to processes here, and what has
become of it."""

from sakd.sweeps.cohorts import cohorts
from sakd.sweeps.launchers import Launcher, LocalLauncher, SlurmLauncher, launcher_of
from sakd.sweeps.launching import as_before, cancel, launch, number_of, settle, summary
from sakd.sweeps.plan import Plan, PlannedRun, plan
from sakd.sweeps.state import STATES, Standing, any_goes_on, survey
from sakd.sweeps.submissions import deciding

__all__ = [
    "STATES",
    "Launcher",
    "LocalLauncher",
    "Plan",
    "PlannedRun",
    "SlurmLauncher",
    "Standing",
    "any_goes_on",
    "as_before",
    "cancel",
    "cohorts",
    "deciding",
    "launch",
    "launcher_of",
    "number_of",
    "plan",
    "settle",
    "summary",
    "survey",
]
