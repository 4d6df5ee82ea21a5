"""The benchmarks: what they write, and that they measure what ``launch.py`` would run."""

import csv
import subprocess
import sys

import pytest
import torch

from benchmarks import parts, step
from tests.conftest import ROOT, compose_config

GUARD = "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'mlflow', 'submitit', 'rich', 'click')))\n"


def test_a_steps_table_has_a_row_for_each_distiller_and_mode(tmp_path):
    """In a process that cannot import Hydra and MLflow."""
    run = "from benchmarks.step import main; main(sys.argv[1:])"
    options = "--pair resnet8,resnet8 --distillers kd,fitnet --modes adaptive --batch 4 --samples 200 --rounds 2 --warm-up 1"
    done = subprocess.run(
        [sys.executable, "-c", GUARD + run, *options.split(), "--device", "cpu", "--csv", str(tmp_path / "step.csv")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "step.csv").open() as file:
        floor, *rows = list(csv.DictReader(file))
    assert tuple(floor) == step.COLUMNS
    assert [(row["distiller"], row["mode"]) for row in rows] == [
        (distiller, mode) for distiller in ("kd", "fitnet") for mode in ("fixed", "adaptive")
    ]
    assert (floor["distiller"], floor["mode"], floor["ratio_to_fixed"], floor["ratio_to_floor"]) == (
        "none",
        "floor",
        "",
        "1.0",
    )
    for row in (floor, *rows):
        assert (row["pair"], row["device"]) == ("resnet8-resnet8", "cpu")
        assert float(row["images_per_second"]) == pytest.approx(4000 / float(row["ms"]), rel=1e-3)
    for fixed, adaptive in zip(rows[::2], rows[1::2], strict=True):
        assert fixed["ratio_to_fixed"] == "1.0"
        assert float(adaptive["peak_mb"]) > float(fixed["peak_mb"]) > float(floor["peak_mb"])
        assert all(row[column] in done.stdout for row in (fixed, adaptive) for column in ("distiller", "ms", "peak_mb"))
    assert "adaptive / fixed, geometric mean over kd, fitnet:" in done.stdout


def test_peak_memory_is_what_is_alive_at_the_fullest_moment():
    def allocates() -> None:
        first = torch.zeros(2**20)  # 4 MiB
        torch.zeros(2 * 2**20)
        del first
        torch.zeros(2**20)

    assert step.peak_on_the_cpu(allocates) == 12 * 2**20


def test_a_cell_holds_networks_labels_and_momenta():
    options = step.parse(["--pair", "resnet14,resnet8", "--batch", "2", "--samples", "200", "--device", "cpu"])
    cell = step.trainer_cell(options, "kd", "fixed")
    cell.step()
    teacher, student = (parts.network(name) for name in options.pair)
    expected = [*teacher.state_dict().values(), *student.state_dict().values(), *student.parameters()]
    assert sum(held.nbytes for held in cell.holds()) == sum(tensor.nbytes for tensor in expected) + 200 * 8


def test_fixed_is_measured_once_and_first():
    assert step.parse(["--modes", "adaptive,fixed,random"]).modes == ["fixed", "adaptive", "random"]
    assert step.parse(["--modes", "anti"]).modes == ["fixed", "anti"]


def test_the_steps_times_are_taken_in_turn():
    order = []
    cells = [step.Cell(name, "fixed", lambda name=name: order.append(name), lambda: None, list) for name in "ab"]
    options = step.parse(["--rounds", "3", "--steps", "2", "--warm-up", "1", "--device", "cpu"])
    step.measure(cells, options)
    assert "".join(order) == "ab" + 3 * "aabb"
    assert [len(cell.times) for cell in cells] == [3, 3]


def test_times_and_ratios_are_medians_over_the_rounds():
    def cell(distiller, mode, *times):
        return step.Cell(distiller, mode, lambda: torch.zeros(2**18), lambda: None, list, list(times))

    cells = [cell("none", "floor", 2, 1, 4), cell("at", "fixed", 6, 2, 4), cell("at", "adaptive", 9, 10, 4)]
    options = step.parse(["--device", "cpu", "--batch", "8"])
    floor, fixed, adaptive = step.rows_of(cells, options)
    assert [(row["ms"], row["images_per_second"]) for row in (floor, fixed, adaptive)] == [(2, 4000), (4, 2000), (9, 888.9)]
    assert (floor["ratio_to_fixed"], fixed["ratio_to_fixed"], adaptive["ratio_to_fixed"]) == ("", 1, 1.5)
    assert (floor["ratio_to_floor"], fixed["ratio_to_floor"], adaptive["ratio_to_floor"]) == (1, 2, 4.5)
    assert {row["peak_mb"] for row in (floor, fixed, adaptive)} == {1.0}


@pytest.mark.parametrize("distiller", parts.choices("distiller"))
def test_distillers_are_read_as_hydra_composes_them(distiller):
    assert (
        parts.read("distiller", distiller, batch_size=64)["losses"]
        == compose_config(f"distiller={distiller}")["distiller"]["losses"]
    )


@pytest.mark.parametrize("mode", parts.choices("spot_mode"))
def test_spot_modes_are_read_as_hydra_composes_them(mode):
    read, composed = parts.read("spot_mode", mode), compose_config(f"spot_mode={mode}")["spot_mode"]
    assert {key: read[key] for key in read if key != "optimizer"} == {
        key: composed[key] for key in composed if key != "optimizer"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "resnet8"], "found 1 networks, expected teacher,student"),
        (["--pair", "resnet56,resnet21"], "no 'resnet21' in conf/network"),
        (["--distillers", "kd,fitnets"], "Did you mean 'fitnet'?"),
        (["--distillers", "none"], "none has no teacher"),
    ],
)
def test_wrong_names_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        step.parse(arguments)
    assert message in capsys.readouterr().err
