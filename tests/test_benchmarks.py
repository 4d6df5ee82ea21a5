"""The benchmarks: what they write, and that they measure what ``launch.py`` would run."""

import csv
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks import authors, cohort, epoch, folder, gpu, kept, parts, record, step
from sakd.configuration import build
from sakd.data import Augmentation, steps_per_epoch
from sakd.data.batches import channel_moments, normalise
from sakd.data.memory import augment
from sakd.streams import drawing_from
from sakd.training import Cohort, Step
from tests.conftest import ROOT, compose_config
from tests.test_resume import assert_same

UNNEEDED = ("mlflow", "submitit", "rich", "click")


def without(*packages: str) -> str:
    """The beginning of a script that cannot import them."""
    return f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"


@pytest.mark.slow
def test_a_steps_table_has_a_row_for_each_distiller_and_mode(tmp_path):
    """In a process that cannot import MLflow."""
    run = "from benchmarks.step import main; main(sys.argv[1:])"
    options = (
        "--pair resnet8,resnet8 --distillers kd,at --modes adaptive --batch 4 "
        "--samples 200 --rounds 2 --warm-up 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", without(*UNNEEDED) + run, *options.split(), "--device", "cpu",
         "--csv", str(tmp_path / "step.csv")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "step.csv").open() as file:
        floor, *rows = list(csv.DictReader(file))
    assert tuple(floor) == step.COLUMNS
    assert [(row["distiller"], row["mode"]) for row in rows] == [
        (distiller, mode) for distiller in ("kd", "at") for mode in ("fixed", "adaptive")
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
        assert float(adaptive["peak_mb"]) >= float(fixed["peak_mb"]) > float(floor["peak_mb"])
        if fixed["distiller"] == "at":  # the routed pass goes through stages, KD's not
            assert float(adaptive["peak_mb"]) > float(fixed["peak_mb"])
        assert all(
            row[column] in done.stdout
            for row in (fixed, adaptive)
            for column in ("distiller", "ms", "peak_mb")
        )
    assert "adaptive / fixed, geometric mean over kd, at:" in done.stdout


def test_peak_memory_is_what_is_alive_at_the_fullest_moment():
    left = []

    def allocates() -> None:
        first = torch.zeros(2**20)  # 4 MiB
        torch.zeros(2 * 2**20)
        del first
        left.append(torch.zeros(2**20))

    assert [step.peak_on_the_cpu(allocates) for _ in range(2)] == [12 * 2**20] * 2


def test_what_is_timed_holds_networks_labels_and_momenta():
    options = step.parse(
        ["--pair", "resnet14,resnet8", "--batch", "2", "--samples", "200", "--device", "cpu"]
    )
    timed = step.trainer_timed(options, "kd", "fixed")
    timed.step()
    teacher, student = (parts.network(name) for name in options.pair)
    expected = [*teacher.state_dict().values(), *student.state_dict().values(), *student.parameters()]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in timed.holds()}  # labels are held once
    assert sum(held.values()) == sum(tensor.nbytes for tensor in expected) + 200 * 8


def test_fixed_is_measured_once_and_first():
    assert step.parse(["--modes", "adaptive,fixed,random"]).modes == ["fixed", "adaptive", "random"]
    assert step.parse(["--modes", "anti"]).modes == ["fixed", "anti"]


def test_the_steps_times_are_taken_in_turn():
    order = []
    both = [
        step.Timed(name, "fixed", lambda name=name: order.append(name), lambda: None, list) for name in "ab"
    ]
    options = step.parse(["--rounds", "3", "--steps", "2", "--warm-up", "1", "--device", "cpu"])
    step.measure(both, options)
    assert "".join(order) == "ab" + 3 * "aabb"
    assert [len(one.times) for one in both] == [3, 3]


