"""Tables of finished runs, against statistics of plain arrays; from folders and from a real store."""

import copy
import functools
import json

import pytest
import torch

from sakd.runs import Run
from tests.conftest import TINY, compose_config


@functools.lru_cache
def composed(*overrides: str) -> dict:
    return compose_config(*TINY, *overrides)


def finish(folder, accuracy, *overrides, seed=0, teacher="a" * 64, commit="c" * 40, measured=None, **changes) -> Run:
    """A run's folder as a finished run leaves it, without the training; ``accuracy`` of the last epoch, 1 less than the best."""
    config = copy.deepcopy(composed("tracking=none", *overrides)) | changes
    run = Run(config | {"seed": seed, "runs": str(folder)})
    run.folder.mkdir(parents=True, exist_ok=True)
    run.start()
    for epoch in range(1, config["epochs"] + 1):
        last = epoch == config["epochs"]
        line = {"epoch": epoch, "loss/task": 1 / epoch, "test/accuracy": accuracy + (not last), "teacher/accuracy": 98.5}
        run.append_metrics(line | {"test/best_accuracy": accuracy + 1, "seconds": 1.0, "time": 1.8e9} | (measured or {}))
    result = {"teacher": {"sha256": teacher, "accuracy": 98.5, "source": "elsewhere"}, "kept": {}, "seconds": 2.0}
    result |= {"student": {"accuracy": accuracy}, "code": {"commit": commit, "changed": False}}
    run.finish({"weight": torch.tensor([accuracy, seed])}, result)
    return run
