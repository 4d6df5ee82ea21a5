"""The rows of RepDistiller's and mdistiller's tables: what each composes to, against the published values."""

import pytest

from sakd.configuration import Config
from sakd.errors import ConfigError
from tests.conftest import compose_config

# Weights of cross-entropy, of KD, and of the method's own loss.

# github.com/HobbitLong/RepDistiller at b84f547, scripts/run_cifar_distill.sh: -r (1 where not given), -a, -b;
# of --distill fsp nothing uses its -b 50: its stages learn first, alone.
REPDISTILLER = {
    "kd": (0.1, 0.9, 0.0),
    "fitnet": (1.0, 0.0, 100.0),
    "at": (1.0, 0.0, 1000.0),
    "sp": (1.0, 0.0, 3000.0),
    "cc": (1.0, 0.0, 0.02),
    "vid": (1.0, 0.0, 1.0),
    "rkd": (1.0, 0.0, 1.0),
    "pkt": (1.0, 0.0, 30000.0),
    "ft": (1.0, 0.0, 200.0),
    "fsp_init": (1.0, 0.0, 0.0),
    "nst": (1.0, 0.0, 50.0),
    "crd": (1.0, 0.0, 0.8),
}
# github.com/megvii-research/mdistiller at a08d46f, mdistiller/engine/cfg.py: CE_WEIGHT, KD_WEIGHT,
# FEAT_WEIGHT; of ReviewKD configs/cifar100/reviewkd.yaml.
MDISTILLER = {
    "kd": (0.1, 0.9, 0.0),
    "at": (1.0, 0.0, 1000.0),
    "rkd": (1.0, 0.0, 1.0),
    "fitnet": (1.0, 0.0, 100.0),
    "nst": (1.0, 0.0, 50.0),
    "pkt": (1.0, 0.0, 30000.0),
    "sp": (1.0, 0.0, 3000.0),
    "vid": (1.0, 0.0, 1.0),
    "crd": (1.0, 0.0, 0.8),
    "reviewkd": (1.0, 0.0, 5.0),
    "ofd": (1.0, 0.0, 0.001),
}
# configs/cifar100/dkd/*.yaml there: DKD.BETA, or cfg.py's where a file has none.
MDISTILLER_DKD = {
    ("resnet110", "resnet32"): 2.0,
    ("resnet32x4", "resnet8x4"): 8.0,
    ("resnet32x4", "ShuffleNetV1"): 8.0,
    ("resnet32x4", "ShuffleNetV2"): 8.0,
    ("ResNet50", "MobileNetV2_half"): 8.0,
    ("resnet56", "resnet20"): 2.0,
    ("vgg13", "MobileNetV2_half"): 6.0,
    ("vgg13", "vgg8"): 6.0,
    ("wrn_40_2", "ShuffleNetV1"): 8.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
}
# github.com/Jin-Ying/Multi-Level-Logit-Distillation at 5ee473f, configs/cifar100/ours/*.yaml: EPOCHS, LR.
MLKD = {
    ("resnet110", "resnet32"): (240, 0.025),
    ("resnet32x4", "resnet8x4"): (240, 0.025),
    ("resnet32x4", "ShuffleNetV1"): (960, 0.01),
    ("resnet32x4", "ShuffleNetV2"): (960, 0.01),
    ("ResNet50", "MobileNetV2_half"): (480, 0.01),
    ("resnet56", "resnet20"): (240, 0.025),
    ("vgg13", "MobileNetV2_half"): (480, 0.01),
    ("vgg13", "vgg8"): (240, 0.025),
    ("wrn_40_2", "ShuffleNetV1"): (480, 0.01),
    ("wrn_40_2", "wrn_16_2"): (240, 0.025),
    ("wrn_40_2", "wrn_40_1"): (240, 0.025),
}
SLOW_STUDENTS = ("MobileNetV2_half", "ShuffleNetV1", "ShuffleNetV2")  # of both: they learn at 0.01
FAST_PRETRAINING = (
    "vgg8",
)  # RepDistiller's helper/pretrain.py: FT's first training at 0.01, or at its own rate
PAIRS = (("resnet32x4", "resnet8x4"), *(pair for pair in MDISTILLER_DKD if pair[1] != "resnet8x4"))


def published(pair: tuple[str, str], distiller: str, weights: tuple[float, float, float]) -> Config:
    rate = 0.01 if pair[1] in SLOW_STUDENTS else 0.05
    return {
        "pair": pair,
        "dataset": "cifar100",
        "spot mode": "fixed",
        "weights": weights,
        "epochs": 240,
        "batch size": 64,
        "milestones": [150, 180, 210],
        "decay": 0.1,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": rate, "momentum": 0.9, "weight_decay": 5e-4},
        "KD temperature": None if distiller in ("reviewkd", "dkd", "ofd") else 4.0,
        "pretraining rate": {"ft": 0.05 if pair[1] in FAST_PRETRAINING else 0.01, "fsp_init": rate}.get(
            distiller
        ),
    }


