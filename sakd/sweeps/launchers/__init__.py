"""Where a sweep's jobs go: a file each, found by the class that ``hydra.launcher._target_`` names."""

from sakd.sweeps.launchers.base import Launcher, Queue, Queued, is_launcher, launcher_of
from sakd.sweeps.launchers.local import LocalLauncher
from sakd.sweeps.launchers.slurm import SlurmLauncher

__all__ = [
    "Launcher",
    "LocalLauncher",
    "Queue",
    "Queued",
    "SlurmLauncher",
    "is_launcher",
    "launcher_of",
]
