"""The loop: how a student, alone or from a teacher, is trained."""

from sakd.training.execution import Execution
from sakd.training.pretraining import Pretraining
from sakd.training.profiling import Profile
from sakd.training.trainer import RunningMeans, Trainer, evaluate, spots_of

__all__ = [
    "Execution",
    "Pretraining",
    "Profile",
    "RunningMeans",
    "Trainer",
    "evaluate",
    "spots_of",
]
