"""PyTorch's CUDA host code, over devices that are not there: no wait, nothing on the wrong device, no launch
more than is written down.

See cuda_stub/stub.c for what is simulated and what is not: numbers are not. Each part of cuda_stub/cells.py
runs once, in a process of its own, for all tests that look at it.
"""

import json
import os
from pathlib import Path
from subprocess import CalledProcessError

import pytest
from filelock import FileLock

from tests.cuda_stub import build
from tests.cuda_stub.launches import COHORTS, known, operations

pytestmark = pytest.mark.cuda_stub

DEVICES = ("cuda", "cuda:1")
COMPILED = {"eager": "none", "captured": "graph"}
MARGIN = {"eager": 10, "captured": 2}  # operations by which a step may differ from what is written down
MOST_OUTSIDE = 15  # operations outside of the graphs of a captured step that trains alone
MOST_OUTSIDE_OF_EIGHT = 20  # and of a cohort of eight
HINT = "if it is meant: python -m tests.cuda_stub.launches --write"


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder of this session's, for all its processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def library(shared) -> Path:
    reason = build.hindrance()
    if reason is not None:
        pytest.skip(reason)
    folder = shared / "cuda_stub"
    with FileLock(shared / "cuda_stub.lock"):
        if not folder.exists():
            folder.mkdir()
            try:
                build.build(folder)
            except CalledProcessError as error:
                (folder / "failed").write_text(f"{error.cmd[0]}: {error.stderr.strip()[:300]}")
    if (folder / "failed").exists():
        pytest.skip(f"the CUDA stub cannot be built: {(folder / 'failed').read_text()}")
    return folder / build.LIBRARY


@pytest.fixture(scope="session")
def told(shared, library):
    """What a part of cells.py tells, by name: run once for all that ask."""
    records = {}

    def of(*part: str) -> dict[str, dict]:
        if part not in records:
            kept = shared / f"told-{'-'.join(part).replace('/', '-')}.json"
            with FileLock(f"{kept}.lock"):
                if not kept.exists():
                    kept.write_text(json.dumps(ran(*part)))
                records[part] = json.loads(kept.read_text())
        if isinstance(records[part], str):
            pytest.fail(records[part])
        return records[part]

    def ran(*part: str) -> dict[str, dict] | str:
        try:
            return build.told(library, *part)
        except RuntimeError as error:  # once is enough
            return str(error)

    return of


@pytest.fixture(scope="session")
def epochs(told, shared):
    return lambda device: told("epochs", device, str(shared / f"epochs-{device}"))


def assert_no_fault(seen: dict) -> None:
    assert seen["faults"] == []
    assert seen["escaped"] == 0


# ---- steps


