"""A finished run's network as a model of MLflow, which its ``mlflow.pytorch.load_model`` loads without sakd.

It is made in a process of its own, one for a whole launch: to export a network changes PyTorch's global state
and takes seconds, and other runs may be training. That process gets folders, a line each, on its standard
input, and answers each with a line.
"""

import atexit
import hashlib
import json
import os
import select
import selectors
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from sakd.configuration import Config
from sakd.errors import RunError, SakdError, in_one_line
from sakd.files import explained, refuse_link

FOLDER = ".model"  # in a run's folder, until a store has it
IDLE = 60.0  # seconds without work after which the process ends
MADE_WITHIN = 300.0  # seconds for a model, the largest on a busy machine too
IMAGES = 2  # in the example of an input; with one, the export would take no other number


def make(folder: Path) -> Path | None:
    """Make the model of a finished run, in its folder; None where the run left no weights.

    Raises RunError for weights that are not those of the result, a network that cannot be exported, and a
    process that died over it.
    """
    weights, made = folder / "student.safetensors", folder / FOLDER
    if not weights.exists():
        return None
    refuse_link(made)
    if not _is_of(made, weights):
        error = _worker.made(folder.absolute())
        if error is not None:
            raise RunError(error)
    return made


def is_made(folder: Path) -> bool:
    """True if the model of a run's weights lies in its folder."""
    return not (folder / FOLDER).is_symlink() and _is_of(folder / FOLDER, folder / "student.safetensors")


def is_of_sakd(student: Config) -> bool:
    """True if a network is built by this package alone: no word in its configuration names other code."""
    others = (value for key, value in student.items() if key not in ("_target_", "name"))
    return str(student.get("_target_")).startswith("sakd.networks.") and all(
        value is None or isinstance(value, (bool, int, float)) for value in others
    )


def forget(folder: Path) -> None:
    """Take the model away: a store has it now."""
    if not (folder / FOLDER).is_symlink():
        shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _is_of(made: Path, weights: Path) -> bool:
    """True if the model was made whole, of these weights."""
    try:
        return (made / "MLmodel").stat().st_mtime_ns >= weights.stat().st_mtime_ns
    except FileNotFoundError:
        return False


class _Worker:
    """The process that makes models, started when it is needed, until it is to ``end``."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._over = False
        self._alone = threading.Lock()  # runs end in threads of their own
        self._starting = threading.Lock()  # none is started once it is over

    def made(self, folder: Path) -> str | None:
        """Let it make the model of this run; why it could not."""
        with self._alone:
            for _ in range(2):  # it may have been idle, and have just ended
                process = self._at_work()
                if process is None:
                    return f"{folder}: the launch ended before MLflow's model of it was made"
                try:
                    process.stdin.write(f"{folder}\n")
                    process.stdin.flush()
                    answer = _line(process)
                except BrokenPipeError:
                    answer = ""
                if answer:
                    return json.loads(answer)
                _end(process)
                if answer is None:
                    return f"{folder}: MLflow's model of it was not made within {MADE_WITHIN:.0f} seconds"
        return f"{folder}: the process that makes MLflow's model of it died"

    def end(self) -> None:
        """End it for good, whatever it is at: whoever waits for it is told."""
        with self._starting:
            self._over = True
        if self._process is not None:
            self._process.kill()
            with self._alone:  # who reads its answer lets go of it first
                _end(self._process)

    def _at_work(self) -> subprocess.Popen | None:
        """The process, started where there is none; None once it is over."""
        with self._starting:
            if self._over:
                return None
            if self._process is not None and self._process.poll() is not None:  # it was idle, and has ended
                _end(self._process)
                self._process = None
            if self._process is None:
                self._process = self._started()
            return self._process

    def _started(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,  # an interruption of the launch is none of its own: it ends with it
        )


def _line(process: subprocess.Popen) -> str | None:
    """What a process answers; nothing where it died, None where it takes too long."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if waiting.select(MADE_WITHIN) else None


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(BrokenPipeError):
        process.stdin.close()


_worker = _Worker()
atexit.register(_worker.end)


# ---- in that process


def serve() -> None:
    """Make the model of each run whose folder comes in; end with whoever sends them, or when idle."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what MLflow and PyTorch print is no answer
    while select.select([sys.stdin], [], [], IDLE)[0]:
        folder = sys.stdin.readline().removesuffix("\n")
        if not folder:
            return
        answers.write(json.dumps(_outcome(Path(folder))) + "\n")
        answers.flush()


def _outcome(folder: Path) -> str | None:
    try:
        _make(folder)
    except SakdError as error:
        return str(error)
    except Exception as error:  # PyTorch exports not every network
        return f"{folder}: cannot be exported ({in_one_line(error)})"
    return None


def _make(folder: Path) -> None:
    from sakd.configuration import build, read_config
    from sakd.errors import CheckpointError
    from sakd.networks.checkpoints import load_weights, parse_weights
    from sakd.runs.stored import read_result

    weights = folder / "student.safetensors"
    config, result = read_config(folder), read_result(folder)
    raw = weights.read_bytes()
    if hashlib.sha256(raw).hexdigest() != result["student_sha256"]:
        raise CheckpointError(
            f"{weights}: expected checksum {result['student_sha256']} as in result.json; it was changed"
        )
    network = build.student_network(config)
    load_weights(network, parse_weights(raw, weights), config["student"]["name"], weights)
    partial = folder / f"{FOLDER}.new"  # nobody else makes it: whoever prepares a run's page has that locked
    for leftover in (partial, folder / FOLDER):
        refuse_link(leftover)
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with explained(folder / FOLDER):
            # Those that were computed are in the result alone; one of an earlier version has none.
            _save(network, {**config["dataset"], **result.get("moments", {})}, partial)
            os.replace(partial, folder / FOLDER)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(network: Any, dataset: dict[str, Any], path: Path) -> None:
    """Write MLflow's model of a network that gets images as they are stored, and normalises them itself."""
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from sakd.data.normalising import Normalising

    shape = network.input_shape
    example = np.random.default_rng(0).integers(0, 256, (IMAGES, *shape), dtype=np.uint8)
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("uint8"), (-1, *shape), "images")]),
        Schema([TensorSpec(np.dtype("float32"), (-1, network.classes), "logits")]),
    )
    mlflow.pytorch.save_model(
        Normalising(network, dataset["mean"], dataset["std"]).eval(),
        path,
        signature=signature,
        input_example=example,
        serialization_format="pt2",
        pip_requirements=[f"mlflow=={mlflow.__version__}", f"torch=={torch.__version__.partition('+')[0]}"],
        metadata={
            "images": "uint8 [B, C, H, W], 0 to 255, as they are stored; normalised within",
            "mean": dataset["mean"],
            "std": dataset["std"],
        },
    )
