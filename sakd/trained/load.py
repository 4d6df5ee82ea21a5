"""A finished run's network, taken from the run's folder or from its weights file alone."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sakd.configuration import Config, build, find_run, flatten, product_node, read_config
from sakd.configuration.fits import NAMED
from sakd.data.normalising import Normalising
from sakd.errors import CheckpointError, RunError
from sakd.files import read_whole
from sakd.networks import StagedNet
from sakd.networks.checkpoints import load_weights, parse_weights
from sakd.networks.described import Description, described, read_description
from sakd.runs import read_result
from sakd.streams import initialising

WEIGHTS = "student.safetensors"
BEST_WEIGHTS = "best.safetensors"
# Networks that a weights file may name: a file is read as numbers, and runs nobody's code.
OWN = re.compile(r"sakd\.networks\.\w+")
FOREIGN = "sakd.networks.foreign"
KNOWN_BUILDERS = re.compile(r"torchvision\.models\.\w+|timm\.create_model")
PLAIN_TEXT = re.compile(r"[\w.+-]*")  # no address from which a package would fetch something


@dataclass(frozen=True)
class Trained:
    """A network that was trained, in eval, and what is known of it.

    ``config`` and ``result`` are its run's, None of a file alone; ``path``: its weights file.
    """

    network: StagedNet
    about: Description
    path: Path
    weights_sha256: str
    config: Config | None = None
    result: Mapping[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """Of its run, after which it was stored."""
        return self.result["best"]["epoch"] if self.path.name == BEST_WEIGHTS else self.result["epochs"]

    @property
    def accuracy(self) -> float:
        """On its run's test images, percent."""
        best = self.path.name == BEST_WEIGHTS
        return self.result["best"]["accuracy"] if best else self.result["student"]["accuracy"]

    @property
    def name(self) -> str:
        return self.about.network["name"]

    @property
    def called(self) -> str:
        """The folder of the run, or the file."""
        return str(self.path if self.config is None else self.path.parent)

    def module(self) -> Normalising:
        """It with its normalisation inside: uint8 [B, C, H, W] to logits [B, classes]."""
        return Normalising(self.network, self.about.mean, self.about.std).eval()


def load(
    run: str | Path, runs: str | Path = "runs", trusted: bool = False, best: bool = False
) -> Normalising:
    """The student of a finished run, or the network of its own, as a plain module in eval.

    ``run``: a run's folder, its name in ``runs``, the beginning of that, or a weights file
    (``student.safetensors``, or what `sakd export --to safetensors` writes). The module takes images as they
    are stored, uint8 [B, C, H, W], normalises them itself, and gives logits [B, classes].

    ``best``: with the weights of its best epoch, of a run that had ``keep_best=true``.

    A run's folder names code in its configuration, which is run; a file may name networks of sakd,
    torchvision and timm alone, unless it is ``trusted``.

    Raises RunError if there is no such run or it is not finished, CheckpointError for weights that are not
    what the run stored, or a file that does not say what network it is.
    """
    return read(run, runs, trusted, best).module()


def read(run: str | Path, runs: str | Path = "runs", trusted: bool = False, best: bool = False) -> Trained:
    """The network of a run or a weights file, with what is known of it. Raises as ``load`` does."""
    path = Path(run)
    if path.is_file():
        if best:
            raise RunError(
                f"{path}: found a file, expected a run, which says which of its epochs was the best"
            )
        return _of_file(path, trusted)
    return of_run(find_run(str(run), Path(runs)), best)


def of_run(folder: Path, best: bool = False) -> Trained:
    """The network of the finished run in a folder. Raises as ``load`` does."""
    result = read_result(folder)
    if result is None:
        raise RunError(
            f"{folder}: found no result.json, expected a finished run; the command that started it also "
            "finishes it"
        )
    config = read_config(folder)
    if "pretrains" in config["distiller"]:
        raise RunError(
            f"{folder}: found a pretraining ({config['distiller']['name']}), expected the run of a student "
            "or a teacher"
        )
    if best and "best" not in result:
        raise RunError(f"{folder}: found the last weights alone, expected a run that had keep_best=true")
    path, expected = folder / WEIGHTS, result["student_sha256"]
    if best:
        path, expected = folder / BEST_WEIGHTS, result["best"]["sha256"]
    raw = read_whole(path)
    if raw is None:
        raise CheckpointError(f"{path}: no such file; expected the run's weights")
    sha256 = hashlib.sha256(raw).hexdigest()
    if sha256 != expected:
        raise CheckpointError(
            f"{path}: expected checksum {expected}, as in result.json; the file was changed"
        )
    about = described(product_node(config), config, result)
    return Trained(built(about, raw, path), about, path, sha256, config, result)


def teacher_of(student: Trained) -> Trained | None:
    """The teacher that a run learned from; None for a network that learned alone, or a file.

    Raises CheckpointError if its weights file is not there any more, or another.
    """
    if student.result is None or student.result["teacher"] is None:
        return None
    certificate = student.result["teacher"]
    path = Path(certificate["source"])
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the teacher's weights")
    raw = path.read_bytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    if sha256 != certificate["sha256"]:
        raise CheckpointError(
            f"{path}: found checksum {sha256}, expected the teacher's, {certificate['sha256']}"
        )
    about = described(student.config["teacher"], student.config, student.result)
    return Trained(built(about, raw, path, build.OF_TEACHERS), about, path, sha256)


def _of_file(path: Path, trusted: bool) -> Trained:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: found a file that does not say what network it is, expected a run, or a .safetensors "
            "file that sakd wrote"
        )
    raw = path.read_bytes()
    parse_weights(raw, path)  # whole, before its words are read
    about = read_description(raw, path)
    if not trusted and (stranger := _stranger(about.network)) is not None:
        raise CheckpointError(
            f"{path}: found {stranger}, expected a network of sakd, torchvision or timm; a file that you "
            "trust as code is loaded by sakd.load(…, trusted=True)"
        )
    return Trained(built(about, raw, path), about, path, hashlib.sha256(raw).hexdigest())


def _stranger(node: Mapping[str, Any]) -> str | None:
    """What a network's node names that is nobody's known network; None if it names nothing such."""
    target = str(node.get("_target_"))
    if not OWN.fullmatch(target):
        return f"_target_ {target:.80}"
    if target == FOREIGN and not KNOWN_BUILDERS.fullmatch(str(node.get("build"))):
        return f"build {node.get('build')!s:.80}"
    inner = {key: value for key, value in node.items() if isinstance(value, dict) and "_target_" in value}
    for of_network in inner.values():
        if (stranger := _stranger(of_network)) is not None:
            return stranger
    for key, value in flatten({key: value for key, value in node.items() if key not in inner}):
        if key.endswith("._target_") or not _is_plain(value):
            return f"{key} {value!s:.80}"
    return None


def _is_plain(value: object) -> bool:
    """True for numbers and words, lists of them, and nothing at all."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return not value  # one with keys is flattened, and never comes here but in a list
    if isinstance(value, str):
        return PLAIN_TEXT.fullmatch(value) is not None
    return value is None or isinstance(value, (bool, int, float))


def built(about: Description, raw: bytes, path: Path, leave: tuple[str, ...] = NAMED) -> StagedNet:
    """The network of a description, in eval, with the weights of the file at ``path``, whose content is
    ``raw``."""
    with initialising(0, "trained"):  # drawn anew, and overwritten
        network = build.make(about.network, "student", leave=leave, kind=StagedNet)
    load_weights(network, parse_weights(raw, path), about.network["name"], path, say=False)
    return network.eval()
