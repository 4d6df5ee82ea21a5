"""What a run finds on the disk is what it wrote there, or it says which file is not."""

import io
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sakd import files
from sakd.configuration import Config, prerequisites
from sakd.errors import CheckpointError, RunError, SakdError
from sakd.files import append, is_sealed, read_json, read_whole, seal, with_checksum, write_whole
from sakd.runs import Run, read_metrics
from sakd.runs.job import check_before_work, execute
from tests.conftest import TINY, compose_config

WRONG = (None, True, "", "three", [], {}, -1, 0.5, 1000, 10**400, math.nan, math.inf)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Config:
    """A finished run, and its teacher's, which the tests' processes share: the first to come trains it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "finished"
    small = (*TINY, "dataset.train_samples=64", "distiller=kd", "spot_mode=fixed")
    config = compose_config(*small, f"runs={folder}/runs", "tracking=none")
    execute(config)
    return config


class Again:
    """A copy of a run's folder in which one kind of file is about to be damaged.

    Without its result it has only that left to do, unless the result is damaged itself.
    """

    def __init__(self, kind: str, finished: Config, folder: Path):
        self.kind = kind
        self.before = Run(finished)
        self.run = Run(finished | {"runs": str(folder)})
        shutil.copytree(finished["runs"], folder)
        if kind in ("result.json", "student.safetensors"):
            self.path = self.run.folder / kind
        else:
            (self.run.folder / "result.json").unlink()
            self.run.weights.unlink()
            certificates = list((folder / ".certificates").iterdir())
            self.path = certificates[0] if kind == "certificate" else self.run.folder / kind

    def refusal(self) -> str | None:
        """What the same command says of the damage; None where it ends with the same bits."""
        try:
            result = self.run.result() or execute(self.run.config)
        except SakdError as error:
            return str(error)
        expected = self.before.result()
        for key in ("student", "student_sha256", "kept", "seconds"):
            assert result[key] == expected[key]
        assert result["teacher"]["accuracy"] == expected["teacher"]["accuracy"]
        assert self.run.weights.read_bytes() == self.before.weights.read_bytes()
        assert read_metrics(self.run.folder) == read_metrics(self.before.folder)
        return None


def flip(raw: bytes, draw: random.Random) -> bytes:
    place, bit = draw.randrange(len(raw)), draw.randrange(8)
    return raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]


def cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def zeros(raw: bytes, draw: random.Random) -> bytes:
    place, length = draw.randrange(len(raw)), 1 + draw.randrange(4096)
    return raw[:place] + bytes(len(raw[place : place + length])) + raw[place + length :]


def change_a_value(content: object, draw: random.Random) -> None:
    """Take one of all values that lie in ``content`` out, or put a wrong one into its place."""
    places = []

    def walk(node: object) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            if key != files.CHECKSUM or not isinstance(node[key], str):
                places.append((node, key))
                walk(node[key])

    walk(content)
    node, key = draw.choice(places)
    wrong = draw.choice((..., *WRONG))
    if wrong is ...:
        del node[key]
    else:
        node[key] = wrong


def change_json(raw: bytes, draw: random.Random) -> bytes:
    """Another value in one line, under the checksum that was there."""
    lines = raw.splitlines() if raw.count(b"\n{") else [raw]
    number = draw.randrange(len(lines))
    content = json.loads(lines[number])
    change_a_value(content, draw)
    lines[number] = json.dumps(content).encode()
    return b"".join(line.rstrip() + b"\n" for line in lines)


def change_state(raw: bytes, draw: random.Random) -> bytes:
    """Another value in what PyTorch has saved, saved by PyTorch again."""
    content = torch.load(io.BytesIO(raw), weights_only=True)
    change_a_value(content, draw)
    changed = io.BytesIO()
    torch.save(content, changed)
    return changed.getvalue()


DAMAGES: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    "last.pt": (flip, flip, flip, cut, zeros, change_state),
    "metrics.jsonl": (flip, cut, zeros, change_json),
    "result.json": (flip, cut, zeros, change_json),
    "certificate": (flip, cut, zeros, change_json),
    "student.safetensors": (flip, cut, zeros),
}


def check_damages(kind: str, finished: Config, folder: Path, numbers: range) -> None:
    for number in numbers:
        draw = random.Random(number)
        again = Again(kind, finished, folder / str(number))
        damage = DAMAGES[kind][number % len(DAMAGES[kind])]
        before = again.path.read_bytes()
        again.path.write_bytes(damage(before, draw))
        told = again.refusal()
        if told is not None:
            assert str(again.path) in told, (number, told)
            assert "\n" not in told, (number, told)
            assert "weights_only" not in told, (number, told)
        shutil.rmtree(folder / str(number))


def test_a_damaged_file_is_named_or_the_run_ends_with_the_same_bits(finished, tmp_path):
    for kind, damages in DAMAGES.items():
        check_damages(kind, finished, tmp_path, range(len(damages) + 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_many_damages_are_named_or_the_run_ends_with_the_same_bits(kind, finished, tmp_path):
    check_damages(kind, finished, tmp_path, range(12, 432))


def without_checksum(content: dict) -> dict:
    return {key: value for key, value in content.items() if key != files.CHECKSUM}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("student", ..., "found no student.name, expected a name"),
        ("student", [], "found no student.name, expected a name"),
        ("student.accuracy", 1000, "found 1000 for student.accuracy, expected an accuracy of 0 to 100 %"),
        ("student.accuracy", None, "found accuracies .*, expected a network's"),
        ("student.best_accuracy", math.nan, "found nan for student.best_accuracy, expected an accuracy"),
        ("student.best_epoch", "two", "found 'two' for student.best_epoch, expected the number of an epoch"),
        ("teacher.accuracy", "high", "found 'high' for teacher.accuracy, expected an accuracy"),
        ("teacher", 3, "found 3 for teacher, expected what taught"),
        ("kept", {"logits": None}, "found .* for kept, expected shares by spot"),
        ("seconds", True, "found True for seconds, expected seconds"),
        ("student_sha256", ..., "found no student_sha256, expected a checksum"),
        ("code", None, "found no code.commit, expected a commit"),
        ("run", ..., "found no run, expected a name"),
        ("pretraining", True, "found no pretraining.run, expected a name"),
        ("epochs", 10**400, "found 1000.* for epochs, expected the number of an epoch"),
        ("run", "another", "found the result of 'another', expected this run's"),
    ],
)
def test_a_result_without_a_checksum_is_held_to_types_and_ranges(key, value, told, finished, tmp_path):
    again = Again("result.json", finished, tmp_path / "runs")
    content = without_checksum(json.loads(again.path.read_bytes()))
    again.path.write_text(json.dumps(content))
    assert again.run.result() == again.before.result()  # as it was written before there were checksums
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        node = node[parent]
    node[last] = value
    if value is ...:
        del node[last]
    again.path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=f"^{re.escape(str(again.path))}: {told}.*; move the file away"):
        again.run.result()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("epoch", "2", "found '2' for epoch, expected the number of an epoch"),
        ("epoch", 1.5, "found 1.5 for epoch, expected the number of an epoch"),
        ("time", ..., "found no time, expected the measurements of an epoch"),
        ("test/accuracy", 1000.0, "found 1000.0 for test/accuracy, expected an accuracy of 0 to 100 %"),
        ("loss/task", None, "found None for loss/task, expected a number"),
        ("loss/task", 10**400, "found 1000.* for loss/task, expected a number"),
    ],
)
def test_metrics_without_checksums_are_held_to_types_and_ranges(key, value, told, finished, tmp_path):
    again = Again("metrics.jsonl", finished, tmp_path / "runs")
    lines = [without_checksum(json.loads(line)) for line in again.path.read_bytes().splitlines()]
    again.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(again.run.folder) == lines
    lines[1][key] = value
    if value is ...:
        del lines[1][key]
    again.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=f"^{re.escape(str(again.path))}: line 2: {told}$"):
        read_metrics(again.run.folder)


@pytest.mark.parametrize("content", [{"accuracy": 1000}, {"accuracy": "97"}, {"subject": "another"}])
def test_a_certificate_that_says_something_else_is_refused(content, finished, tmp_path):
    again = Again("certificate", finished, tmp_path / "runs")
    known = without_checksum(json.loads(again.path.read_bytes()))
    again.path.write_text(json.dumps(known | content))
    assert str(again.path) in again.refusal()


def test_a_checkpoint_without_the_line_at_its_end_is_refused(finished, tmp_path):
    again = Again("last.pt", finished, tmp_path / "runs")
    again.path.write_bytes(again.path.read_bytes()[: -files.SEALED])
    assert torch.load(again.path, weights_only=True)["digest"] == again.run.digest
    with pytest.raises(CheckpointError, match=r"last.pt: found no checksum .* of an earlier version; move"):
        execute(again.run.config)


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("last.pt", "folder"),
        ("last.pt", "link"),
        ("last.pt", "pipe"),
        ("metrics.jsonl", "link"),
        ("certificate", "link"),
        ("result.json", "folder"),
        ("result.json", "link"),
        ("result.json", "pipe"),
    ],
)
def test_what_is_no_file_of_its_own_is_named_and_not_followed(kind, instead, finished, tmp_path):
    again = Again(kind, finished, tmp_path / "runs")
    again.path.rename(tmp_path / "elsewhere")
    if instead == "folder":
        again.path.mkdir()
    elif instead == "link":
        again.path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(again.path)
    told = again.refusal()
    assert str(again.path) in told
    assert "\n" not in told
    if instead == "folder":
        assert told == f"{again.path}: found a folder, expected a file; move it away"


def test_a_damaged_file_is_told_before_any_data_is_read(finished, tmp_path):
    for kind in ("last.pt", "metrics.jsonl"):
        again = Again(kind, finished, tmp_path / kind)
        check_before_work(again.run.config)
        again.path.write_bytes(b"{}\n")
        with pytest.raises(SakdError, match=f"^{re.escape(str(again.path))}: "):
            check_before_work(again.run.config)
    again = Again("last.pt", finished, tmp_path / "teacher")
    teacher = Run(prerequisites(again.run.config).teacher).folder
    (teacher / "result.json").unlink()
    (teacher / "last.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(teacher))}/last.pt: "):
        check_before_work(again.run.config)


@pytest.mark.parametrize("name", ["", "run.log"])
def test_nothing_is_written_where_a_link_leads(name, finished, tmp_path):
    again = Again("last.pt", finished, tmp_path / "runs")
    path, elsewhere = again.run.folder / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    before = elsewhere.stat().st_mtime_ns
    assert again.refusal().startswith(f"{path}: found a link, expected none")
    assert elsewhere.stat().st_mtime_ns == before


def test_the_state_of_another_trainer_is_told_in_one_line_with_its_file(finished, tmp_path):
    again = Again("last.pt", finished, tmp_path / "runs")
    saved = torch.load(again.path, weights_only=True)
    others = {**saved["trainer"], "student": {"weight": torch.zeros(3)}}
    for state in ({"epoch": 2}, others, {**saved["trainer"], "optimizer": "none"}):
        again.run.save_checkpoint(state, saved["sources"])
        told = again.refusal()
        assert told.startswith(f"{again.path}: ")
        assert told.endswith("; move it away to train from the start")
        assert "\n" not in told


def test_a_line_is_not_appended_to_what_a_link_leads_to(tmp_path):
    (tmp_path / "elsewhere").write_text("mine\n")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"cannot write .*/metrics.jsonl"):
        append(tmp_path / "metrics.jsonl", "{}")
    assert (tmp_path / "elsewhere").read_text() == "mine\n"


@pytest.mark.parametrize("change", ["deleted", "changed", "link"])
def test_a_finished_run_answers_with_its_own_weights_alone(change, finished, tmp_path):
    again = Again("student.safetensors", finished, tmp_path / "runs")
    weights = again.path.read_bytes()
    again.path.unlink()
    if change == "changed":
        again.path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    elif change == "link":
        (tmp_path / "elsewhere").write_bytes(weights)
        again.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match=f"^{re.escape(str(again.path))}: found .* move result.json away"
    ):
        execute(again.run.config)
    again.path.unlink(missing_ok=True)
    (again.run.folder / "result.json").unlink()
    assert again.refusal() is None
    assert again.path.read_bytes() == weights


@pytest.mark.parametrize("change", ["deleted", "changed"])
def test_a_teacher_that_is_finished_teaches_with_its_own_weights_alone(change, finished, tmp_path):
    again = Again("last.pt", finished, tmp_path / "runs")
    teacher = Run(prerequisites(again.run.config).teacher).weights
    if change == "deleted":
        teacher.unlink()
    else:
        teacher.write_bytes(teacher.read_bytes()[:-1])
    assert again.refusal().startswith(f"{teacher}: found ")


def test_what_pytorch_reads_of_a_sealed_file_is_what_was_saved_and_any_other_bit_breaks_the_seal():
    content = io.BytesIO()
    torch.save({"weight": torch.arange(3)}, content)
    sealed = bytes(seal(content))
    assert torch.load(io.BytesIO(sealed), weights_only=True)["weight"].tolist() == [0, 1, 2]
    assert is_sealed(sealed)
    for place in range(len(sealed)):
        assert not is_sealed(sealed[:place] + bytes([sealed[place] ^ 4]) + sealed[place + 1 :])
    assert not is_sealed(b"")


def test_json_says_when_it_is_not_what_was_written(tmp_path):
    path = tmp_path / "a.json"
    content = {"b": [1.5, {"c": None}], "a": "ä"}
    write_whole(path, json.dumps(with_checksum(content)).encode())
    assert read_json(path) == content
    path.write_text(path.read_text().replace("1.5", "2.5"))
    with pytest.raises(RunError, match=rf"^{path}: found checksum \w+, expected \w+ as it says itself"):
        read_json(path)
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(RunError, match=f"^{path}: found no valid JSON"):
        read_json(path)


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside(tmp_path):
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*/last.pt"):
        write_whole(tmp_path / "last.pt", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert read_whole(tmp_path / "none") is None


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match=f"^{tmp_path}/runs: found a file, expected a folder; move it away$"):
        read_whole(tmp_path / "runs/run/result.json")