def test_times_and_ratios_are_medians_over_the_rounds():
    def timed(distiller, mode, *times):
        return step.Timed(distiller, mode, lambda: torch.zeros(2**18), lambda: None, list, list(times))

    all_timed = [
        timed("none", "floor", 2, 1, 4),
        timed("at", "fixed", 6, 2, 4),
        timed("at", "adaptive", 9, 10, 4),
    ]
    options = step.parse(["--device", "cpu", "--batch", "8"])
    floor, fixed, adaptive = step.rows_of(all_timed, options)
    assert [(row["ms"], row["images_per_second"]) for row in (floor, fixed, adaptive)] == [
        (2, 4000),
        (4, 2000),
        (9, 888.9),
    ]
    assert (floor["ratio_to_fixed"], fixed["ratio_to_fixed"], adaptive["ratio_to_fixed"]) == ("", 1, 1.5)
    assert (floor["ratio_to_floor"], fixed["ratio_to_floor"], adaptive["ratio_to_floor"]) == (1, 2, 4.5)
    assert {row["peak_mb"] for row in (floor, fixed, adaptive)} == {1.0}


@pytest.mark.slow
def test_once_a_configuration_is_composed_building_and_stepping_need_torch_alone(tmp_path):
    """In a process that can import neither Hydra nor MLflow."""
    overrides = ("teacher=resnet14", "student=resnet8", "distiller=ft", "spot_mode=adaptive")
    (tmp_path / "config.json").write_text(json.dumps(parts.composed(*overrides)))
    script = (
        "import json, torch\nfrom sakd.configuration import build\n"
        "config, cpu = json.load(open(sys.argv[1])), torch.device('cpu')\n"
        "trainer = build.trainer(config, build.parts(config), cpu)\n"
        "labels = torch.arange(4)\n"
        "trainer.spot_mode.prepare(labels, 100, trainer.streams['policy'])\n"
        "images = torch.randn(4, 3, 32, 32)\n"
        "step = trainer.train_step(images, labels, labels, trainer.teacher.features(images))\n"
        "assert step.measured.isfinite().all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", without("hydra", "omegaconf", *UNNEEDED) + script,
         str(tmp_path / "config.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_step_is_that_of_the_run_with_the_same_names():
    options = step.parse(["--precision", "bf16", "--no-fold-batch-norm", "--device", "cpu"])
    of_parts = parts.run_config(("resnet14", "resnet8"), "at", "anti", 4, options.execution)
    _, trainers = parts.trainers({"at": of_parts}, 200, options.device)
    made = trainers["at"]
    config = compose_config(
        *("dataset=cifar100", "teacher=resnet14", "student=resnet8", "distiller=at", "spot_mode=anti"),
        *("precision=bf16", "fold_batch_norm=false"),
    )
    run = build.trainer(config, build.parts(config), options.device)
    assert_same(made.student.state_dict(), run.student.state_dict())
    assert made.execution == run.execution
    assert [type(part) for part in (*made.distillers.values(), made.spot_mode)] == [
        type(part) for part in (*run.distillers.values(), run.spot_mode)
    ]


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


# ---- whole epochs


def test_an_epochs_table_has_the_data_alone_and_each_distiller_and_mode(tmp_path, capsys, monkeypatch):
    made, counts = epoch.random_images, []
    monkeypatch.setattr(epoch, "random_images", lambda count: counts.append(count) or made(count))
    options = (
        "--pair resnet8,resnet8 --distillers kd --modes fixed,random --batch 4 "
        "--samples 30 --steps 2 --rounds 1 --workers 1"
    )
    threads = f"--threads {torch.get_num_threads()}"
    assert epoch.main([*f"{options} {threads} --device cpu --csv".split(), str(tmp_path / "epoch.csv")]) == 0
    with (tmp_path / "epoch.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["distiller"], row["mode"]) for row in rows] == [
        ("none", "data"),
        ("kd", "fixed"),
        ("kd", "random"),
    ]
    assert all(tuple(row) == epoch.COLUMNS for row in rows)
    assert counts == [2 * 4]
    printed = capsys.readouterr().out
    assert (
        "wall time of an epoch of 30 images, medians of 1 rounds, extrapolated from 2 of 8 steps" in printed
    )
    assert all(row[column] in printed for row in rows for column in ("seconds", "plain_seconds", "ratio"))


def test_a_folder_s_table_has_the_data_alone_and_each_distiller(tmp_path, capsys):
    options = "--pair resnet8,resnet8 --distillers kd --modes fixed --batch 60 --samples 120 --rounds 1"
    where = f"--workers 0 --threads {torch.get_num_threads()} --device cpu --csv {tmp_path}/folder.csv"
    assert folder.main([*options.split(), *where.split()]) == 0
    with (tmp_path / "folder.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["distiller"], row["mode"]) for row in rows] == [("none", "data"), ("kd", "fixed")]
    assert all(tuple(row) == folder.COLUMNS for row in rows)
    assert "an epoch of 120 images, medians of 1 rounds; reading the files: " in capsys.readouterr().out


def test_an_epochs_row_extrapolates_to_all_steps():
    ours, plain = (
        step.Timed("kd", "fixed", lambda: None, times=times) for times in ([200, 100, 300], [400, 500, 300])
    )
    options = epoch.parse(["--samples", "40", "--batch", "4", "--steps", "2", "--device", "cpu"])
    row = epoch.row_of(ours, plain, options)
    assert (row["seconds"], row["plain_seconds"], row["images_per_second"], row["ratio"]) == (1, 2, 40, 2)


def test_all_of_an_epoch_is_timed_where_asked():
    for steps, timed in ((0, 782), (999, 782), (20, 20)):
        assert epoch.parse(["--steps", str(steps), "--device", "cpu"]).timed_steps == timed


def test_plain_images_are_among_all_crops_and_flips():
    images = epoch.random_images(2)
    plain = epoch.PlainImages(images)
    assert images.augmentation == Augmentation(crop_padding=4, flip=True)
    draws = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    pixels = images.train.images[1].expand(len(draws), -1, -1, -1)
    possible = augment(pixels, images.augmentation, draws[:, :2], draws[:, 2].bool())
    possible = normalise(possible, *channel_moments(images, torch.device("cpu")))
    drawn = []
    with drawing_from(0):
        for _ in range(80):
            image, label, index = plain[1]
            assert (label, index) == (1, 1)
            (matching,) = torch.where((possible - image).abs().amax((1, 2, 3)) < 1e-6)
            drawn.append(draws[matching].squeeze(0))
    assert [set(values.tolist()) for values in torch.stack(drawn, 1)] == [
        set(range(9)),
        set(range(9)),
        {0, 1},
    ]


def test_a_plain_epoch_trains_on_every_image_once():
    images = epoch.random_images(130)
    options = epoch.parse(["--pair", "resnet8,resnet8", "--device", "cpu", "--samples", "130"])
    config = parts.run_config(options.pair, "kd", "fixed", 40, options.execution)
    alone = Cohort(*parts.trainers({"kd": config}, 130, options.device))
    (member,) = alone.members.values()
    seen = []

    def train_step(images, labels, indices, *rest):
        assert images.shape[1:] == (3, 32, 32)
        assert torch.equal(labels, indices % parts.CLASSES)
        seen.append(indices)
        return Step({}, None, torch.zeros(len(member.trainer.measurements)))

    member.train_step = train_step
    epoch.plain_epoch(alone, DataLoader(epoch.PlainImages(images), 40, shuffle=True))
    assert len(seen) == steps_per_epoch(130, 40)
    assert sorted(torch.cat(seen).tolist()) == list(range(130))


# ---- all of a GPU in one call

TINY = [
    "--pair",
    "resnet8,resnet8",
    "--wide-pair",
    "resnet8,resnet8",
    "--distillers",
    "kd",
    "--batch",
    "4",
    "--samples",
    "18",
    "--rounds",
    "1",
    "--steps",
    "1",
    "--warm-up",
    "0",
    "--device",
    "cpu",
]


@pytest.mark.parametrize("group", kept.GROUPS)
def test_what_was_composed_beforehand_is_what_would_be_composed(group):
    """Some of each group: no choice depends on another, nor on the batch size.

    If ``conf/`` was changed: python -m benchmarks.kept.
    """
    usual = {"teacher": "resnet56", "student": "resnet20", "distiller": "at", "spot_mode": "adaptive"}
    for name in kept.GROUPS[group][-3:]:
        names = usual | {group: name}
        found, expected = kept.composed(names), parts.chosen(names, "tracking=none", "batch_size=48")
        assert found == expected | {"batch_size": found["batch_size"]}, "to be written anew"


@pytest.mark.slow
def test_all_of_a_gpu_is_measured_with_torch_alone(tmp_path):
    """As far as a CPU can: in processes that can import neither Hydra nor MLflow, nor what checks values."""
    (tmp_path / "sitecustomize.py").write_text(
        without("hydra", "omegaconf", "pydantic", "annotated_types", "mlflow", "submitit")
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "out"), *TINY],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    of_steps = "done, 2 rows, 6 with a note in their place"  # a CPU captures nothing
    of_gpu = summary["parts"]["tests"].split()
    assert summary["parts"] == {
        "tests": f"{of_gpu[0]} skipped in {of_gpu[-1]}",
        "steps": of_steps,
        "epochs": of_steps,
        "cohorts": "done, 5 rows",
        "busy": "done, 0 rows, 8 with a note in their place",
        "overhead": "done, 1 rows",
        "steps_wide": of_steps,
        "epochs_wide": of_steps,
    }
    with (tmp_path / "out/steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == 2 * [*gpu.OURS]
    assert rows[0]["note"].startswith("ConfigError: compile: found graph, which is for CUDA devices")
    assert float(rows[3]["ms"]) > 0


def test_parts_keep_to_their_time(tmp_path):
    arguments = [*TINY, "--output", str(tmp_path), "--minutes", "0"]
    assert gpu.main(arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {*summary["parts"].values()} == {"left out: no time was left"}
    assert gpu.told("steps", arguments, gpu.parse(arguments), seconds=0.3) == "cut off after 0 s"


def test_an_epoch_of_the_authors_takes_as_many_of_their_steps(tmp_path):
    cell = {"pair": "resnet56-resnet20", "distiller": "at", "mode": "adaptive", "variant": "captured"}
    rows = [
        {**cell, "ms": "1.5"},
        {**cell, "mode": "fixed", "variant": "authors", "ms": "9"},
        {**cell, "variant": "authors", "ms": "40"},
    ]
    step.write_csv(rows, tmp_path / "steps.csv")
    assert gpu.authors_seconds(tmp_path, cell, 782) == 31.28
    assert gpu.authors_seconds(tmp_path, {**cell, "distiller": "kd"}, 782) == ""


def test_a_device_is_busy_while_any_operation_runs():
    assert gpu.busy_share([(0, 2), (1, 3), (6, 8), (6.5, 7)]) == 5 / 8
    assert gpu.busy_share([(5, 6)]) == 1


def test_what_lies_between_epochs_is_told_without_the_first():
    trained, evaluated = [(0, 9), (10, 12), (15, 17), (20, 22)], [(9, 9.5), (12, 13), (17, 18), (22, 23)]
    found = gpu.between(trained, evaluated)
    assert found == {"epoch_seconds": 2, "between_seconds": 3, "of_which_evaluation": 1}


# ---- the authors' code

STAND_IN = """
import tqdm
import torch
from torch.utils.tensorboard import SummaryWriter
from dataset import get_dataset
from dataset.cifar import get_cifar100_dataloaders_sample
from models import get_model
from models.classifier import LinearClassifier

def not_wanted(*_, **__):
    raise AssertionError("replaced while the benchmark runs")

get_dataloader = get_cifar100_dataloaders_sample = get_teacher = get_student = not_wanted
get_logger = make_deterministic = init_pretrain = train_kd = accuracy = not_wanted

def train_epoch(cfg, epoch, train_loader, student, policy, tb_writer):
    for batch in train_loader:
        __global_values__["it"] += 1
        assert [len(part) for part in batch] == [4, 4] + (["crd"] == cfg) * [4, 4]
        assert not cfg or batch[3].shape == (4, 16385) and (batch[3][:, 0] == batch[2]).all()
        noise = torch.cuda.FloatTensor(torch.Size([4, 2])).uniform_().cuda()
        assert len(accuracy(student(batch[0].flatten(1)), batch[1], topk=(1, 5))) == 2
        tb_writer.add_scalars(main_tag="train/acc", tag_scalar_dict={})
    return 0.0, float(noise.sum())

def main(cfg_filepath, file_name_cfg, logdir):
    assert not torch.cuda.is_available()
    make_deterministic(1)
    get_logger(level=0, mode="w")
    cfg = open(cfg_filepath).read().split()
    if cfg:
        assert get_cifar100_dataloaders_sample(batch_size=64, k=16384)[2] == 200
    else:
        assert get_dataloader(cfg)[2] == 100
    assert get_teacher(cfg, 100).name == "resnet14"
    student, policy = get_student(cfg, 100), LinearClassifier()
    policy.set_n_to_True()
    init_pretrain(cfg, 1, 2, 3, 4, 5, 6)
    writer = SummaryWriter("logs")
    train_kd(cfg=cfg, train_loader=[], val_loader=[], student=student, policy=policy, tb_writer=writer)
    print("normalization constant")
"""

STAND_IN_MODELS = """
from torch import nn

def get_model(model_name, num_classes):
    model = nn.Linear(3072, num_classes)
    model.name = model_name
    return model
"""

STAND_IN_POLICY = """
from torch import nn

class LinearClassifier(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def set_n_to_True(self):
        self.bias[0] += 10
"""


@pytest.mark.slow
def test_the_authors_scripts_run_beside_ours(tmp_path):
    """On a stand-in for their code, with what fails in it on a CPU; in a process without MLflow."""
    files = {"train": STAND_IN, "train_baseline": STAND_IN, "models/__init__": STAND_IN_MODELS}
    files["models/classifier"] = STAND_IN_POLICY
    (tmp_path / "models").mkdir()
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    for distiller in ("at", "crd"):
        config = tmp_path / authors.CONFIGS / distiller / "resnet14-resnet8.yml"
        config.parent.mkdir(parents=True)
        config.write_text("crd" if distiller == "crd" else "")
    run = "from benchmarks.authors import main; main(sys.argv[1:])"
    options = (
        "--pair resnet14,resnet8 --distillers at,crd --batch 4 --samples 200 --rounds 1 --warm-up 0 "
        "--device cpu"
    )
    done = subprocess.run(
        [sys.executable, "-c", without(*UNNEEDED) + run, *options.split(), "--code", str(tmp_path),
         "--csv", str(tmp_path / "a.csv")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["distiller"], row["mode"]) for row in rows] == [
        (distiller, mode) for distiller in ("at", "crd") for mode in ("fixed", "adaptive")
    ]
    assert all(
        row[column] in done.stdout for row in rows for column in ("authors_ms", "ms", "throughput_ratio")
    )
    assert "adaptive, geometric mean over at, crd:" in done.stdout
    assert "normalization" not in done.stdout


def test_the_authors_throughput_is_compared_round_by_round():
    theirs, ours = (
        step.Timed("at", "adaptive", lambda: None, times=times) for times in ([9, 20, 30], [3, 10, 5])
    )
    options = SimpleNamespace(pair=["a", "b"], device_name="cpu")
    row = authors.row_of(ours, theirs, options)
    assert (row["authors_ms"], row["ms"], row["throughput_ratio"]) == (20, 5, 3)


def test_accuracies_are_those_of_the_k_likeliest():
    logits, labels = torch.randn(50, 20), torch.randint(20, (50,))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    for k, found in zip((1, 5), authors.accuracy(logits, labels, topk=(1, 5)), strict=True):
        torch.testing.assert_close(found, (ranks < k).float().mean().reshape(1))


def handing_over(train_epoch, **parts_of_training):
    """A script whose ``main`` hands over parts of a training."""
    replaced = ("dataloader", "cifar100_dataloaders_sample", "teacher", "student", "logger")
    script = SimpleNamespace(**{f"get_{name}": None for name in replaced}, train_epoch=train_epoch)
    script.make_deterministic = script.init_pretrain = script.train_kd = None
    script.main = lambda *_: script.train_kd(train_loader=[], val_loader=[], **parts_of_training)
    return script


def test_an_authors_step_whose_loss_breaks_is_no_measurement(tmp_path):
    script = handing_over(lambda epoch, train_loader: (0.0, float("nan")))
    made = authors.authors_step(script, tmp_path / "at.yml", [], 200, ["resnet14", "resnet8"])
    with pytest.raises(FloatingPointError, match=r"at.yml: the authors' loss became nan"):
        made()


def test_the_authors_weights_hardly_move(tmp_path):
    """So that the policy's choices, on which the cost of their step depends, stay those of a training's
    start."""
    optimizers = {
        name: torch.optim.SGD([torch.ones(1)], lr=0.05) for name in ("optimizer", "agent_optimizer")
    }
    rates = []

    def train_epoch(epoch, train_loader, optimizer, agent_optimizer):
        rates.extend(group["lr"] for one in (optimizer, agent_optimizer) for group in one.param_groups)
        return 0.0, 1.0

    script = handing_over(train_epoch, **optimizers)
    authors.authors_step(script, tmp_path, [], 200, ["resnet14", "resnet8"])()
    assert rates == [authors.LR, authors.LR]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distillers", "kd"], "has no such pair or distiller"),
        (["--modes", "anti"], "found anti, expected some of adaptive, fixed"),
    ],
)
def test_what_the_authors_do_not_have_is_told(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        authors.parse(["--code", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


# ---- cohorts


def test_students_together_are_measured_beside_each_alone(tmp_path, capsys):
    options = (
        "--pair resnet14,resnet8 --distillers kd,at --modes fixed,adaptive --batch 4 --samples 200 --rounds 2"
    )
    assert cohort.main([*f"{options} --device cpu --csv".split(), str(tmp_path / "cohort.csv")]) == 0
    (row,) = csv.DictReader((tmp_path / "cohort.csv").read_text().splitlines())
    assert list(row) == ["pair", "members", "alone_ms", "together_ms", "ratio", "peak_mb"]
    assert (row["pair"], row["members"]) == ("resnet14-resnet8", "4")
    assert 0 < float(row["ratio"]) < 1  # three of four passes of the teacher are left out
    assert "4" in capsys.readouterr().out


# ---- records


@pytest.mark.slow
def test_the_record_benchmark_has_a_row_for_each_kind_of_decisions(tmp_path, capsys):
    options = f"--samples 500 --epochs 6 --spots 2 --classes 5 --csv {tmp_path}/record.csv"
    options += " --pair resnet8,resnet8"
    assert record.main(options.split()) == 0
    share = re.search(r"of which the record .* us \((.*)%\)", capsys.readouterr().out)[1]
    assert 0 < float(share) < 1  # of a step, at most
    structured, random = csv.DictReader((tmp_path / "record.csv").read_text().splitlines())
    assert (structured["decisions"], random["decisions"]) == ("structured", "random")
    assert structured["of"] == "500 x 6 x 2"
    assert all(float(structured[key]) >= 0 for key in structured if key.endswith(("_s", "_mb")))
