"""Every distiller in every spot mode trains, from what lies in conf/: a new file is covered by being there."""

import io
from pathlib import Path

import pytest
import torch
import yaml

from sakd import build, networks
from sakd.data import train_batches
from sakd.job import execute
from sakd.streams import stream
from tests.conftest import ROOT, compose_config, other_family
from tests.test_resume import assert_same

DISTILLERS = sorted(path.stem for path in (ROOT / "conf/distiller").glob("*.yaml"))
MODES = sorted(path.stem for path in (ROOT / "conf/spot_mode").glob("*.yaml"))
PAIRS = ("same", "different")
LIGHTER = {"semckd": ["distiller.losses.semckd.widening=0.02"]}  # as published, projections from a VGG are 69 million weights


def teacher_of(distiller: str, pair: str) -> str:
    return "resnet14" if pair == "same" else other_family(distiller)


def short_warm_up(distiller: str) -> list[str]:
    warms_up = compose_config(f"distiller={distiller}")["distiller"].get("warm_up")
    return ["distiller.warm_up.epochs=1"] if warms_up else []


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distiller", [name for name in DISTILLERS if name != "none"])
def test_it_trains_an_epoch_with_finite_measurements(distiller, mode, pair, tiny, teachers):
    teacher = teacher_of(distiller, pair)
    config = tiny(
        f"distiller={distiller}",
        f"spot_mode={mode}",
        f"teacher={teacher}",
        f"teacher.checkpoint={teachers(teacher)}",
        "epochs=1",
        *short_warm_up(distiller),
        *LIGHTER.get(distiller, []),
    )
    result = execute(config)
    assert 0 <= result["student"]["accuracy"] <= 100
    assert list(result["kept"])[-1] == "logits"
    assert all(0 <= share <= 1 for share in result["kept"].values())
    assert (mode != "fixed") or set(result["kept"].values()) == {1.0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distiller", [name for name in DISTILLERS if name != "none"])
def test_it_goes_on_from_a_saved_state_bit_for_bit(distiller, mode, tiny):
    config = tiny(
        f"distiller={distiller}",
        f"spot_mode={mode}",
        f"teacher={other_family(distiller)}",
        "dataset.train_samples=100",
        *LIGHTER.get(distiller, []),
    )
    dataset = build.dataset(config)
    whole, first, second = (build.trainer(config, build.parts(config), torch.device("cpu")) for _ in range(3))
    list(whole.fit(dataset, 2, 50))
    list(first.fit(dataset, 1, 50))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.prepare(dataset)
    second.load_state_dict(torch.load(saved, weights_only=True))
    list(second.fit(dataset, 2, 50))
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("distiller", [name for name in DISTILLERS if name != "none"])
def test_under_bfloat16_autocast_losses_stay_finite_and_near_those_of_float32(distiller, tiny):
    lighter = LIGHTER.get(distiller, [])
    config = tiny(f"distiller={distiller}", "spot_mode=random", f"teacher={other_family(distiller)}", *lighter)
    dataset = build.dataset(config)
    batch = next(iter(train_batches(dataset, 16, stream(0, "data", 1))))
    measured = {}
    for precise in (True, False):
        trainer = build.trainer(config, build.parts(config), torch.device("cpu"))
        trainer.prepare(dataset)
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            measured[precise] = trainer.train_step(*batch)
        for part in (trainer.student, trainer.distillers):
            assert all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())
    losses = [name for name in measured[True] if name.startswith("loss/")]
    assert set(losses) == {f"loss/{name}" for name in ("task", *config["distiller"]["losses"])}
    for name in losses:
        assert float(measured[False][name]) == pytest.approx(float(measured[True][name]), rel=0.1, abs=0.05), name


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Untrained weights: how good a teacher is does not matter here."""
    folder = tmp_path_factory.mktemp("teachers")

    def file(name: str) -> Path:
        path = folder / f"{name}.pt"
        if not path.exists():
            torch.save(getattr(networks, name)(10, 1, 8).state_dict(), path)
        return path

    return file


def test_none_is_a_student_alone(tiny):
    result = execute(tiny("distiller=none", "epochs=1"))
    assert result["teacher"] is None
    assert result["kept"] == {}


@pytest.mark.parametrize("dataset", ["digits", "fashion_mnist", "cifar10", "cifar100"])
def test_epochs_and_milestones_fit_the_data_set(dataset):
    config = compose_config(f"dataset={dataset}")
    recipe = yaml.safe_load((ROOT / f"conf/dataset/{dataset}.yaml").read_text())["recipe"]
    assert config["epochs"] == recipe["epochs"]
    assert config["schedule"]["milestones"] == [round(share * config["epochs"]) for share in (0.625, 0.75, 0.875)]