def composed(config: Config, distiller: str) -> Config:
    """The same values where a run takes them from."""
    losses = config["distiller"]["losses"]
    own = {key: node for key, node in losses.items() if key != "kd"}
    pretraining = config["distiller"].get("pretraining")
    return {
        "pair": (config["teacher"]["name"], config["student"]["name"]),
        "dataset": config["dataset"]["name"],
        "spot mode": config["spot_mode"]["name"],
        "weights": (
            config["task"]["weight"],
            losses["kd"]["weight"] if "kd" in losses else 0.0,
            own[distiller]["weight"] if own else 0.0,
        ),
        "epochs": config["epochs"],
        "batch size": config["batch_size"],
        "milestones": config["schedule"]["milestones"],
        "decay": config["schedule"]["gamma"],
        "optimizer": config["optimizer"],
        "KD temperature": losses["kd"]["temperature"] if "kd" in losses else None,
        "pretraining rate": pretraining and pretraining["optimizer"]["lr"],
    }


SOURCES = {"repdistiller": REPDISTILLER, "mdistiller": MDISTILLER}
ROWS = [(source, distiller) for source, rows in SOURCES.items() for distiller in rows]
QUICK = ("repdistiller", "kd")  # all others take half a second each, too


def row(source: str, distiller: str, pair: tuple[str, str]) -> Config:
    return compose_config(
        f"experiment={source}", f"distiller={distiller}", f"teacher={pair[0]}", f"student={pair[1]}"
    )


@pytest.mark.parametrize(
    ("source", "distiller"),
    [pytest.param(*own, marks=() if own == QUICK else pytest.mark.slow) for own in ROWS],
)
def test_every_row_has_the_published_values(source, distiller):
    pair = ("vgg13", "vgg8")
    expected = published(pair, distiller, SOURCES[source][distiller])
    assert composed(row(source, distiller, pair), distiller) == expected


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(("source", "distiller"), [("repdistiller", "ft"), ("mdistiller", "kd")])
def test_every_pair_has_the_published_values(source, distiller, pair):
    expected = published(pair, distiller, SOURCES[source][distiller])
    assert composed(row(source, distiller, pair), distiller) == expected


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id="-".join(pair), marks=() if pair == ("vgg13", "vgg8") else pytest.mark.slow)
        for pair in MDISTILLER_DKD
    ],
)
def test_dkd_weighs_the_other_classes_as_published_for_the_pair(pair):
    loss = row("mdistiller", "dkd", pair)["distiller"]["losses"]["dkd"]
    found = {key: loss[key] for key in ("target_weight", "others_weight", "temperature", "ramp_epochs")}
    assert found == {
        "target_weight": 1.0,
        "others_weight": MDISTILLER_DKD[pair],
        "temperature": 4.0,
        "ramp_epochs": 20,
    }


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(
            pair, id="-".join(pair), marks=() if pair == ("vgg13", "MobileNetV2_half") else pytest.mark.slow
        )
        for pair in MLKD
    ],
)
def test_mlkd_s_rows_have_the_published_values(pair):
    """Milestones stay where they are; the teacher has mdistiller's own training."""
    config = compose_config("experiment=mlkd", f"teacher={pair[0]}", f"student={pair[1]}")
    epochs, rate = MLKD[pair]
    expected = published(pair, "mlkd", (0.1, 0.0, 0.9)) | {"epochs": epochs, "KD temperature": None}
    expected["optimizer"] |= {"lr": rate}
    assert composed(config, "mlkd") == expected
    loss = config["distiller"]["losses"]["mlkd"]
    assert (loss["temperatures"], loss["view_temperatures"]) == ([2, 3, 4, 5, 6], [3, 4, 5])
    assert config["teacher"]["training"]["epochs"] == 240
    assert config["teacher"]["training"]["schedule"]["milestones"] == [150, 180, 210]


def test_a_distiller_without_a_row_is_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"^distiller.*: found no value for 'dist', expected one of none, kd"
    ):
        compose_config("experiment=repdistiller", "distiller=dist")


@pytest.mark.slow
def test_crd_beside_kd_is_a_row_too_and_a_value_of_one_s_own_wins():
    """RepDistiller's script: -a 1 -b 0.8."""
    config = compose_config("experiment=repdistiller", "distiller=crd", "distiller.alpha=1", "task.weight=2")
    assert composed(config, "crd")["weights"] == (2, 1, 0.8)
