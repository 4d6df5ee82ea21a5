"""Every distiller in every spot mode trains, from what lies in conf/: a new file is covered by being there."""

import io

import pytest
import torch
import yaml

from sakd import build, networks
from sakd.job import execute
from tests.conftest import ROOT, compose_config
from tests.test_resume import assert_same

DISTILLERS = sorted(path.stem for path in (ROOT / "conf/distiller").glob("*.yaml"))
MODES = sorted(path.stem for path in (ROOT / "conf/spot_mode").glob("*.yaml"))
PAIRS = {"same": ("resnet14", "resnet8"), "different": ("vgg8", "resnet8")}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distiller", [name for name in DISTILLERS if name != "none"])
def test_it_trains_an_epoch_with_finite_measurements(distiller, mode, pair, tiny, teachers):
    teacher, student = PAIRS[pair]
    config = tiny(
        f"distiller={distiller}",
        f"spot_mode={mode}",
        f"student={student}",
        f"teacher={teacher}",
        f"teacher.checkpoint={teachers[teacher]}",
        "epochs=1",
    )
    result = execute(config)
    assert 0 <= result["student"]["accuracy"] <= 100
    assert list(result["kept"])[-1] == "logits"
    assert all(0 <= share <= 1 for share in result["kept"].values())
    assert (mode != "fixed") or set(result["kept"].values()) == {1.0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distiller", [name for name in DISTILLERS if name != "none"])
def test_it_goes_on_from_a_saved_state_bit_for_bit(distiller, mode, tiny):
    config = tiny(f"distiller={distiller}", f"spot_mode={mode}", "teacher=vgg8", "dataset.train_samples=100")
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


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Untrained weights: how good a teacher is does not matter here."""
    folder = tmp_path_factory.mktemp("teachers")
    files = {}
    for name in {teacher for teacher, _ in PAIRS.values()}:
        files[name] = folder / f"{name}.pt"
        torch.save(getattr(networks, name)(10, 1, 8).state_dict(), files[name])
    return files


def test_none_is_a_student_alone(tiny):
    result = execute(tiny("distiller=none", "epochs=1"))
    assert result["teacher"] is None
    assert result["kept"] == {}


@pytest.mark.parametrize("dataset", sorted(path.stem for path in (ROOT / "conf/dataset").glob("*.yaml")))
def test_epochs_and_milestones_fit_the_data_set(dataset):
    config = compose_config(f"dataset={dataset}")
    recipe = yaml.safe_load((ROOT / f"conf/dataset/{dataset}.yaml").read_text())["recipe"]
    assert config["epochs"] == recipe["epochs"]
    assert config["schedule"]["milestones"] == [round(share * config["epochs"]) for share in (0.625, 0.75, 0.875)]
