"""Runs that a run needs first: its teacher's, and its distiller's pretraining."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from sakd.names import START_KEYS

Config = dict[str, Any]
# Keys of the teacher that are not its network's.
TEACHER_KEYS = ("checkpoint", "checkpoint_part", "pretrained", "min_accuracy", "training")
# What a recipe of a teacher or a pretraining does not have, at its neutral value.
OF_STUDENTS_ALONE = {
    "task": {"weight": 1.0, "label_smoothing": 0.0, "class_weights": None, "mixup": 0.0, "cutmix": 0.0},
    "ema": None,
    "keep_best": False,
    "top5": False,
    "early_stop": None,
    "optimized_metric": None,
}
FIXED = {"name": "fixed", "_target_": "sakd.spots.Fixed"}  # of runs in which nobody is distilled


@dataclass(frozen=True)
class Prerequisites:
    """Configurations of the runs that must be finished before a run begins."""

    teacher: Config | None  # None: there is no teacher, or its weights lie in a file
    pretraining: Config | None  # None: nothing is pretrained

    def __iter__(self) -> Iterator[Config]:
        """The runs in the order in which they are trained: a pretraining may learn from the teacher."""
        yield from (config for config in (self.teacher, self.pretraining) if config is not None)


def prerequisites(config: Config) -> Prerequisites:
    """Configurations of what must be trained before ``config``.

    Nodes are shared with it, since nobody writes into a configuration. A pretraining that serves all students
    of a teacher is known by the teacher's stages: to find them, networks are built, with torch, once for all
    seeds and spot modes.

    Raises ConfigError as `sakd.configuration.build` does.
    """
    pretraining = None
    if needs_teacher(config) and config["distiller"].get("pretraining") is not None:
        pretraining = _pretraining_run(config)
    return Prerequisites(teacher_of(config), pretraining)


def teacher_of(config: Config) -> Config | None:
    """The run that trains this run's teacher; None without one, and where its weights lie in a file."""
    if needs_teacher(config) and not is_trained(config["teacher"]):
        return _teacher_run(config)
    return None


def is_trained(teacher: Config) -> bool:
    """True for a teacher whose weights are brought: by a file, or by the name of published ones."""
    return teacher["checkpoint"] is not None or teacher.get("pretrained") is not None


def needs_teacher(config: Config) -> bool:
    return bool(config["distiller"]["losses"])


def product_node(config: Config) -> Config:
    """Node of the network that a run of this configuration trains and leaves.

    It is the student, or what ``distiller.product`` makes of the student and the teacher, ``body`` and
    ``head``.
    """
    student, product = config["student"], config["distiller"].get("product")
    if product is None:
        return student
    networks = {"body": student, "head": _network(config["teacher"])}
    left = ("name", *START_KEYS)
    bare = {
        role: {key: value for key, value in node.items() if key not in left}
        for role, node in networks.items()
    }
    return {"name": student["name"], **product, **bare}


def _teacher_run(config: Config) -> Config:
    """Configuration of the teacher's run.

    It is the same that a user would launch to train the network as a student alone.
    """
    training = config["teacher"]["training"]
    return {
        "seed": training["seed"],
        "epochs": training["epochs"],
        "batch_size": training["batch_size"],
        "optimizer": training["optimizer"],
        "schedule": training["schedule"],
        "precision": training["precision"],
        **_of_steps(training),
        "student": _network(config["teacher"])
        | {key: training[key] for key in START_KEYS if key in training},
        "teacher": config["teacher"],
        "dataset": config["dataset"],
        "distiller": {"name": "none", "losses": {}},
        "spot_mode": FIXED,
        **OF_STUDENTS_ALONE,
        "tracking": tracked_apart(config["tracking"], "teachers"),
        **_as_here(config),
    }


def _pretraining_run(config: Config) -> Config:
    """Configuration of the pretraining's run, of nothing that it does not depend on.

    Where it learns from the teacher alone, the teacher's network stands for every student's.
    """
    distiller, teacher = config["distiller"], config["teacher"]
    pretraining = distiller["pretraining"]
    name = pretraining["name"]
    # Alone, it weighs nothing.
    loss = {**(pretraining.get("loss") or distiller["losses"][name]), "weight": 1.0}
    student = config["student"]
    key = "distiller.pretraining.loss" if pretraining.get("loss") else f"distiller.losses.{name}"
    stages = _shared_stages(json.dumps([student, _network(teacher), loss]), key)
    if stages is not None:
        student, loss = _network(teacher), {**loss, "where": stages}
    return {
        "seed": pretraining["seed"],
        "epochs": pretraining["epochs"],
        "batch_size": pretraining["batch_size"],
        "optimizer": pretraining["optimizer"],
        "schedule": pretraining["schedule"],
        "precision": config["precision"],
        **_of_steps(pretraining),
        "student": student,
        "teacher": teacher,
        "dataset": config["dataset"],
        "distiller": {
            "name": f"{pretraining.get('distiller', distiller['name'])}_pretraining",
            "losses": {name: loss},
            "pretrains": name,
        },
        "spot_mode": FIXED,
        **OF_STUDENTS_ALONE,
        "tracking": tracked_apart(config["tracking"], "pretraining"),
        **_as_here(config),
    }


def _of_steps(training: Config) -> Config:
    return {
        "clip_gradients": training.get("clip_gradients"),
        "accumulate": training.get("accumulate", 1),
    }


def _as_here(config: Config) -> Config:
    """Keys that say where and how a run is carried out: with what it needs first as with itself."""
    return {
        "device": config["device"],
        "threads": config["threads"],
        "memory_format": config["memory_format"],
        "fold_batch_norm": config["fold_batch_norm"],
        "compile": config["compile"],
        "cohort": config["cohort"],
        "profile": config["profile"],
        "record_spots": config["record_spots"],
        "runs": config["runs"],
    }


def _network(teacher: Config) -> Config:
    return {key: value for key, value in teacher.items() if key not in TEACHER_KEYS}


def tracked_apart(tracking: Config, kind: str) -> Config:
    """Put a run into an experiment of its own ``kind``.

    One of students has then students alone.
    """
    if "experiment" not in tracking:
        return tracking
    return {**tracking, "experiment": f"{tracking['experiment']}-{kind}"}


@cache
def _shared_stages(nodes: str, key: str) -> list[str] | None:
    """The teacher's stages at which a loss is pretrained for all its students; None where each has its own.

    ``nodes``: of student, teacher and loss, as JSON, which can be remembered; ``key``: of the loss.
    """
    from sakd.configuration import build  # with torch, which most runs are planned without

    return build.shared_stages(*json.loads(nodes), key)
