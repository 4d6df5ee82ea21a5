"""The same on a CUDA device: it trains, resumes, sees the CPU's batches, and a step never waits for the
device."""

from functools import partial

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from sakd.data import Augmentation, Dataset, ImageSet, RandAugment, View, train_batches
from sakd.distillers import (
    AFD,
    AT,
    CATKD,
    CC,
    CRD,
    CTKD,
    DIST,
    DKD,
    FSP,
    FT,
    KD,
    MLKD,
    NKD,
    NST,
    OFA,
    OFD,
    PKT,
    RKD,
    SDD,
    SP,
    VID,
    WTTM,
    FitNet,
    Matched,
    ReviewKD,
    SemCKD,
    VkD,
)
from sakd.networks import resnet8, wrn_16_1
from sakd.networks.folded import cast_weights
from sakd.networks.fused import FusedConv2d, fuse_activations
from sakd.process import quickest_convolutions, tf32
from sakd.spots import Adaptive, Fixed, Soft, frozen_alias
from sakd.streams import initialising, stream
from sakd.training import Cohort, Execution, Teacher, Trainer, spots_of
from sakd.training.execution import Branch
from sakd.training.graphs import tensors_of
from tests.conftest import fit, take_step

GRAPH = Execution("fp32", "channels_last", "graph", fold_batch_norm=True)
IN_BFLOAT16 = Execution("bf16", "channels_last", "graph", fold_batch_norm=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _as_in_a_run_in_float32():
    """PyTorch rounds convolutions to TensorFloat-32 unless it is told not to."""
    with tf32(False), quickest_convolutions():
        yield


def dataset() -> Dataset:
    noise = stream(0, "test")
    images = torch.randint(0, 256, (200, 1, 8, 8), generator=noise, dtype=torch.uint8)
    part = ImageSet(images, torch.randint(0, 10, (200,), generator=noise))
    return Dataset(part, part, None, 10, 8, (0.5,), (0.25,), Augmentation(crop_padding=2, flip=True))


LEARNED = {"adaptive": Adaptive, "soft": Soft}


def trainer(
    mode: str,
    execution: Execution = Execution(),  # noqa: B008, immutable
    taught_by: Teacher | None = None,
    seed: int = 0,
) -> Trainer:
    with initialising(seed, "parts"):
        student, teacher = resnet8(10, 1, 8), wrn_16_1(10, 1, 8)
        distillers = {
            "kd": KD(student, teacher, "logits", 1.0, 4.0),
            "fitnet": FitNet(student, teacher, "hint", 1.0),
            "at": AT(student, teacher, "stages", 10.0),
            "sp": SP(student, teacher, "last_stage", 10.0),
            "pkt": PKT(student, teacher, "embedding", 100.0),
            "crd": CRD(student, teacher, "embedding", 0.8, 16, 300, 0.07, 0.5),
            "dkd": DKD(
                student,
                teacher,
                "logits",
                1.0,
                target_weight=1.0,
                others_weight=8.0,
                temperature=4.0,
                ramp_epochs=2,
            ),
            "dist": DIST(
                student, teacher, "logits", 1.0, inter_weight=1.0, intra_weight=1.0, temperature=4.0
            ),
            "kd_standardised": KD(student, teacher, "logits", 1.0, 2.0, standardise=True),
            "nkd": NKD(
                student, teacher, "logits", 1.0, target_weight=1.0, others_weight=1.5, temperature=1.0
            ),
            "wttm": WTTM(student, teacher, "logits", 1.0, power=0.2),
            "ctkd": CTKD(
                student,
                teacher,
                "logits",
                1.0,
                least_temperature=1.0,
                temperature_span=20.0,
                initial_logit=1.0,
                curriculum_epochs=2,
            ),
            "reviewkd": ReviewKD(student, teacher, ["stages", "embedding"], 1.0, max_width=64, ramp_epochs=2),
            "cc": CC(student, teacher, "embedding", 0.02, embedding_width=16, teacher_embedding="learned"),
            "rkd": RKD(student, teacher, "embedding", 1.0, distance_weight=25.0, angle_weight=50.0),
            "vid": VID(student, teacher, "stages", 1.0, initial_variance=5.0),
            "nst": NST(student, teacher, "stages", 1.0),
            "fsp": FSP(student, teacher, "stages", 1.0),
            "ft": FT(student, teacher, "last_stage", 1.0, factor_share=0.5),
            "semckd": SemCKD(student, teacher, "stages", 1.0, batch_size=64, reduction=4, widening=0.5),
            "afd": AFD(student, teacher, "stages", 1.0, width=16),
            "catkd": CATKD(student, teacher, "last_stage", 1.0, size=2, normalised=True),
            "matched": Matched(student, teacher, "stages", 1.0, matching="reversed"),
            "ofa": OFA(student, teacher, ["stages", "logits"], 1.0, temperature=1.0, exponent=1.0),
            "ofd": OFD(student, teacher, "stages", 1e-3),
            "sdd": SDD(
                student, teacher, "logits", 1.0, temperature=4.0, sizes=[1, 2], complementary_weight=2.0
            ),
            "vkd": VkD(student, teacher, "embedding", 1.0),
            "mlkd": MLKD(
                student,
                teacher,
                "logits",
                1.0,
                temperatures=[3.0, 4.0],
                view_temperatures=[4.0],
                views=[View(RandAugment(2, 10), 0.5)],
            ),
        }
        spots = spots_of(student, teacher, distillers.values())
        spot_mode = Fixed(spots, student, teacher)
        if mode in LEARNED:
            spot_mode = LEARNED[mode](
                spots, student, teacher, 5.0, 2.0, same_family_bias=10.0, other_family_bias=0.0
            )
    sgd = partial(SGD, lr=0.01, momentum=0.9)
    falling = partial(MultiStepLR, milestones=[2], gamma=0.1)
    return Trainer(
        student,
        taught_by or Teacher(teacher, device="cuda", execution=execution),
        distillers,
        spot_mode,
        optimizer=sgd,
        policy_optimizer=sgd,
        schedule=falling,
        seed=seed,
        device="cuda",
        execution=execution,
    )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("mode", ["fixed", *LEARNED])
def test_a_step_never_waits_for_the_device(mode):
    part = dataset().to(torch.device("cuda"))
    batches = list(train_batches(part, 64, stream(0, "data")))
    trained = trainer(mode)
    trained.prepare(part)
    take_step(trained, *batches[0])  # first calls set up what is kept
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches[1:]:
            take_step(trained, *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_it_trains_and_a_loaded_state_goes_on(mode):
    whole, first, second = trainer(mode), trainer(mode), trainer(mode)
    *_, expected = fit(whole, dataset(), 3, 64)
    fit(first, dataset(), 2, 64)
    second.prepare(dataset())
    second.load_state_dict(first.state_dict())
    *_, found = fit(second, dataset(), 3, 64)
    assert found["epoch"] == expected["epoch"] == 3
    assert found["loss/task"] == pytest.approx(expected["loss/task"], rel=0.05)


def test_every_device_sees_the_same_batches():
    on_cpu = train_batches(dataset(), 64, stream(0, "data", 1))
    on_gpu = train_batches(dataset().to(torch.device("cuda")), 64, stream(0, "data", 1))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(b.images.cpu(), a.images)
        assert torch.equal(b.indices.cpu(), a.indices)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_order_of_memory_is_what_is_quicker_in_a_precision(precision):
    image = torch.zeros(1, 3, 4, 4, device="cuda")
    order = torch.contiguous_format if precision == "fp32" else torch.channels_last
    assert Execution(precision, "auto").arrange(image).is_contiguous(memory_format=order)


@pytest.mark.parametrize("mode", ["fixed", *LEARNED])
def test_a_replayed_graph_takes_the_steps_that_are_launched_one_by_one(mode):
    """Also for the smaller last batch, and once the learning rates have fallen."""
    eager, graphed = trainer(mode), trainer(mode, Execution(compile="graph"))
    expected, found = (fit(made, dataset(), 3, 64) for made in (eager, graphed))
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name.startswith(("loss/", "lr/")):
                assert other[name] == pytest.approx(one[name], rel=0.02, abs=1e-4), name


def test_a_cohort_of_graphs_takes_the_steps_of_each_alone():
    """Members replay on streams of their own, behind the teacher's; also for the smaller last batch."""
    execution = Execution(compile="graph")
    alone = {mode: trainer(mode, execution) for mode in ("fixed", "adaptive")}
    expected = {mode: fit(made, dataset(), 2, 64)[-1] for mode, made in alone.items()}
    teacher = alone["fixed"].teacher
    members = {mode: trainer(mode, execution, teacher) for mode in alone}
    found = dict(Cohort(teacher, members).fit(dataset(), 2, 64))
    for mode, measured in expected.items():
        for name in measured:
            if name.startswith("loss/"):
                assert found[mode][name] == pytest.approx(measured[name], rel=0.02, abs=1e-4), (mode, name)


@pytest.mark.parametrize("execution", [GRAPH, IN_BFLOAT16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_with_a_branch_is_the_step_on_one_stream(seed, execution):
    """Bit for bit over fifty captured steps and more: nothing is read before it is written, or after."""
    states = []
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        for apart in (True, False, True):
            made = trainer("adaptive", execution, seed=seed)
            assert made.policy_branch.stream is not None
            made.policy_branch = Branch(made.device, apart)
            fit(made, dataset(), 13, 64)
            states.append(list(tensors_of(made.state_dict())))
    one_stream = states.pop(1)
    for branched in states:
        for found, expected in zip(branched, one_stream, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_convolutions_compute_what_they_do_one_by_one(order, kind):
    with initialising(0, "fused"):
        network = resnet8(10, 3, 16).eval().to("cuda", memory_format=order)
    images = torch.linspace(-2, 2, 64 * 3 * 16 * 16, device="cuda").sin().reshape(64, 3, 16, 16)
    images = images.contiguous(memory_format=order).requires_grad_()
    found = []
    for fused in (True, False):
        alias = frozen_alias(network, fold=True)
        cast_weights(alias, kind)
        if fused:
            fuse_activations(alias)
        assert sum(isinstance(module, FusedConv2d) for module in alias.modules()) == 7 * fused
        with torch.autocast("cuda", kind, enabled=kind is torch.bfloat16):
            features = list(alias.features(images).values())
        loss = sum(map_.float().square().mean() for map_ in features)
        found.append([*features, *torch.autograd.grad(loss, images)])
    share = 1e-3 if kind is torch.float32 else 0.3  # of gradients: rounding turns a ReLU on or off
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= share * other.norm()


def test_networks_in_bfloat16_learn_as_in_float32():
    expected, found = (
        fit(trainer("adaptive", Execution(precision, "auto")), dataset(), 3, 64)
        for precision in ("fp32", "bf16")
    )
    for one, other in zip(expected, found, strict=True):
        assert other["loss/task"] == pytest.approx(one["loss/task"], rel=0.1)
