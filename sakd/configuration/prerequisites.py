"""Work out which runs a run needs first, each as a configuration: its teacher, and the pretraining of its
distiller."""

import copy
from collections.abc import Sequence
from typing import Any

Config = dict[str, Any]
# Keys of the teacher that are not its network's.
TEACHER_KEYS = ("checkpoint", "min_accuracy", "training")


def needs_teacher(config: Config) -> bool:
    return bool(config["distiller"]["losses"])


def teacher_config(config: Config) -> Config:
    """The configuration of the run that trains this run's teacher: the same that a user would give it as a
    student alone."""
    training = config["teacher"]["training"]
    own = copy.deepcopy(config)
    own["student"] = {key: value for key, value in config["teacher"].items() if key not in TEACHER_KEYS}
    own |= copy.deepcopy(training)
    own["distiller"] = {"name": "none", "losses": {}}
    if "experiment" in own["tracking"]:
        own["tracking"]["experiment"] += "-teachers"
    return own


def pretraining_config(config: Config, teacher_stages: Sequence[str] | None) -> Config:
    """The configuration of the run that pretrains this run's distiller; of nothing that it does not depend
    on.

    ``teacher_stages``: where, if it learns from the teacher alone; the teacher's network then stands for
    every student."""
    pretraining = copy.deepcopy(config["distiller"]["pretraining"])
    name, own_loss = pretraining.pop("name"), pretraining.pop("loss", None)
    loss = own_loss or copy.deepcopy(config["distiller"]["losses"][name])
    loss["weight"] = 1.0  # alone, it weighs nothing
    own = {**copy.deepcopy(config), **pretraining}
    if teacher_stages is not None:
        own["student"] = teacher_config(config)["student"]
        loss["where"] = list(teacher_stages)
    own["distiller"] = {
        "name": f"{config['distiller']['name']}_pretraining",
        "losses": {name: loss},
        "pretrains": name,
    }
    own["spot_mode"] = {"name": "fixed", "_target_": "sakd.spots.Fixed"}
    if "experiment" in own["tracking"]:
        own["tracking"]["experiment"] += "-pretraining"
    return own
