"""How a step is carried out changes its speed, and its numbers by rounding at most; profiles; certificates
that are kept."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from sakd.configuration import build, digest, prerequisites
from sakd.data import train_batches
from sakd.errors import CaptureError, ConfigError, RunError
from sakd.process import tf32
from sakd.runs import Run, certificates
from sakd.runs.job import execute
from sakd.streams import stream
from sakd.training import Execution, Trainer, unchanged
from tests.conftest import light, other_family, take_step
from tests.test_resume import assert_same

CPU = torch.device("cpu")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def ready(config):
    """A trainer that may step, and its batches."""
    dataset = build.dataset(config)
    trainer = build.trainer(config, build.parts(config), CPU)
    trainer.prepare(dataset)
    return trainer, list(train_batches(dataset, 16, stream(0, "data", 1)))


def small(tiny, distiller, *overrides):
    teacher = f"teacher={other_family(distiller)}"
    return tiny(f"distiller={distiller}", teacher, *light(distiller), "dataset.train_samples=40", *overrides)


@pytest.mark.parametrize("distiller", ["at", "crd", "ft", "reviewkd", "semckd", "sp"])
def test_the_order_of_memory_changes_numbers_by_rounding_alone(distiller, tiny):
    measured = {}
    for order in ("contiguous", "channels_last"):
        trainer, batches = ready(small(tiny, distiller, f"memory_format={order}", "fold_batch_norm=false"))
        measured[order] = take_step(trainer, *batches[0])
        weight = trainer.student.stage2[0].conv1.weight
        assert weight.is_contiguous(memory_format=FORMATS[order])
        assert trainer.routed_student.stage2[0].conv1.weight.data_ptr() == weight.data_ptr()
    image = torch.zeros(1, 3, 4, 4)
    assert Execution("fp32", "auto").arrange(image).is_contiguous(memory_format=torch.channels_last)
    for name, value in measured["contiguous"].items():
        assert_close(measured["channels_last"][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("distiller", ["at", "crd"])
def test_nothing_that_a_policy_s_step_reads_is_written_beside_it(distiller, tiny, monkeypatch):
    """In a captured step it is a branch, which may run at any time between its fork and its join."""
    trainer, batches = ready(small(tiny, distiller))
    read = [*trainer.student.parameters(), *trainer.student.buffers(), *trainer.spot_mode.parameters()]
    writes = []

    def note():
        writes.append([tensor._version for tensor in read])
        return nullcontext()

    for call in ("fork", "launching"):
        monkeypatch.setattr(trainer.policy_branch, call, note)
    take_step(trainer, *batches[0])
    forked, launched = writes
    assert forked == launched
    assert [tensor._version for tensor in read] != forked


def test_no_way_of_computing_is_part_of_a_run_s_identity_but_precision_is(tiny):
    usual = digest(tiny())
    others = ("memory_format=contiguous", "fold_batch_norm=false", "compile=default", "profile=true")
    others += ("compile=none", "compile=graph", "compile=auto")
    assert {digest(tiny(other)) for other in others} == {usual}
    assert digest(tiny("precision=bf16")) != usual
    assert digest(prerequisites(tiny("precision=bf16")).teacher) == digest(prerequisites(tiny()).teacher)


def test_bfloat16_is_for_the_networks_alone(tiny):
    config = tiny("precision=bf16", "distiller=at")
    trainer, (batch, *_) = ready(config)
    seen = []
    trainer.student.stage1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    measured = take_step(trainer, *batch)
    assert seen == [torch.bfloat16]
    assert {value.dtype for name, value in measured.items() if name.startswith("loss/")} == {torch.float32}
    for module in (trainer.student, trainer.distillers, trainer.spot_mode):
        assert all(value.dtype != torch.bfloat16 for value in module.state_dict().values())
    exact, (batch, *_) = ready(tiny("distiller=at"))
    expected = take_step(exact, *batch)
    assert measured["loss/task"] != expected["loss/task"]
    assert_close(measured["loss/task"], expected["loss/task"], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=fp8", "precision: found 'fp8', expected one of fp32, tf32, bf16, fp16"),
        ("teacher.training.precision=bf32", "teacher.training.precision: found 'bf32'.*Did you mean"),
        ("memory_format=channel_last", "memory_format: found 'channel_last'.*Did you mean 'channels_last'"),
        ("compile=graphs", "compile: found 'graphs'.*Did you mean 'graph'"),
        ("fold_batch_norm=1", "fold_batch_norm: found 1, expected true or false"),
        ("profile=2", "profile: found 2, expected true or false"),
    ],
)
def test_a_wrong_choice_is_named(override, message, tiny):
    with pytest.raises(ConfigError, match=message):
        tiny(override)


def test_a_graph_on_the_cpu_is_refused_before_anything_is_trained(tiny):
    config = tiny("compile=graph", "device=cpu")
    with pytest.raises(ConfigError, match="compile: found graph, which is for CUDA"):
        execute(config)
    assert not Run(config).folder.parent.exists()


def test_steps_are_captured_by_default_on_cuda_alone(tiny):
    execution = build.execution(tiny())
    assert execution.captures_on(torch.device("cuda:1"))
    assert not execution.captures_on(CPU)
    trainer, _ = ready(tiny())
    assert not trainer.captured


@pytest.mark.parametrize("distiller", ["fitnet", "crd", "vid", "dkd"])
def test_what_a_capture_tries_leaves_the_training_as_it_was_bit_for_bit(distiller, tiny):
    """Captures themselves need a GPU; what they try, and how it is put back, does not."""
    trainer, batches = ready(small(tiny, distiller, "spot_mode.other_family_bias=0.5"))
    untouched, _ = ready(small(tiny, distiller, "spot_mode.other_family_bias=0.5"))
    first, *others = batches
    take_step(trainer, *first)
    take_step(untouched, *first)
    before = deepcopy(trainer.state_dict())
    with unchanged(trainer.state_dict, list(trainer.streams.values()), CPU):
        for batch in batches:
            take_step(trainer, *batch)
        tried = trainer.state_dict()["student"]["logits.weight"]
        assert not torch.equal(tried, before["student"]["logits.weight"])
    assert_same(trainer.state_dict(), before)
    for batch in others:
        found, expected = take_step(trainer, *batch), take_step(untouched, *batch)
        assert_same(found, expected)
    assert_same(trainer.state_dict(), untouched.state_dict())


def test_what_an_optimizer_adds_at_its_first_step_cannot_be_captured(tiny):
    """Momentum that is put back to zero would not be what the first step leaves, with dampening for one."""
    trainer, batches = ready(small(tiny, "kd"))
    with (
        pytest.raises(CaptureError, match="adds to its state after the first step"),
        unchanged(trainer.state_dict, list(trainer.streams.values()), CPU),
    ):
        take_step(trainer, *batches[0])


@pytest.mark.slow
@pytest.mark.parametrize("distiller", ["fitnet", "pkt"])
def test_compiled_networks_give_the_same_numbers_but_for_rounding(distiller, tiny):
    eager, batches = ready(tiny(f"distiller={distiller}", "dataset.train_samples=32"))
    compiled, _ = ready(tiny(f"distiller={distiller}", "dataset.train_samples=32", "compile=default"))
    for batch in batches[:2]:
        expected, found = take_step(eager, *batch), take_step(compiled, *batch)
        for name, value in expected.items():
            assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.slow
def test_a_profile_opens_as_a_trace_and_changes_no_number(tiny, tmp_path):
    plain = tiny("epochs=1", "batch_size=8")
    execute(plain)
    profiled = tiny("epochs=1", "batch_size=8", f"runs={tmp_path}/profiled", "profile=true")
    execute(profiled)
    folder = Run(profiled).folder
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 10
    assert any("convolution" in event.get("name", "") for event in events)
    rows = [
        line
        for line in (folder / "profile.txt").read_text().splitlines()
        if "aten::" in line or "Optimizer" in line
    ]
    assert 5 <= len(rows) <= 10
    assert Run(profiled).weights.read_bytes() == Run(plain).weights.read_bytes()


@pytest.fixture
def evaluations(monkeypatch):
    """How often a teacher was evaluated."""
    calls = []
    original = certificates.evaluate
    monkeypatch.setattr(certificates, "evaluate", lambda *arguments: calls.append(1) or original(*arguments))
    return calls


def test_a_teacher_is_evaluated_once_for_all_its_students(tiny, evaluations):
    first = execute(tiny("epochs=1", "teacher.training.epochs=1"))
    second = execute(tiny("epochs=1", "teacher.training.epochs=1", "seed=1"))
    assert len(evaluations) == 1
    assert first["teacher"] == second["teacher"]


def test_each_step_and_certificate_has_its_own_precision_whatever_ran_before(tiny, monkeypatch):
    """A student in TF32 whose teacher is trained and measured first, then one in float32 that finds it.

    All by the convolutions that are the quickest on a GPU.
    """
    seen, backends = [], (torch.backends.cuda.matmul, torch.backends.cudnn)

    def watch(of: object, name: str, what: Callable[..., str]) -> None:
        original = getattr(of, name)

        def watched(*arguments: object) -> object:
            allowed = (backend.allow_tf32 for backend in backends)
            entry = (what(*arguments), *allowed, torch.backends.cudnn.benchmark)
            if seen[-1:] != [entry]:
                seen.append(entry)
            return original(*arguments)

        monkeypatch.setattr(of, name, watched)

    watch(certificates, "evaluate", lambda *_: "certificate")
    watch(Trainer, "train_step", lambda trainer, *_: "teacher" if trainer.teacher is None else "student")
    keys = ("epochs=1", "batch_size=64", "spot_mode=fixed")
    with tf32(True):
        execute(tiny(*keys, "precision=tf32"))
        execute(tiny(*keys))
        assert all(backend.allow_tf32 for backend in backends)
    assert not torch.backends.cudnn.benchmark
    assert seen == [
        ("teacher", False, False, True),
        ("certificate", False, False, True),
        ("student", True, True, True),
        ("student", False, False, True),
    ]


def test_other_test_images_or_weights_are_evaluated_anew(tiny, evaluations):
    results = [
        execute(tiny("epochs=1", *overrides))
        for overrides in (
            ("teacher.training.epochs=1",),
            ("teacher.training.epochs=1", "dataset.test_samples=50"),
            ("teacher.training.epochs=2",),
        )
    ]
    assert len(evaluations) == 3
    assert len({result["teacher"]["accuracy"] for result in results}) > 1


def test_a_damaged_certificate_is_named(tiny, tmp_path):
    execute(tiny("epochs=1", "teacher.training.epochs=1"))
    (kept,) = (tmp_path / "runs/.certificates").glob("*.json")
    kept.write_text(kept.read_text()[:10])
    with pytest.raises(RunError, match=f"{kept}: found no valid JSON"):
        execute(tiny("epochs=1", "teacher.training.epochs=1", "seed=1"))
