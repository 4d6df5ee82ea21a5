"""Every distiller in every spot mode trains, from what lies in conf/: a new file is covered by being
there."""

import io
import re

import pytest
import torch
import yaml

from sakd import networks
from sakd.configuration import build
from sakd.data import train_batches
from sakd.errors import ConfigError
from sakd.runs.job import execute
from sakd.streams import stream
from tests.conftest import ROOT, compose_config, fit, light, other_family, take_step
from tests.test_resume import assert_same

DISTILLERS = sorted(path.stem for path in (ROOT / "conf/distiller").glob("*.yaml"))
MODES = sorted(path.stem for path in (ROOT / "conf/spot_mode").glob("*.yaml"))
PAIRS = ("same", "different")
CPU = torch.device("cpu")
# In these every distiller meets both kinds of pairs, and a policy that keeps and lets go.
QUICK = (("different", "adaptive"), ("same", "anti"))
DISTILLING = [name for name in DISTILLERS if name != "none"]
# Other formulas at its spot, which test_distillers.py, test_ctkd.py and test_mlkd.py hold them to; of views
# test_views.py.
AS_KD = ("ctkd", "kd_standardised", "mlkd", "nkd", "wttm")
EACH = [pytest.param(name, marks=pytest.mark.slow if name in AS_KD else ()) for name in DISTILLING]


def overrides(distiller: str, pair: str = "different") -> tuple[str, ...]:
    teacher = "resnet14" if pair == "same" else other_family(distiller)
    return (f"distiller={distiller}", f"teacher={teacher}", *light(distiller))


@pytest.mark.parametrize(
    ("pair", "mode"),
    [
        pytest.param(pair, mode, marks=() if (pair, mode) in QUICK else pytest.mark.slow)
        for pair in PAIRS
        for mode in MODES
    ],
)
@pytest.mark.parametrize("distiller", EACH)
def test_it_trains_two_epochs_and_goes_on_from_a_saved_state_bit_for_bit(distiller, mode, pair, tiny):
    config = tiny(
        *overrides(distiller, pair),
        f"spot_mode={mode}",
        "dataset.train_samples=48",
        "dataset.test_samples=32",
    )
    dataset = build.dataset(config)
    whole, first, second = (build.trainer(config, build.parts(config), CPU) for _ in range(3))
    for measured in fit(whole, dataset, 2, 24):
        shares = [value for name, value in measured.items() if name.startswith("kept/")]
        assert all(0 <= share <= 1 for share in shares)
        assert (mode != "fixed") or set(shares) == {1.0}
        assert {f"loss/{name}" for name in ("task", *config["distiller"]["losses"])} <= measured.keys()
    fit(first, dataset, 1, 24)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.prepare(dataset)
    second.load_state_dict(torch.load(saved, weights_only=True))
    fit(second, dataset, 2, 24)
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("distiller", EACH)
def test_a_whole_run_ends_with_a_result(distiller, tiny, tmp_path):
    teacher = tmp_path / "teacher.pt"
    untrained = getattr(networks, other_family(distiller))(10, 1, 8)
    torch.save(untrained.state_dict(), teacher)
    small = ("dataset.train_samples=64", "dataset.test_samples=32", "epochs=1")
    result = execute(
        tiny(*overrides(distiller), f"teacher.checkpoint={teacher}", "spot_mode=adaptive", *small)
    )
    assert 0 <= result["student"]["accuracy"] <= 100
    assert list(result["kept"])[-1] == "logits"
    assert all(0 <= share <= 1 for share in result["kept"].values())


@pytest.mark.parametrize("distiller", EACH)
def test_under_bfloat16_autocast_losses_stay_finite_and_near_those_of_float32(distiller, tiny):
    config = tiny(*overrides(distiller), "spot_mode=random", "dataset.train_samples=48")
    dataset = build.dataset(config)
    batch = next(iter(train_batches(dataset, 16, stream(0, "data", 1))))
    measured = {}
    for precise in (True, False):
        trainer = build.trainer(config, build.parts(config), CPU)
        trainer.prepare(dataset)
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            measured[precise] = take_step(trainer, *batch)
        for part in (trainer.student, trainer.distillers):
            assert all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())
    losses = [name for name in measured[True] if name.startswith("loss/")]
    assert set(losses) == {f"loss/{name}" for name in ("task", *config["distiller"]["losses"])}
    for name in losses:
        assert float(measured[False][name]) == pytest.approx(
            float(measured[True][name]), rel=0.1, abs=0.05
        ), name


WHERE = ("hint", "stages", "last_stage", "embedding", "logits", ["stages", "embedding"], ["stages", "logits"])
WHERE += ("stem", "stem:stage1", "stage1:stage3", "embedding:logits")


@pytest.mark.slow
@pytest.mark.parametrize("distiller", DISTILLING)
def test_a_spot_that_is_not_refused_by_name_takes_a_step(distiller, tiny):
    """Of networks of different families, each loss at each kind of spot."""
    config = tiny(*overrides(distiller), "spot_mode=adaptive", "dataset.train_samples=16", "batch_size=8")
    dataset = build.dataset(config)
    batch = next(iter(train_batches(dataset, 8, stream(0, "data", 1))))
    for name, node in config["distiller"]["losses"].items():
        for where in WHERE:
            moved = {**config["distiller"]["losses"], name: {**node, "where": where}}
            changed = {**config, "distiller": {**config["distiller"], "losses": moved}}
            try:
                trainer = build.trainer(changed, build.parts(changed), CPU)
            except ConfigError as error:
                assert re.search("where|spots|distiller.losses", str(error))  # noqa: PT017, each is told
                continue
            trainer.prepare(dataset)
            trainer.begin_epoch()
            take_step(trainer, *batch)


def test_none_is_a_student_alone(tiny):
    result = execute(tiny("distiller=none", "epochs=1"))
    assert result["teacher"] is None
    assert result["kept"] == {}


@pytest.mark.parametrize("dataset", sorted(path.stem for path in (ROOT / "conf/dataset").glob("*.yaml")))
def test_epochs_and_milestones_fit_the_data_set(dataset):
    config = compose_config(f"dataset={dataset}")
    recipe = yaml.safe_load((ROOT / f"conf/dataset/{dataset}.yaml").read_text())["recipe"]
    assert config["epochs"] == recipe["epochs"]
    assert config["schedule"]["milestones"] == [
        round(share * config["epochs"]) for share in (0.625, 0.75, 0.875)
    ]
