"""Who trains together: runs that see the same batches and learn from the same teacher."""

import json
import math
from collections.abc import Collection, Iterator, Sequence

from sakd.configuration import TEACHER_KEYS, Config, identity, needs_teacher, teacher_of
from sakd.sweeps.plan import KnownRuns, PlannedRun

# What all members of a cohort have in common, beside their teacher and their images: one value, one process.
COMMON = (
    *("seed", "batch_size", "precision", "runs", "cohort"),
    *("device", "threads", "memory_format", "compile", "fold_batch_norm"),
)


def cohorts(runs: Sequence[PlannedRun], alone: Collection[str] = ()) -> list[list[PlannedRun]]:
    """Divide runs into cohorts of at most ``cohort`` members and even size, in their order.

    ``alone``: names of runs that train by themselves, as does a run that is profiled.
    """
    teachers = KnownRuns()
    checkpoints: dict[str, str] = {}
    groups: dict[str, list[PlannedRun]] = {}
    for run in runs:
        config = run.run.config
        by_itself = config["profile"] or run.name in alone
        key = run.name if by_itself else _in_common(config, teachers, checkpoints)
        groups.setdefault(key, []).append(run)
    return [cohort for group in groups.values() for cohort in _split(group, group[0].run.config["cohort"])]


def _in_common(config: Config, teachers: KnownRuns, checkpoints: dict[str, str]) -> str:
    """Write down what runs that may go together have in common. ``checkpoints``: digests by file, each
    taken once."""
    teacher: object = None
    if (run := teachers.of(teacher_of(config))) is not None:
        teacher = run.digest
    elif needs_teacher(config):
        network = {key: value for key, value in config["teacher"].items() if key not in TEACHER_KEYS}
        path = config["teacher"]["checkpoint"]
        if path is not None and path not in checkpoints:
            checkpoints[path] = identity(config)["teacher"]["sha256"]
        asked = [config["teacher"].get(key) for key in ("checkpoint_part", "pretrained")]
        teacher = [network, checkpoints.get(path), *asked]
    images = {key: value for key, value in config["dataset"].items() if key != "recipe"}
    mixing = [config.get("task", {}).get(key, 0) for key in ("mixup", "cutmix")]
    return json.dumps([teacher, images, mixing, *(config[key] for key in COMMON)])


def _split(group: Sequence[PlannedRun], most: int) -> Iterator[list[PlannedRun]]:
    """Split into as few parts of at most ``most`` as there can be, none larger than another by more than
    one."""
    parts = math.ceil(len(group) / most)
    for part in range(parts):
        yield list(group[part * len(group) // parts : (part + 1) * len(group) // parts])
