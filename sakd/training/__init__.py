"""The loop: how students, alone or from a teacher, one or several at once, are trained."""

from sakd.training.cohort import Cohort, Measured, Progress, SharedClock
from sakd.training.execution import Execution
from sakd.training.graphs import unchanged
from sakd.training.measuring import evaluate
from sakd.training.pretraining import Pretraining
from sakd.training.profiling import Profile
from sakd.training.recording import seen
from sakd.training.schedules import OneCycle, Schedule
from sakd.training.task import Task
from sakd.training.teacher import Certificate, Teacher
from sakd.training.trainer import Step, Trainer, spots_of

__all__ = [
    "Certificate",
    "Cohort",
    "Execution",
    "Measured",
    "OneCycle",
    "Pretraining",
    "Profile",
    "Progress",
    "Schedule",
    "SharedClock",
    "Step",
    "Task",
    "Teacher",
    "Trainer",
    "evaluate",
    "seen",
    "spots_of",
    "unchanged",
]
