"""Weights files as the field saves them: under keys and prefixes, with what training scripts leave beside."""

import argparse
import logging
import pathlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from sakd.configuration import digest, prerequisites
from sakd.errors import CheckpointError, ConfigError
from sakd.networks import resnet8, resnet8x4, resnet14
from sakd.networks.checkpoints import load_weights, read_weights, shared_weights
from sakd.runs.job import execute
from sakd.streams import initialising

Weights = dict[str, Tensor]


def network(seed: int = 0, classes: int = 10) -> torch.nn.Module:
    with initialising(seed, "weights"):
        made = resnet8(classes, 1, 8)
        made(torch.rand(4, 1, 8, 8))  # moves the running statistics
    return made


def behind(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def lightning(path: Path, weights: Weights) -> None:
    """As Lightning saves it, with a module of its own that is not there when the file is read."""
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    sys.modules |= dict.fromkeys(("pytorch_lightning", "pytorch_lightning.utilities"), module)
    sys.modules[module.__name__] = module
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {**behind("model.", weights), "criterion.weight": torch.ones(10)},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}],
        "callbacks": {"best_model_path": pathlib.PurePosixPath("a/b.ckpt"), "score": np.float64(0.7)},
        "hyper_parameters": module.AttributeDict(lr=0.1),
    }
    try:
        torch.save(content, path)
    finally:
        for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
            del sys.modules[name]


def saved_as(content: Callable[[Weights], object]) -> Callable[[Path, Weights], None]:
    return lambda path, weights: torch.save(content(weights), path)


NO_COUNTERS = "num_batches_tracked"
FORMATS: dict[str, tuple[Callable[[Path, Weights], None], str]] = {
    "plain.pt": (saved_as(lambda w: w), ""),
    "model.pth": (saved_as(lambda w: {"model": w, "epoch": 3}), "under model"),
    "state_dict.pth.tar": (
        saved_as(lambda w: {"state_dict": behind("module.", w), "best_prec1": torch.tensor(93.4)}),
        "under state_dict.module, 1 other tensors left out",
    ),
    "model_state_dict.pt": (saved_as(lambda w: {"model_state_dict": w}), "under model_state_dict"),
    "net.bin": (saved_as(lambda w: {"net": w, "acc": 93.4, "args": argparse.Namespace(lr=1)}), "under net"),
    "network.pt": (saved_as(lambda w: {"checkpoint": {"network": w}}), "under checkpoint.network"),
    "prefixes.pt": (saved_as(lambda w: behind("_orig_mod.module.model.", w)), "under _orig_mod.module.model"),
    "other_order.pt": (saved_as(lambda w: behind("module._orig_mod.", w)), "under module._orig_mod"),
    "lightning.ckpt": (lightning, "under state_dict.model, 1 other tensors left out"),
    "no_counters.pt": (
        saved_as(lambda w: {key: value for key, value in w.items() if NO_COUNTERS not in key}),
        f"without {NO_COUNTERS}",
    ),
    "half.pt": (
        saved_as(lambda w: {key: v.half() if v.is_floating_point() else v for key, v in w.items()}),
        "of float16",
    ),
    "prefixed.safetensors": (
        lambda path, weights: save_file(behind("backbone.", weights), path),
        "under backbone",
    ),
}


@pytest.mark.parametrize("names", ["own", "shared"])
@pytest.mark.parametrize("file", FORMATS)
def test_each_format_loads_and_a_line_says_what_was_unwrapped(tmp_path, caplog, file, names):
    write, told = FORMATS[file]
    source = network()
    write(tmp_path / file, dict(source.state_dict()) if names == "own" else shared_weights(source))
    found = network(seed=1)
    with caplog.at_level(logging.INFO, "sakd"):
        load_weights(found, read_weights(tmp_path / file), "resnet8", tmp_path / file)
    expected = dict(source.state_dict())
    if file == "no_counters.pt":
        expected = {key: value for key, value in expected.items() if NO_COUNTERS not in key}
    tolerance = 1e-3 if file == "half.pt" else 0
    loaded = {key: value for key, value in found.state_dict().items() if key in expected}
    assert_close(loaded, expected, rtol=tolerance, atol=tolerance)
    lines = [f"{tmp_path / file}: took weights {told}"] if told else []
    assert caplog.messages == lines


@pytest.fixture
def several(tmp_path) -> Path:
    """The weights of one network, their average, and those of a larger and a wider one."""
    path = tmp_path / "several.pt"
    others = {"teacher": resnet14(10, 1, 8).state_dict(), "wide": resnet8x4(10, 1, 8).state_dict()}
    torch.save(
        {"model": network().state_dict(), "ema": behind("module.", network(1).state_dict()), **others}, path
    )
    return path


