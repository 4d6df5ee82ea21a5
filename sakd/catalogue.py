"""Tables of docs/ and a comment of config.yaml, written from what is there.

Tables are of distillers, networks, keys, and keys without identity, the comment of the latter. They come from
conf/, the code, and the measured steps.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml

from sakd.configuration import NOT_IDENTITY, Config, build
from sakd.configuration.groups import CHECKOUT, CONF, folder_of
from sakd.errors import ConfigError
from sakd.keys import Key, about, keys_of

STEPS = CHECKOUT / "results/step.csv"  # as `python -m benchmarks.step --csv` writes it
ABSENT = "\N{EN DASH}"
REFERENCE = ("method", "authors", "title", "venue", "year")  # all of a paper
IMAGES = {"num_classes": 100, "in_channels": 3, "image_size": 32}
NOT_ALWAYS_INSTALLED = ("timm",)
# Groups whose files have keys of their own: the path of what a file is, and its folder in conf/.
GROUPS = {
    "dataset": "dataset",
    "student": "network",
    "distiller": "distiller",
    "spot_mode": "spot_mode",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "tracking": "tracking",
    "hydra.launcher": "hydra/launcher",
}
KEY_HEAD = ["key", "value", "expected", "what it says"]


def tables() -> dict[str, str]:
    """Tables in Markdown, by name."""
    keys = [[f"`{key}`", why] for key, why in NOT_IDENTITY.items()]
    return {
        "distillers": distillers(STEPS),
        "networks": networks(),
        "not_identity": markdown(["key", "what it says"], keys),
        "keys": markdown(KEY_HEAD, [key_row(key) for key in keys_of(CONF / "config.yaml")]),
        **{f"keys_{folder.replace('/', '_')}": keys_in(node, folder) for node, folder in GROUPS.items()},
    }


def comments() -> dict[str, str]:
    """Comments of config.yaml, by name."""
    width = max(map(len, NOT_IDENTITY))
    return {"not_identity": "".join(f"#   {key:<{width}}  {why}\n" for key, why in NOT_IDENTITY.items())}


def write(blocks: dict[str, str], path: Path) -> None:
    """Replace what stands between lines ``<!-- name -->`` and ``<!-- /name -->``, of those that are there.

    The lines may be comments. Raises ConfigError where one of the two, or all, are missing.
    """
    text = path.read_text()
    here = {name: block for name, block in blocks.items() if re.search(rf"<!-- /?{name} -->", text)}
    if not here:
        raise ConfigError(f"{path}: found no lines <!-- name --> and <!-- /name -->, expected a table's")
    for name, block in here.items():
        between = re.compile(
            rf"(?<=<!-- {name} -->\n).*?(?=^(# )?<!-- /{name} -->)", re.DOTALL | re.MULTILINE
        )
        if not between.search(text):
            raise ConfigError(f"{path}: found no lines <!-- {name} --> and <!-- /{name} -->, expected both")
        text = between.sub(lambda _, block=block: block, text, count=1)
    path.write_text(text)


def distillers(steps: Path) -> str:
    """Table of the distillers: a row for each file in conf/distiller.

    ``steps`` has what a step costs, if it is there.
    """
    measured, where = costs(steps)
    rows = []
    for name, node in nodes("distiller"):
        own = node.get("losses") or {"": node.get("pretraining", {}).get("loss")}
        if own := next(iter(own.values()), None):
            spots = own["where"] if isinstance(own["where"], str) else ", ".join(own["where"])
            weight = (
                f"{node['beta']:g}"
                if "beta" in node
                else f"alpha = {node['alpha']:g}"
                if "alpha" in node
                else ABSENT
            )
            cost = [measured.get((name, mode), ABSENT) for mode in ("fixed", "adaptive")]
            rows.append([f"`{name}`", *paper(node, f"conf/distiller/{name}.yaml"), spots, weight, *cost])
    table = markdown(["distiller", "method", "paper", "spots", "beta", "step, fixed", "step, adaptive"], rows)
    return table + (f"\n{where}\n" if where else "")


def costs(steps: Path) -> tuple[dict[tuple[str, str], str], str]:
    """Times of steps in units of the floor, by distiller and mode, and a sentence about these.

    They are those of the file's first pair and device.
    """
    if not steps.is_file():
        return {}, ""
    with steps.open() as file:
        rows = list(csv.DictReader(file))
    of = (rows[0]["pair"], rows[0]["device"])
    measured = {
        (row["distiller"], row["mode"]): f"{float(row['ratio_to_floor']):.2f}"
        for row in rows
        if (row["pair"], row["device"]) == of
    }
    where = (
        "A step's time is in units of what it cannot do without, the teacher's pass and the student's "
        f"forward and backward pass: {of[0].replace('-', ' to ')}, {of[1]}."
    )
    return measured, where


def paper(distiller: Config, file: str) -> tuple[str, str]:
    """Method and paper, as a distiller's ``reference`` has them.

    Raises ConfigError naming ``file`` unless it has all of them: what one leaves out it would inherit from
    another's paper.
    """
    reference = distiller.get("reference", {})
    for key in REFERENCE:
        if key not in reference:
            raise ConfigError(f"{file}: reference.{key}: found nothing, expected {', '.join(REFERENCE)}")
    authors = reference["authors"]
    who = f"{authors[0]} et al." if len(authors) > 2 else " and ".join(authors)
    return reference["method"], f"{who} ({reference['year']}), “{reference['title']}”, {reference['venue']}"


def networks() -> str:
    """Table of the networks: a row for each file in conf/network whose package is always there."""
    rows = []
    for name, node in nodes("network"):
        if node.get("build", "").partition(".")[0] in NOT_ALWAYS_INSTALLED:
            continue
        with torch.device("meta"):
            network = build.make({**node, **IMAGES}, name)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        shapes = ", ".join(
            "x".join(map(str, shape)) for stage, shape in network.shapes.items() if stage != "logits"
        )
        rows.append(
            (network.family.lower(), parameters, [f"`{name}`", network.family, f"{parameters:,}", shapes])
        )
    head = [
        "network",
        "family",
        "parameters at 100 classes",
        "outputs of its stages and its embedding for 3x32x32 images",
    ]
    return markdown(head, [row for *_, row in sorted(rows)])


def key_row(key: Key) -> list[str]:
    return [f"`{key.path}`", f"`{escaped(key.value)}`", key.expected, escaped(key.comment)]


def keys_in(node: str, folder: str) -> str:
    """Table of the keys in a group's files: below each file's name, those that it has."""
    rows = []
    for file in sorted((CONF / folder).glob("*.yaml")):
        if own := keys_of(file, node):
            rows += [[f"**{file.stem}**", "", "", escaped(about(file))], *map(key_row, own)]
    return markdown(KEY_HEAD, rows)


def escaped(text: str) -> str:
    """Text of a YAML file, in one line, for a cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def nodes(group: str) -> Iterator[tuple[str, Config]]:
    """Names and contents of a group's files.

    Raises ConfigError where there are none.
    """
    folder = folder_of(group)
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise ConfigError(f"{folder}: found no YAML files, expected those of the project")
    for path in paths:
        yield path.stem, yaml.safe_load(path.read_text())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
