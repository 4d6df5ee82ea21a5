"""No step of training waits for the device: nothing is read back, and no shape depends on values.

The same claim is checked on a GPU by tests/test_gpu.py, by asking CUDA itself.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sakd.configuration import build
from sakd.data import train_batches
from sakd.streams import stream
from tests.conftest import take_step
from tests.test_every_config import DISTILLERS, overrides

CPU = torch.device("cpu")
# What reads a value back, or makes a shape that depends on values.
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
}


class Watch(TorchDispatchMode):
    """Collects the operations that would wait."""

    def __init__(self):
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keys=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        by_repeats = (
            name == "repeat_interleave" and isinstance(arguments[0], torch.Tensor) and len(arguments) == 1
        )
        if name in WAITING or by_mask or by_repeats:
            self.waiting.append(str(function))
        return function(*arguments, **(keys or {}))


@pytest.mark.parametrize(
    "statement",
    [
        lambda x: x[x > 0],
        lambda x: float(x.sum()),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.__setitem__(x > 0, x[:1].sum()),
    ],
)
def test_the_watch_sees_what_waits(statement):
    with Watch() as watch:
        statement(torch.ones(3))
    assert watch.waiting


@pytest.mark.parametrize("mode", ["random", "adaptive"])  # fixed and anti are these two with other masks
@pytest.mark.parametrize("distiller", DISTILLERS)
def test_a_step_reads_nothing_back_and_its_shapes_do_not_depend_on_values(distiller, mode, tiny):
    config = tiny(*overrides(distiller), f"spot_mode={mode}", "dataset.flip=true")
    dataset = build.dataset(config)
    trainer = build.trainer(config, build.parts(config), CPU)
    trainer.prepare(dataset)
    batch = next(iter(train_batches(dataset, 16, stream(0, "data", 1))))
    with Watch() as watch:
        take_step(trainer, *batch)
    assert watch.waiting == []
