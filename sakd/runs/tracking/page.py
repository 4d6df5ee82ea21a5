"""What MLflow's page of a run says: its name, its description, its data set."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sakd.configuration import Config, needs_teacher, short_names

TRACEBACK = 4000  # characters of it that a run's page shows
DIGEST = 36  # characters, MLflow's limit of a data set's


def run_name(config: Config) -> str:
    """The run's name for people: what differs between a sweep's runs comes first, since tables and legends
    show only the beginning."""
    names = short_names(config)
    if not needs_teacher(config):
        return f"{names['student']} alone seed {names['seed']}, {names['dataset']}"
    networks = f"{names['teacher']} to {names['student']}"
    if "pretrains" in config["distiller"]:
        networks = names["student"]
        return f"{names['distiller'].replace('_', ' ')} seed {names['seed']}, {networks}, {names['dataset']}"
    return f"{names['distiller']} {names['spot_mode']} seed {names['seed']}, {networks}, {names['dataset']}"


def description(
    config: Config, folder: Path, status: str, result: Mapping[str, Any] | None, epochs: int, traceback: str
) -> str:
    """What the run is, how it ended, and where its folder is, in Markdown.

    ``epochs``: done so far; ``traceback``: of a run that failed, as Markdown.
    """
    parts = [_what(config), _how(config, status, result, epochs), traceback, _where(folder)]
    return "\n\n".join(part for part in parts if part)


def _what(config: Config) -> str:
    names = short_names(config)
    if not needs_teacher(config):
        return f"**{names['student']}** learns **{names['dataset']}** by itself, seed {names['seed']}."
    if "pretrains" in config["distiller"]:
        loss = config["distiller"]["pretrains"]
        return f"What **{loss}** needs before its students train: learned on **{names['dataset']}**."
    return (
        f"**{names['student']}** learns **{names['dataset']}** from **{names['teacher']}** with "
        f"**{names['distiller']}** at **{names['spot_mode']}** spots, seed {names['seed']}."
    )


def _how(config: Config, status: str, result: Mapping[str, Any] | None, epochs: int) -> str:
    if result is None:
        went = {"FAILED": "Failed", "KILLED": "Was interrupted"}.get(status, "Goes on")
        return f"{went} after {epochs} of {config['epochs']} epochs. The same command goes on from there."
    student, teacher = result["student"], result["teacher"]
    if student["accuracy"] is None:
        return f"Finished after {epochs} epochs."
    told = [
        f"Finished: **{student['accuracy']:.2f} %** on the test images after {epochs} epochs; "
        f"best {student['best_accuracy']:.2f} % in epoch {student['best_epoch']:g}"
    ]
    if teacher is not None:
        told.append(f"; the teacher has {teacher['accuracy']:.2f} %")
    if result["kept"]:
        shares = ", ".join(f"{spot} {100 * kept:.1f} %" for spot, kept in result["kept"].items())
        told.append(f". Distilled in the last epoch: {shares}")
    return "".join(told) + "."


def _where(folder: Path) -> str:
    place = folder.absolute()
    return f"Folder: [`{place}`]({place.as_uri()})"


def traceback_of(path: Path) -> str:
    """The last traceback in a run's log, as Markdown; empty if there is none."""
    if not path.exists():
        return ""
    _, head, rest = path.read_text(errors="replace").rpartition("Traceback (most recent call last)")
    return f"```\n{head}{rest}"[:TRACEBACK] + "\n```" if head else ""


def dataset(config: Config, checksum: str) -> dict[str, str]:
    """The data set as MLflow's Dataset takes it; its whole ``checksum`` is in the source."""
    node = config["dataset"]
    source = {"reader": node["_target_"], "sha256": checksum, "root": node.get("root")}
    known = (
        "classes",
        "channels",
        "image_size",
        "train_samples",
        "test_samples",
        "val_fraction",
        "mean",
        "std",
    )
    return {
        "name": node["name"],
        "digest": checksum[:DIGEST],
        "source_type": "sakd",
        "source": json.dumps({key: value for key, value in source.items() if value is not None}),
        "profile": json.dumps({key: node[key] for key in known if node.get(key) is not None}),
    }


def owner(folder: Path) -> str:
    """Who made the folder; a number where that has no name here."""
    try:
        return folder.owner()
    except KeyError:
        return str(folder.stat().st_uid)


def listed(names: Sequence[str]) -> str:
    """Names as one text, each once."""
    return ", ".join(dict.fromkeys(names))
