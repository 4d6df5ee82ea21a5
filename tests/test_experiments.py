"""The published experiments: what each cell composes to, against the published values, and trying one in
seconds."""

from functools import cache

import pytest
import torch
from omegaconf import DictConfig

from sakd.configuration import TEACHER_KEYS, Config, build, digest, prerequisites
from sakd.configuration.compose import resolve
from sakd.data import digits, stand_in
from sakd.networks.cost import warn_of_memory
from sakd.runs.job import execute
from tests.conftest import ROOT, compose_config, compose_lazily
from tests.test_every_config import DISTILLING

# What Song et al. (IEEE TIP 2022) trained with, as their configuration files say it.

SAME_FAMILY = [
    ("cifar100", "resnet56", "resnet20"),
    ("cifar100", "resnet110", "resnet32"),
    ("cifar100", "resnet32x4", "resnet8x4"),
    ("cifar100", "vgg13", "vgg8"),
    ("cifar100", "wrn_40_2", "wrn_16_2"),
    ("tiny_imagenet", "resnet56", "resnet20"),
    ("tiny_imagenet", "resnet110", "resnet20"),
    ("tiny_imagenet", "vgg13", "vgg8"),
    ("tiny_imagenet", "wrn_40_2", "wrn_16_2"),
]
OTHER_FAMILY = [
    ("cifar100", "vgg13", "MobileNetV2"),
    ("cifar100", "ResNet50", "MobileNetV2"),
    ("cifar100", "ResNet50", "vgg8"),
    ("cifar100", "resnet32x4", "resnet32"),
    ("cifar100", "wrn_40_2", "ShuffleNetV1"),
    ("tiny_imagenet", "vgg13", "MobileNetV2"),
]
CELLS = SAME_FAMILY + OTHER_FAMILY
BETA = {
    "fitnet": 1.0,
    "at": 1000.0,
    "sp": 3000.0,
    "cc": 0.02,
    "vid": 1.0,
    "rkd": 1.0,
    "pkt": 30000.0,
    "ft": 200.0,
    "nst": 50.0,
    "crd": 0.8,
}
SLOW_STUDENTS = ("MobileNetV2", "ShuffleNetV1")  # they learn at 0.01, all others at 0.05
DOUBLED = ("at", "rkd", "vid")  # gamma is 2 on CIFAR-100, 1 for the others
FAST_PRETRAINING = ("cifar100", "ResNet50", "vgg8")  # its paraphraser learns at 0.05, all others at 0.01
SMALL_BATCHES = [
    ("cifar100", "ResNet50", "MobileNetV2", "nst"),
    ("cifar100", "wrn_40_2", "ShuffleNetV1", "nst"),
]


def published(dataset: str, teacher: str, student: str, distiller: str) -> Config:
    rate = 0.01 if student in SLOW_STUDENTS else 0.05
    return {
        "dataset": dataset,
        "teacher": teacher,
        "student": student,
        "epochs": 240,
        "batch size": 32 if (dataset, teacher, student, distiller) in SMALL_BATCHES else 64,
        "milestones": [150, 180, 210],
        "decay": 0.1,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": rate, "momentum": 0.9, "weight_decay": 5e-4},
        "policy": {"_target_": "torch.optim.SGD", "lr": rate / 2, "momentum": 0.9, "weight_decay": 1e-3},
        "alpha": 1.0,
        "KD temperature": 4.0,
        "beta": BETA[distiller],
        "pretraining": published_pretraining(dataset, teacher, student) if distiller == "ft" else None,
        "gamma": 2.0 if dataset == "tiny_imagenet" or distiller in DOUBLED else 1.0,
        "temperature": 5.0,
        "bias": 10.0 if (dataset, teacher, student) in SAME_FAMILY else 0.0,
        "crop padding": 4 if dataset == "cifar100" else 0,
        "flip": True,
        "image size": 32 if dataset == "cifar100" else 64,
        "mean": [0.5071, 0.4867, 0.4408] if dataset == "cifar100" else [0.4914, 0.4822, 0.4465],
        "std": [0.2675, 0.2565, 0.2761] if dataset == "cifar100" else [0.2023, 0.1994, 0.2010],
    }


def published_pretraining(*pair: str) -> Config:
    rate = 0.05 if pair == FAST_PRETRAINING else 0.01
    return {
        "epochs": 30,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": rate, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": None,
    }


