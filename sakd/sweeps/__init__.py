"""Sweeps: what is to be done, handed to SLURM or to processes here, and what has become of it."""

from sakd.sweeps.launching import as_before, cancel, launch, settle, summary
from sakd.sweeps.plan import Job, Plan, plan
from sakd.sweeps.state import STATES, Standing, survey

__all__ = [
    "STATES",
    "Job",
    "Plan",
    "Standing",
    "as_before",
    "cancel",
    "launch",
    "plan",
    "settle",
    "summary",
    "survey",
]