@pytest.mark.parametrize("name", COHORTS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", COMPILED)
def test_a_step_waits_for_nothing_and_launches_what_is_written_down(name, how, device, told):
    found = told("steps", device, COMPILED[how])[f"{device} {name}"]
    assert found["error"] is None
    for seen in (*found["captures"], *found["steps"]):
        assert_no_fault(seen)
        assert seen["to_device"] == seen["from_device"] == 0
    full, smaller = map(operations, found["steps"])
    assert abs(full - known()[name][how]) <= MARGIN[how], HINT
    assert abs(smaller - full) <= MARGIN[how] * len(COHORTS[name])
    passes = 0 if name == "none" else 1 + found["views"]  # of the teacher
    graphs = len(COHORTS[name]) + passes if how == "captured" else 0
    assert [seen["captures"] for seen in found["captures"]] == ([graphs, graphs] if graphs else [])
    assert all(seen["nodes"] > 0 for seen in found["captures"])
    for seen in found["steps"]:
        assert (seen["waits"], seen["graphs"], seen["captures"]) == (0, graphs, 0)


@pytest.mark.parametrize("more", [("precision=bf16",), ("precision=fp16", "clip_gradients=1")], ids=" ".join)
@pytest.mark.parametrize("name", ["kd adaptive", "at adaptive", "crd adaptive"])
def test_a_captured_step_in_half_precision_waits_for_nothing_either(name, more, told):
    """Its convolutions are carried out in another way here than on a device, so that they are not counted."""
    keys = (*more, "teacher=resnet14", "student=resnet8")
    found = told("pair", "cuda:1", "auto", "kd,at,crd", "adaptive", *keys)[name]
    assert found["error"] is None
    for seen in (*found["captures"], *found["steps"]):
        assert_no_fault(seen)
    for seen in found["steps"]:
        assert (seen["waits"], seen["graphs"]) == (0, 2)
        assert operations(seen) <= MOST_OUTSIDE


def test_a_rate_by_step_is_written_for_each_replay_and_captures_nothing_anew(told):
    keys = ("schedule=cosine", "schedule.by=step", "schedule.warmup_epochs=1", "teacher=resnet14")
    (found,) = told("pair", "cuda", "auto", "kd", "adaptive", *keys, "student=resnet8").values()
    (plain,) = told("pair", "cuda", "auto", "kd", "adaptive", *keys[-1:], "student=resnet8").values()
    assert found["error"] is None
    for seen, other in zip(found["steps"], plain["steps"], strict=True):
        assert_no_fault(seen)
        assert (seen["waits"], seen["captures"], seen["graphs"]) == (0, 0, 2)
        assert operations(seen) == operations(other) + 2  # the student's rate and the policy's


def test_mixed_images_wait_for_nothing_and_are_captured(told):
    task = ("task.mixup=0.4", "task.cutmix=1", "task.class_weights=balanced")
    images = ("dataset.erasing=0.5", "dataset.train_samples=40")
    found = told("pair", "cuda:1", "graph", "kd", "adaptive", *task, *images)
    for seen in found.values():
        assert seen["error"] is None
        for part in (*seen["captures"], *seen["steps"], seen["batches"]):
            assert_no_fault(part)
            assert part["waits"] == 0 or part in seen["captures"]
        assert [step["graphs"] for step in seen["steps"]] == [2, 2]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_batches_that_add_up_are_launched_operation_by_operation_and_wait_for_nothing(optimizer, told):
    keys = ("accumulate=2", "precision=fp16", f"optimizer={optimizer}", "teacher=resnet14", "student=resnet8")
    (found,) = told("pair", "cuda", "auto", "kd", "adaptive", *keys).values()
    assert found["error"] is None
    for seen in found["steps"]:
        assert_no_fault(seen)
        assert (seen["waits"], seen["graphs"]) == (0, 1)  # the teacher's


def test_a_captured_step_has_few_operations_outside_of_its_graphs():
    outside = {name: counts["captured"] for name, counts in known().items()}
    assert max(outside[name] for name, members in COHORTS.items() if len(members) == 1) <= MOST_OUTSIDE
    assert max(outside["eight fixed"], outside["eight adaptive"]) <= MOST_OUTSIDE_OF_EIGHT


def test_what_is_written_down_is_of_each_distiller_and_spot_mode():
    assert list(known()) == list(COHORTS), HINT


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "the CUDA stub needs a PyTorch for CUDA, found one without"),
        ("12.8", "the CUDA stub knows CUDA 13, found a PyTorch for CUDA 12.8"),
    ],
)
def test_another_cuda_is_a_reason_to_skip(version, reason, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", version)
    assert build.hindrance() == reason


# ---- what must be seen


@pytest.fixture(scope="session")
def wrongs(told):
    return told("wrongs", "cuda:1")


@pytest.mark.parametrize("where", ["another device", "another stream", "backwards"])
def test_an_operation_that_escapes_a_capture_is_an_error(where, wrongs):
    """Seen by the stub, and told by name where there is none, also of a backward pass in its own thread."""
    assert wrongs[where]["faults"] == ["a kernel escaped a capture"]
    device = "cuda:1" if where == "another stream" else "cuda:0"
    told = f"CaptureError: compile: found aten.add_.Tensor on {device}, beside the stream that is captured"
    assert wrongs[where]["error"].startswith(told)


def test_a_stream_that_leaves_a_capture_s_own_and_comes_back_is_part_of_it(wrongs):
    assert wrongs["a fork"]["error"] is None
    assert (wrongs["a fork"]["escaped"], wrongs["a fork"]["faults"]) == (0, [])


def test_a_value_that_is_asked_for_is_a_wait(wrongs):
    assert wrongs["a wait"]["error"] is None
    assert (wrongs["a wait"]["waits"], wrongs["a wait"]["from_device"]) == (1, 1)


def test_a_wait_is_found_before_it_breaks_a_capture(wrongs):
    told = "CaptureError: compile: found a step that waits for its device"
    assert wrongs["a wait captured"]["error"].startswith(told)
    assert wrongs["a wait captured"]["faults"] == []


@pytest.mark.parametrize("function", ["waiting", "on_another_stream", "nothing"])
def test_what_cannot_be_captured_is_carried_out_as_it_is_where_it_may_be(function, wrongs):
    found = wrongs[f"{function} falls back"]
    assert found["error"] is None
    assert found["graphs"] == 0
    (line,) = found["said"]
    assert line.startswith("compile: found ")
    assert line.endswith(", or compile=none. compile=auto goes on as compile=none here")


def test_a_copy_from_the_host_is_seen_in_a_capture(wrongs):
    assert wrongs["a copy captured"]["to_device"] > 0


def test_an_empty_graph_is_an_error(wrongs):
    assert wrongs["nothing captured"]["error"].startswith("CaptureError: compile: found a step that launches")


def test_fifty_operations_more_are_more_than_may_be(wrongs):
    assert operations(wrongs["fifty more"]) - known()["kd fixed"]["eager"] > MARGIN["eager"]


# ---- epochs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["SGD", "SGD with dampening", "AdamW", "NAdam", "Rprop", "ASGD"])
def test_these_optimizers_are_captured_and_see_each_rate(name, device, epochs):
    """A rate is read from memory, or else captured anew."""
    found = epochs(device)[name]
    assert found["error"] is None
    assert found["faults"] == []
    assert len(set(found["rates"])) == 3
    first, *later = [of_epoch["captures"] for of_epoch in found["epochs"]]
    assert first == 4  # the teacher and the student, for two batch sizes
    if found["rates_are"] == ["Tensor"]:
        assert later == [0, 0]
    else:
        assert later == [2, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["SGD", "SGD with dampening", "AdamW", "pretraining"])
def test_a_schedule_captures_nothing_anew(name, device, epochs):
    assert epochs(device)[name]["rates_are"] == ["Tensor"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_taken_while_its_device_is_the_current_one(device, epochs):
    """Else a replay would wait for the work of another one."""
    assert epochs(device)["SGD"]["current_devices"] == [DEVICES.index(device)]


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_captured_by_default_unless_an_optimizer_s_cannot_be(device, epochs):
    captured, launched = epochs(device)["auto, SGD"], epochs(device)["auto, Adagrad"]
    assert captured == epochs(device)["SGD"] | {"name": "auto, SGD"}
    assert captured["said"] == []
    assert launched["error"] is None
    assert launched["faults"] == []
    assert [of_epoch["captures"] for of_epoch in launched["epochs"]] == [2, 0, 0]  # the teacher alone
    (line,) = launched["said"]
    assert line.startswith("optimizer._target_: found Adagrad, whose steps cannot be captured; expected")
    assert line.endswith("or compile=none. compile=auto goes on as compile=none here")


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_step_behind_a_saved_state_reads_that_one_s_rate(device, epochs):
    assert epochs(device)["resumed rate"]["filled"] == [0.002]


@pytest.mark.parametrize("device", DEVICES)
def test_a_pretraining_is_captured_too(device, epochs):
    found = epochs(device)["pretraining"]
    assert found["error"] is None
    assert found["faults"] == []
    assert len(set(found["rates"])) == 3
    assert [of_epoch["captures"] for of_epoch in found["epochs"]] == [0, 2, 0]  # it has one step an epoch


@pytest.mark.parametrize("device", DEVICES)
def test_an_optimizer_that_cannot_be_captured_is_refused_before_anything_is_trained(device, epochs):
    refused = epochs(device)["Adagrad"]["error"]
    assert refused.startswith(
        "ConfigError: optimizer._target_: found Adagrad, whose steps cannot be captured"
    )
    assert epochs(device)["left by Adagrad"]["files"] == []


@pytest.mark.parametrize("device", DEVICES)
def test_images_in_files_are_pinned_while_steps_are_captured(device, epochs):
    found = epochs(device)
    assert found["files"]["error"] is None
    assert found["files"]["faults"] == []
    assert [of_epoch["captures"] for of_epoch in found["files"]["epochs"]] == [4, 0]
    pinned = found["a thread that pins"]
    assert pinned["error"] is None
    assert pinned["ours"]["captures"] == pinned["global"]["captures"] == 1
    assert pinned["ours"]["faults"] == []
    assert pinned["global"]["faults"] == ["cudaHostAlloc during a capture by another thread"]


# ---- benchmarks


@pytest.fixture(scope="session")
def benchmarked(told, shared):
    return lambda device: told("benchmarked", device, str(shared / f"benchmarked-{device}"))


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_a_captured_step_has_for_itself_counts_as_its_peak(device, benchmarked):
    """A replay allocates nothing: what it works in was allocated when it was captured."""
    found = benchmarked(device)
    assert found["none"]["error"] is found["graph"]["error"] is None
    assert found["graph"]["peak_mb"] >= found["none"]["peak_mb"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("part", "rows"), [("steps", 8), ("epochs", 8), ("cohorts", 5)])
def test_what_is_measured_on_a_gpu_is_whole(part, rows, device, benchmarked):
    found = benchmarked(device)[part]
    assert found["error"] is None
    assert [row["note"] for row in found["rows"]] == [""] * rows


# ---- a whole run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", COMPILED)
def test_a_run_with_a_pretraining_is_interrupted_and_goes_on(how, device, told, shared):
    found = told("run", device, COMPILED[how], str(shared / f"runs-{how}-{device}"))
    assert [record["error"] for record in found.values()] == [None] * 3
    assert found["interrupted"]["epochs"] == [1]
    assert "last.pt" in found["interrupted"]["files"]
    assert "result.json" not in found["interrupted"]["files"]
    resumed = found["resumed"]
    assert_no_fault(resumed)
    assert resumed["epochs"] == [1, 2, 3]
    assert {"result.json", "student.safetensors"} <= set(resumed["files"])
    assert resumed["captures"] == (4 if how == "captured" else 0)
    assert resumed["result"]["pretraining"] is not None
    assert found["finished"]["result"] == resumed["result"]