def composed(config: Config, distiller: str) -> Config:
    """The same values where a run takes them from."""
    mode, losses, data = config["spot_mode"], config["distiller"]["losses"], config["dataset"]
    pretraining = config["distiller"].get("pretraining")
    student, teacher = (
        {k: v for k, v in config[node].items() if k not in TEACHER_KEYS} for node in ("student", "teacher")
    )
    same = family(student) == family(teacher)
    return {
        "dataset": data["name"],
        "teacher": config["teacher"]["name"],
        "student": config["student"]["name"],
        "epochs": config["epochs"],
        "batch size": config["batch_size"],
        "milestones": config["schedule"]["milestones"],
        "decay": config["schedule"]["gamma"],
        "optimizer": config["optimizer"],
        "policy": mode["optimizer"],
        "alpha": losses["kd"]["weight"],
        "KD temperature": losses["kd"]["temperature"],
        "beta": losses[distiller]["weight"],
        "pretraining": pretraining and {key: pretraining[key] for key in ("epochs", "optimizer", "schedule")},
        "gamma": mode["gamma"],
        "temperature": mode["temperature"],
        "bias": mode["same_family_bias"] if same else mode["other_family_bias"],
        "crop padding": data["crop_padding"],
        "flip": data["flip"],
        "image size": data["image_size"],
        "mean": data["mean"],
        "std": data["std"],
    }


def family(node: Config) -> str:
    return _family(tuple(node.items()))


@cache
def _family(node: tuple) -> str:
    with torch.device("meta"):
        return build.make(dict(node), "network").family


def experiment(dataset: str, teacher: str, student: str) -> str:
    return f"experiment={dataset}/{teacher}_{student}"


@cache
def of_distiller(name: str) -> DictConfig:
    return compose_lazily(f"distiller={name}").distiller


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_every_cell_has_the_published_values(cell):
    """The distillers' nodes are exchanged in one composition: the values that depend on them follow by
    interpolation."""
    cfg = compose_lazily(experiment(*cell))
    for distiller in BETA:
        cfg.distiller = of_distiller(distiller)
        assert composed(resolve(cfg), distiller) == published(*cell, distiller), distiller


@pytest.mark.slow
@pytest.mark.parametrize("distiller", BETA)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_every_cell_has_the_published_values_by_command(cell, distiller):
    config = compose_config(experiment(*cell), f"distiller={distiller}")
    assert composed(config, distiller) == published(*cell, distiller)
    assert digest(prerequisites(config).teacher) == digest(
        compose_config("distiller=none", f"dataset={cell[0]}", f"student={cell[1]}")
    )


def test_there_is_a_file_for_every_published_pair_and_no_other():
    files = {
        path.relative_to(ROOT / "conf/experiment").as_posix()
        for path in (ROOT / "conf/experiment").rglob("*.yaml")
    }
    assert files == {
        "debug.yaml",
        *("repdistiller.yaml", "mdistiller.yaml", "mlkd.yaml"),  # of any pair: tests/test_baselines.py
        *(f"{dataset}/{teacher}_{student}.yaml" for dataset, teacher, student in CELLS),
        *(f"imagenet/{pair}.yaml" for pair in IMAGENET),
    }


# ImageNet's two standard pairs: what the field trains them with.

IMAGENET = {
    "ResNet34_ResNet18": ("torchvision_resnet34", "torchvision_resnet18"),
    "ResNet50_MobileNetV1": ("torchvision_resnet50", "MobileNetV1"),
}


@pytest.mark.parametrize("pair", IMAGENET)
def test_imagenet_s_pairs_have_the_published_recipe_of_100_epochs(pair):
    config = compose_config(f"experiment=imagenet/{pair}")
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert (config["teacher"]["name"], config["student"]["name"]) == IMAGENET[pair]
    assert (config["dataset"]["name"], config["dataset"]["image_size"]) == ("imagenet", 224)
    for recipe in (config, config["teacher"]["training"]):
        assert (recipe["epochs"], recipe["batch_size"], recipe["optimizer"]) == (100, 256, sgd)
        assert recipe["schedule"] == {
            "_target_": "torch.optim.lr_scheduler.MultiStepLR",
            "milestones": [30, 60, 90],
            "gamma": 0.1,
            "by": "epoch",
            "warmup_epochs": 0,
            "warmup_start": 0.01,
        }
    assert config["teacher"]["pretrained"] == "IMAGENET1K_V1"
    assert config["top5"]


@pytest.mark.slow
@pytest.mark.parametrize("pair", IMAGENET)
def test_debug_tries_imagenet_s_pairs(pair, tmp_path):
    result = tried(
        f"experiment=[imagenet/{pair},debug]", "dataset.image_size=64", "distiller=at", tmp_path=tmp_path
    )
    assert (result["teacher"]["name"], result["student"]["name"]) == IMAGENET[pair]
    assert "top5" in result["student"]


@pytest.mark.parametrize(
    ("network", "told"), [("ResNet18", True), ("torchvision_resnet18", False), ("MobileNetV1", False)]
)
def test_a_stem_for_small_images_is_named_where_it_takes_tens_of_gigabytes(network, told, caplog):
    node = compose_config("dataset=imagenet", f"student={network}")["student"]
    with torch.device("meta"):
        built = build.make(node, "student", leave=build.OF_STUDENTS)
    warn_of_memory("student", network, built, 256)
    assert [
        message.startswith(f"student: found {network}, whose first maps of 224")
        for message in caplog.messages
    ] == [True] * told
    warn_of_memory("student", network, built, 16)
    assert len(caplog.messages) == told


