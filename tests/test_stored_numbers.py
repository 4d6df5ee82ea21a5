"""What the defaults compute is stored: a change of numbers is seen, and must be meant.

After a change that is meant: `python -m tests.test_stored_numbers` stores them anew; LOG.md says why they
changed. Everything is in float64, in which machines agree, on the defaults' own networks, losses, policy,
optimizers and batches; only images and epochs are fewer.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sakd.configuration import build, prerequisites
from sakd.training import Cohort, Teacher
from tests.conftest import compose_config

STORED = Path(__file__).with_name("stored_numbers.json")
RUNS = {
    "python launch.py": (),
    "python launch.py dataset=digits teacher=wrn_16_2": ("dataset=digits", "teacher=wrn_16_2"),
    "python launch.py dataset=digits teacher=wrn_16_2 spot_mode=anti distiller=at": (
        *("dataset=digits", "teacher=wrn_16_2"),
        *("spot_mode=anti", "distiller=at"),
    ),
}
EPOCHS = 2
TIMES = ("seconds", "images_per_second")


def computed(overrides: tuple[str, ...]) -> dict[str, list[dict[str, float]]]:
    """Measurements of the first epochs of the teacher and, from it, of the student."""
    keys = ("device=cpu", "tracking=none", "memory_format=contiguous", "dataset.train_samples=192")
    config = compose_config(*overrides, *keys)
    dataset, cpu = build.dataset(config), torch.device("cpu")
    measured: dict[str, list[dict[str, float]]] = {}

    def keep(cohort: Cohort) -> None:
        for name, of_epoch in cohort.fit(dataset, EPOCHS, config["batch_size"]):
            measured.setdefault(name, []).append({k: v for k, v in of_epoch.items() if k not in TIMES})

    own = prerequisites(config).teacher
    parts = build.parts(own)
    parts.student.double()
    keep(Cohort(None, {"teacher": build.trainer(own, parts, cpu)}))
    parts_of_student = build.parts(config, parts.student)
    parts_of_student.student.double()
    for module in (*parts_of_student.distillers.values(), parts_of_student.spot_mode):
        module.double()
    teacher = Teacher(parts.student, execution=build.execution(config))
    keep(Cohort(teacher, {"student": build.trainer(config, parts_of_student, cpu, teacher)}))
    return measured


@pytest.mark.parametrize(
    "command", [pytest.param(command, marks=() if RUNS[command] else pytest.mark.slow) for command in RUNS]
)
def test_the_numbers_are_those_that_are_stored(command, monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # what takes features to float32 must not round here
    expected, found = json.loads(STORED.read_text())[command], computed(RUNS[command])
    assert found.keys() == expected.keys()
    for name, epochs in expected.items():
        for before, now in zip(epochs, found[name], strict=True):
            assert now == pytest.approx(before, rel=1e-6, abs=1e-9), (name, before["epoch"])


if __name__ == "__main__":
    Tensor.float = Tensor.double
    stored = {command: computed(overrides) for command, overrides in RUNS.items()}
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