def test_a_file_of_several_weights_is_refused_by_their_names_unless_one_is_asked_for(several):
    weights, found = read_weights(several), network(seed=2)
    with pytest.raises(
        CheckpointError, match=r"found weights of this network under model, ema\.module; expec"
    ):
        load_weights(found, weights, "resnet8", several)
    load_weights(found, weights, "resnet8", several, "ema")
    assert_close(dict(found.state_dict()), dict(network(1).state_dict()), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"found no weights under emma; .* there: model, ema\.module"):
        load_weights(found, weights, "resnet8", several, "emma")
    with pytest.raises(CheckpointError, match=r"is not a resnet8; of its .* are not its own"):
        load_weights(found, weights, "resnet8", several, "teacher")
    larger = resnet14(10, 1, 8)
    load_weights(larger, weights, "resnet14", several)  # only one there is such


def test_only_what_is_no_weights_may_stand_beside_them_and_is_never_called(tmp_path):
    class Calls:
        def __reduce__(self):
            return print, ("called",)

    path = tmp_path / "a.pt"
    torch.save({"model": network().state_dict(), "hook": Calls()}, path)
    with pytest.raises(CheckpointError, match=r"it holds \S*print, which is no weights"):
        read_weights(path)


def test_teachers_and_students_count_by_the_part_of_a_file_that_they_take(several, tiny):
    teacher, student = f"teacher.checkpoint={several}", f"student.checkpoint={several}"
    asked = [
        (),
        (teacher, "teacher.checkpoint_part=ema"),
        (teacher, "teacher.checkpoint_part=model"),
        (student, "student.checkpoint_part=ema"),
    ]
    assert len({digest(tiny("distiller=kd", *keys)) for keys in asked}) == len(asked)


@pytest.mark.slow
def test_a_teacher_and_a_student_take_a_part_of_a_file(several, tiny):
    """The teacher as it was averaged, the student from the file's other weights."""
    keys = ("distiller=kd", "epochs=1", f"teacher.checkpoint={several}")
    with pytest.raises(CheckpointError, match=r"found weights of this network under model, ema\.module"):
        execute(tiny(*keys))
    keys = (*keys, "teacher.checkpoint_part=ema")
    started = (f"student.checkpoint={several}", "student.checkpoint_part=model")
    first, second = (execute(tiny(*keys, *start)) for start in ((), started))
    assert first["student_sha256"] != second["student_sha256"]
    assert first["teacher"] == second["teacher"]


def test_a_student_starts_from_weights_with_a_new_head_for_other_classes(tmp_path, tiny, caplog):
    path = tmp_path / "hundred.pt"
    torch.save(network(classes=100).state_dict(), path)
    keys = ("distiller=none", "epochs=1", "optimizer.lr=0", "dataset.train_samples=48")
    with caplog.at_level(logging.INFO, "sakd"):
        execute(tiny(*keys, f"student.checkpoint={path}"))
    assert f"{path}: took weights with new logits, of 10 classes for 100" in caplog.text
    (run,) = (tmp_path / "runs").glob("digits-*")
    learned, source = read_weights(run / "student.safetensors"), read_weights(path)
    kept = [key for key in source if key.startswith("stage") and key.endswith("weight")]
    assert_close({key: learned[key] for key in kept}, {key: source[key] for key in kept}, rtol=0, atol=0)
    assert learned["logits.weight"].shape == (10, 64)


def test_a_teacher_s_training_starts_from_weights_and_is_another_for_it(several, tiny):
    keys = (
        "distiller=kd",
        f"teacher.training.checkpoint={several}",
        "teacher.training.checkpoint_part=model",
    )
    own = prerequisites(tiny(*keys)).teacher
    assert own["student"]["checkpoint"] == str(several)
    assert digest(own) != digest(prerequisites(tiny("distiller=kd")).teacher)
    assert digest(tiny(*keys)) != digest(tiny("distiller=kd"))
    alone = tiny(
        "distiller=none", "student=resnet8", f"student.checkpoint={several}", "student.checkpoint_part=model"
    )
    assert digest({**alone, **{key: own[key] for key in ("epochs", "seed", "schedule")}}) == digest(own)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["student.checkpoint=/no/file.pt"], CheckpointError, r"^student\.checkpoint: no file /no/file\.pt"),
        (["teacher.training.checkpoint=/no.pt"], CheckpointError, r"^teacher\.training\.checkpoint: no file"),
        (["student.checkpoint_part=ema"], ConfigError, r"^student\.checkpoint_part: found ema, but student"),
        (
            ["student.checkpoint=3"],
            ConfigError,
            r"^student\.checkpoint: found 3, expected the path of a file",
        ),
    ],
)
def test_mistakes_are_told_by_their_key(tiny, overrides, error, message):
    with pytest.raises(error, match=message):
        tiny(*overrides)