# What an experiment leaves to the command line

CELL = ("cifar100", "resnet56", "resnet20")


def test_the_command_line_wins_over_an_experiment():
    values = ["epochs=10", "spot_mode.gamma=3", "optimizer.lr=0.1", "batch_size=32", "teacher=vgg8"]
    config = compose_config(experiment(*CELL), "distiller=at", *values)
    assert (config["epochs"], config["spot_mode"]["gamma"], config["batch_size"]) == (10, 3, 32)
    assert (config["optimizer"]["lr"], config["spot_mode"]["optimizer"]["lr"]) == (0.1, 0.05)
    assert config["schedule"]["milestones"] == [6, 8, 9]
    assert config["teacher"]["name"] == "vgg8"


@pytest.mark.parametrize("mode", ["fixed", "random", "anti"])
def test_an_experiment_goes_with_every_spot_mode(mode):
    config = compose_config(experiment(*CELL), "distiller=at", f"spot_mode={mode}")
    assert config["spot_mode"].get("gamma") == (2.0 if mode == "anti" else None)


def test_an_experiment_is_the_same_run_as_its_values_on_the_command_line():
    by_hand = [
        "dataset=cifar100",
        "teacher=resnet56",
        "student=resnet20",
        "distiller=at",
        "spot_mode.gamma=2",
    ]
    assert digest(compose_config(experiment(*CELL), "distiller=at")) == digest(compose_config(*by_hand))
    assert digest(compose_config(experiment(*CELL), "distiller=sp")) != digest(
        compose_config(*by_hand, "distiller=sp")
    )


def test_the_teacher_of_an_experiment_is_trained_once_whoever_learns_from_it():
    cells = [
        compose_config(experiment(*CELL), "distiller=at"),
        compose_config(
            experiment("cifar100", "wrn_40_2", "ShuffleNetV1"), "teacher=resnet56", "distiller=nst"
        ),
        compose_config("dataset=cifar100", "student=resnet56", "distiller=none"),
    ]
    assert cells[1]["batch_size"] == 32
    assert len({digest(prerequisites(config).teacher) for config in cells[:2]} | {digest(cells[2])}) == 1


# Trying one in seconds


def tried(*overrides: str, tmp_path) -> dict:
    return execute(compose_config(*overrides, "tracking=none", f"runs={tmp_path}"))


SMALL = [("cifar100", "vgg13", "MobileNetV2"), ("tiny_imagenet", "resnet56", "resnet20")]


@pytest.mark.slow
@pytest.mark.parametrize("cell", SMALL, ids="-".join)
def test_debug_tries_an_experiment_without_its_data(cell, tmp_path):
    dataset, teacher, student = cell
    result = tried(f"experiment=[{dataset}/{teacher}_{student},debug]", "distiller=at", tmp_path=tmp_path)
    assert result["epochs"] == 2
    assert (result["dataset"], result["teacher"]["name"], result["student"]["name"]) == (
        "debug",
        teacher,
        student,
    )
    assert list(result["kept"])[-1] == "logits"


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_debug_tries_every_pair(cell, tmp_path):
    dataset, teacher, student = cell
    tried(f"experiment=[{dataset}/{teacher}_{student},debug]", "distiller=at", tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("distiller", DISTILLING)
def test_debug_tries_every_distiller(distiller, tmp_path):
    tried("experiment=[cifar100/resnet56_resnet20,debug]", f"distiller={distiller}", tmp_path=tmp_path)


def test_debug_keeps_the_networks_and_the_recipe():
    debug, real = (
        compose_config(f"experiment={name}", "distiller=at")
        for name in ("[cifar100/resnet56_resnet20,debug]", "cifar100/resnet56_resnet20")
    )
    for key in ("student", "distiller", "seed"):
        assert debug[key] == real[key], key
    assert debug["spot_mode"]["gamma"] == real["spot_mode"]["gamma"]
    assert compose_config("experiment=debug", "epochs=5")["epochs"] == 5


@pytest.mark.parametrize(
    ("classes", "channels", "size"), [(10, 1, 8), (7, 1, 28), (100, 3, 32), (200, 3, 64)]
)
def test_the_digits_stand_in_for_images_of_any_shape(classes, channels, size):
    like = {"classes": classes, "channels": channels, "image_size": size}
    real, disguised = digits(), stand_in(like)
    for own, read in zip(disguised, real, strict=True):
        assert own.images.shape == (len(read), channels, size, size)
        assert torch.equal(own.images[:, -1, 0, 0], read.images[:, 0, 0, 0])
        assert torch.equal(own.images.amax((1, 2, 3)), read.images.amax((1, 2, 3)))
        assert torch.equal(own.labels, read.labels % classes)
