"""The record of what a spot mode decided is what the distillers saw, image by image, whatever happens."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from sakd.configuration import build, prerequisites
from sakd.configuration.compose import sweep
from sakd.data import evaluation_batches
from sakd.distillers import Distiller
from sakd.errors import ConfigError, RunError
from sakd.runs import Run
from sakd.runs.job import execute, execute_together
from sakd.runs.record import StoredRecord, read_record
from tests.conftest import TINY, last_of_each
from tests.test_resume import KILLED, in_a_process

SEEN: list[dict[str, torch.Tensor]] = []  # by the witnesses of this process, a step each


class Witness(Distiller):
    """Learns nothing, and remembers whom it was told to keep."""

    def loss(self, student_features, teacher_features, keep, indices):
        SEEN.append({"indices": indices.clone()} | {spot.name: mask.clone() for spot, mask in keep.items()})
        return 0 * student_features["logits"].sum()


WITNESS = (
    "+distiller.losses.witness._target_=tests.test_record.Witness",
    "+distiller.losses.witness.where=stages",
    "+distiller.losses.witness.weight=1.0",
    "spot_mode.same_family_bias=0",  # undecided: some are kept and others are not
)


def record_of(config: dict) -> StoredRecord:
    return read_record(Run(config).folder)


def shares(record: StoredRecord) -> dict[str, list[float]]:
    return {spot: record.kept_of(spot).mean(1).tolist() for spot in record.spots}


def test_recorded_is_what_the_distillers_were_told_step_by_step(tiny):
    config = tiny("spot_mode=adaptive", "distiller=at", *WITNESS, "batch_size=50")
    SEEN.clear()
    execute(config)
    record = record_of(config)
    assert (record.spots, record.epochs.tolist()) == (["stage1", "stage2", "stage3", "logits"], [1, 2])
    told = {spot: np.full((2, 192), -1) for spot in record.spots}
    for number, step in enumerate(SEEN):
        for spot in record.spots:
            told[spot][number // 4, step["indices"]] = step[spot]  # four steps an epoch
    for spot in record.spots:
        assert np.array_equal(told[spot], record.kept_of(spot)), spot
    assert any(0.02 < share < 0.98 for epochs in shares(record).values() for share in epochs)
    dataset = build.dataset(config)
    assert np.array_equal(record.labels, dataset.train.labels)
    everything = build.dataset({**config, "dataset": {**config["dataset"], "train_samples": None}})
    assert torch.equal(everything.train.images[record.indices], dataset.train.images)


def test_shares_of_the_record_are_those_that_are_measured(tiny):
    config = tiny("spot_mode=random", "spot_mode.p=0.3", "distiller=at")
    execute(config)
    record, lines = record_of(config), Run(config).metrics()
    for spot, epochs in shares(record).items():
        assert epochs == pytest.approx([line[f"kept/{spot}"] for line in lines]), spot


def test_an_image_that_an_epoch_leaves_out_was_kept_nowhere(tiny):
    config = tiny("spot_mode=fixed", "dataset.train_samples=97", "batch_size=48")
    execute(config)
    assert [kept.sum() for kept in record_of(config).kept_of("logits")] == [96, 96]


def test_a_cohort_records_what_each_alone_would(tiny, tmp_path):
    modes = ("adaptive", "anti", "random")
    common = ("distiller=at", "threads=1")
    together = [tiny(*common, f"spot_mode={mode}") for mode in modes]
    execute_together(together)
    for config, mode in zip(together, modes, strict=True):
        alone = tiny(*common, f"spot_mode={mode}", f"runs={tmp_path}/{mode}")
        execute(alone)
        assert (Run(config).folder / "spots.npz").read_bytes() == (
            Run(alone).folder / "spots.npz"
        ).read_bytes()


def test_after_a_kill_the_record_is_the_same(tiny, tmp_path):
    keys = ("spot_mode=adaptive", "distiller=at", "threads=1", "spot_mode.same_family_bias=0", "epochs=3")
    undisturbed, disturbed = tiny(*keys, f"runs={tmp_path}/undisturbed"), tiny(*keys)
    execute(undisturbed)
    execute(prerequisites(disturbed).teacher)
    assert in_a_process(disturbed, "sakd.runs:Run.save_checkpoint", 2, "before") == KILLED
    recorded = read_record(Run(disturbed).folder)
    assert recorded.epochs.tolist() == [1, 2]  # and the checkpoint's is the first
    assert recorded.of("test") is None
    execute(disturbed)
    for spot in recorded.spots:
        assert np.array_equal(record_of(disturbed).kept_of(spot), record_of(undisturbed).kept_of(spot))


@pytest.mark.parametrize("mode", ["adaptive", "anti"])
def test_what_is_seen_in_the_end_is_what_the_weights_say(mode, tiny):
    config = tiny(f"spot_mode={mode}", "distiller=at", "spot_mode.same_family_bias=0", "epochs=1")
    execute(config)
    student, teacher = build.parts(config).student.eval(), build.parts(config).teacher.eval()
    student.load_state_dict(safetensors.torch.load_file(Run(config).weights))
    teacher.load_state_dict(safetensors.torch.load_file(Run(prerequisites(config).teacher).weights))
    policy = torch.load(Run(config).folder / "last.pt")["trainer"]["spot_mode"]
    dataset = build.dataset(config)
    for split in ("train", "test"):
        seen, images = record_of(config).of(split), getattr(dataset, split)
        (batch,) = evaluation_batches(images, dataset)
        with torch.no_grad():
            own, taught = student.features(batch.images), teacher.features(batch.images)
            scores = torch.cat([taught["embedding"], own["embedding"]], 1) @ policy["policy.weight"].T
            scores = (scores + policy["policy.bias"]).unflatten(1, (-1, 2))
        probability = scores[..., 0].sub(scores[..., 1]).sigmoid().numpy()
        np.testing.assert_allclose(seen.probability, probability, rtol=1e-4, atol=1e-5)
        likelier = seen.probability >= 0.5
        assert np.array_equal(seen.route, likelier)
        assert np.array_equal(seen.kept, likelier if mode == "adaptive" else ~likelier)
        for name, logits in (("student", own["logits"]), ("teacher", taught["logits"])):
            confidence = F.softmax(logits, 1).amax(1).numpy()
            np.testing.assert_allclose(getattr(seen, f"{name}_confidence"), confidence, rtol=1e-4)
            right = (logits.argmax(1) == images.labels).numpy()
            assert np.array_equal(getattr(seen, f"{name}_right"), right)
        losses = F.cross_entropy(own["logits"], images.labels, reduction="none").numpy()
        np.testing.assert_allclose(seen.student_loss, losses, rtol=1e-3, atol=1e-5)
    assert 100 * record_of(config).of("test").student_right.mean() == pytest.approx(
        Run(config).result()["student"]["accuracy"]
    )


def test_without_a_record_the_numbers_are_the_same_and_nothing_is_left(tiny, tmp_path):
    with_record, without = (
        tiny("distiller=at", "threads=1"),
        tiny("distiller=at", "threads=1", "record_spots=false"),
    )
    without["runs"] = str(tmp_path / "without")
    assert Run(with_record).name == Run(without).name
    for config in (with_record, without):
        execute(config)
    assert Run(with_record).weights.read_bytes() == Run(without).weights.read_bytes()
    assert not (Run(without).folder / "spots.npz").exists()
    with pytest.raises(RunError, match=r"spots\.npz: found no such file.*record_spots=false"):
        record_of(without)


@pytest.mark.slow
def test_a_record_may_begin_late_and_be_left_out_for_a_while(tiny):
    config = tiny("distiller=at", "epochs=4", "threads=1")
    for epoch, recorded in ((1, "false"), (2, "true"), (3, "false")):
        own = {**config, "record_spots": recorded == "true"}
        moment = ("sakd.runs:Run.save_checkpoint", 1 + 4 * (epoch == 1), "after")  # the teacher's four first
        assert in_a_process(own, *moment) == KILLED
    execute(config)
    assert record_of(config).epochs.tolist() == [2, 4]


def test_what_was_recorded_of_another_training_is_no_part_of_this_one(tiny):
    config = tiny("distiller=at", "spot_mode=adaptive")
    execute(config)
    for name in ("last.pt", "result.json", "metrics.jsonl"):
        (Run(config).folder / name).unlink()
    execute({**config, "record_spots": False})
    assert not (Run(config).folder / "spots.npz").exists()


def test_random_takes_its_rates_from_a_finished_run(tiny):
    config = tiny("spot_mode=adaptive", "distiller=at", "spot_mode.same_family_bias=0", "epochs=2")
    random = ("spot_mode=random", "distiller=at", "epochs=2")
    with pytest.raises(ConfigError, match=r"spot_mode\.p: found from:adaptive, expected .*found no such run"):
        tiny(*random, "spot_mode.p=from:adaptive")
    execute(config)
    execute(tiny("spot_mode=adaptive", "distiller=at", "epochs=1"))  # another, of the same short names
    rates = {spot: np.mean(epochs) for spot, epochs in shares(record_of(config)).items()}
    for wanted in ("adaptive", Run(config).name, Run(config).name[:-4], Run(config).folder):
        control = tiny(*random, f"spot_mode.p=from:{wanted}")
        assert control["spot_mode"]["p"] == pytest.approx(rates), wanted
    numbers = ",".join(f"{spot}:{rate!r}" for spot, rate in control["spot_mode"]["p"].items())
    assert Run(control).name == Run(tiny(*random, f"spot_mode.p={{{numbers}}}")).name
    teacher = Run(prerequisites(config).teacher).name
    for wanted, found in (
        ("nowhere", "no such run"),
        (teacher, "no kept_mean"),
        ("", "no such run"),
        ("anti", "no such run"),
        ("digits-resnet8", "found 2 runs in .* whose names begin so"),
    ):
        with pytest.raises(ConfigError, match=rf"spot_mode\.p: found .*{found}"):
            tiny(*random, f"spot_mode.p=from:{wanted}")
    with pytest.raises(ConfigError, match="found from:adaptive"):
        tiny(*random, "spot_mode.p=from:adaptive", "seed=1")
    for key in ("runs", "seed", "dataset.name", "distiller.losses"):
        with pytest.raises(ConfigError, match=f"^{key}: found nothing"):
            tiny(*random, "spot_mode.p=from:adaptive", f"~{key}")


def test_random_takes_each_epoch_s_rates_from_a_finished_run(tiny):
    config = tiny("spot_mode=adaptive", "distiller=at", "spot_mode.same_family_bias=0", "epochs=3")
    random = ("spot_mode=random", "distiller=at", "epochs=3", "spot_mode.p=epochs:adaptive")
    execute(config)
    control = tiny(*random)
    rates = shares(record_of(config))
    assert len({*rates["stage1"]}) > 1
    for spot, own in rates.items():
        assert control["spot_mode"]["p"][spot] == pytest.approx(own, abs=1e-6)
    execute(control)
    for spot, found in shares(record_of(control)).items():
        for rate, share in zip(rates[spot], found, strict=True):
            assert abs(rate - share) <= 5 * (rate * (1 - rate) / 192) ** 0.5 + 1e-6
    with pytest.raises(ConfigError, match=r"spot_mode\.p: found 3 epochs in .*metrics\.jsonl, expected 2"):
        tiny(*random, f"spot_mode.p=epochs:{Run(config).name}", "epochs=2")
    with pytest.raises(
        ConfigError, match=r"spot_mode\.p\.logits: found 2 rates, expected one number, or one"
    ):
        tiny(*random, "spot_mode.p={stage1:1,stage2:1,stage3:1,logits:[1,0.5]}")
    (Run(config).folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"spot_mode\.p: found no shares kept by epoch in .*'kept/stage1'"):
        tiny(*random)


def test_each_cell_of_a_sweep_takes_the_rates_of_its_own_twin(tiny, tmp_path):
    keys = ("distiller=at", "epochs=1")
    chosen = {
        seed: tiny(*keys, "spot_mode=adaptive", f"seed={seed}", "spot_mode.same_family_bias=0")
        for seed in (0, 1)
    }
    for config in chosen.values():
        execute(config)
    overrides = last_of_each(*TINY, *keys, "spot_mode=random", "spot_mode.p=from:adaptive", "seed=0,1")
    cells = [config for _, config in sweep([*overrides, f"runs={tmp_path}/runs", "tracking=none"]).cells]
    for config in cells:
        rates = Run(chosen[config["seed"]]).result()["kept_mean"]
        assert config["spot_mode"]["p"] == rates, config["seed"]
    assert len({str(config["spot_mode"]["p"]) for config in cells}) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def _forget_an_epoch(path: Path) -> None:
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"kept": arrays["kept"][1:], "epochs": arrays["epochs"][1:]})


def _misfit(path: Path) -> None:
    np.savez(path, **dict(np.load(path)) | {"train_labels": np.zeros(3, int)})


def _lack(path: Path) -> None:
    np.savez(path, **{key: array for key, array in np.load(path).items() if key != "epochs"})


def _pickle(path: Path) -> None:
    np.savez(path, **dict(np.load(path)) | {"spots": np.array([{}], dtype=object)})


def _finish_in_part(path: Path) -> None:
    np.savez(path, **dict(np.load(path)) | {"train_student_right": np.zeros(192, bool)})


def _another_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def _no_epochs(path: Path) -> None:
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"kept": arrays["kept"][:0], "epochs": arrays["epochs"][:0]})


DAMAGE = {
    os.unlink: "found no such file",
    _cut: "cannot be read",
    _flip: "cannot be read",
    _misfit: r"cannot be read \(kept: found uint8",
    _lack: "cannot be read .*epochs",
    _pickle: "cannot be read .*pickle",
    _finish_in_part: "cannot be read .*train_",
    _another_array: "cannot be read",
    _no_epochs: r"cannot be read \(found no epochs\)",
    _forget_an_epoch: "found other decisions than were recorded",
}


def test_a_damaged_record_is_named_and_nothing_is_trained_on(tiny):
    config = tiny("spot_mode=adaptive", "distiller=at", "threads=1", "epochs=3")
    assert in_a_process(config, "sakd.runs:Run.save_checkpoint", 3 + 2, "after") == KILLED
    folder = Run(config).folder
    whole, last = (folder / "spots.npz").read_bytes(), (folder / "last.pt").read_bytes()
    for damage, expected in DAMAGE.items():
        (folder / "spots.npz").write_bytes(whole)
        damage(folder / "spots.npz")
        with pytest.raises(RunError, match=rf"spots\.npz: {expected}.*of the 2 epochs.*record_spots=false"):
            execute(config)
        assert (folder / "last.pt").read_bytes() == last, damage
    (folder / "spots.npz").write_bytes(whole)
    execute(config)
    assert json.loads((folder / "result.json").read_text())["epochs"] == 3
