"""The meaning of a command line: keys, values, identity, and what must run before.

Beside this face: `compose`, which needs Hydra, and `build`, which needs torch.
"""

from sakd.configuration.check import PRECISIONS, check, check_choice, require_accuracy
from sakd.configuration.folders import find_run, read_config
from sakd.configuration.identity import (
    NEUTRAL,
    NOT_IDENTITY,
    digest,
    flatten,
    identity,
    parameters,
    run_name,
    sha256_as_of,
    sha256_of,
    short_names,
    without_effect,
)
from sakd.configuration.prerequisites import (
    TEACHER_KEYS,
    Config,
    Prerequisites,
    needs_teacher,
    prerequisites,
    product_node,
    teacher_of,
    tracked_apart,
)

__all__ = [
    "NEUTRAL",
    "NOT_IDENTITY",
    "PRECISIONS",
    "TEACHER_KEYS",
    "Config",
    "Prerequisites",
    "check",
    "check_choice",
    "digest",
    "find_run",
    "flatten",
    "identity",
    "needs_teacher",
    "parameters",
    "prerequisites",
    "product_node",
    "read_config",
    "require_accuracy",
    "run_name",
    "sha256_as_of",
    "sha256_of",
    "short_names",
    "teacher_of",
    "tracked_apart",
    "without_effect",
]
