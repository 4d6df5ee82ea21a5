"""FT's paraphraser and FSP's initialisation: plain formulas, what they train, who shares them, kills, and bad
input."""

import io
from copy import deepcopy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close

from sakd.configuration import build, prerequisites
from sakd.distillers import FSP, FT, KD
from sakd.errors import CheckpointError, ConfigError
from sakd.networks import resnet8, resnet8x4, resnet14, vgg8, wrn_16_1
from sakd.networks.checkpoints import read_weights
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.runs.underway import UnderWay
from sakd.training import Pretraining
from tests.conftest import fit
from tests.test_resume import KILLED, assert_same, assert_same_runs, in_a_process, sources_of

BATCH = 6
KEEPS = {
    "all": [True] * BATCH,
    "some": [True, False, True, True, False, True],
    "one": [False, False, False, True, False, False],
    "none": [False] * BATCH,
}
INDICES = torch.arange(BATCH)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(actual, expected):
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def random_features(network, dtype, **keys):
    return {name: torch.randn(BATCH, *shape, dtype=dtype, **keys) for name, shape in network.shapes.items()}


# Formulas


def plain_leaky(x):
    return torch.where(x > 0, x, 0.1 * x)


def plain_translation(layers, x):
    """Convolution, batch norm of the whole batch, leaky ReLU; three times."""
    for convolution, norm in ((layers[0], layers[1]), (layers[3], layers[4]), (layers[6], layers[7])):
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = plain_leaky(x)
    return x


def plain_encoding(layers, x):
    for convolution in (layers[0], layers[2], layers[4]):
        x = plain_leaky(F.conv2d(x, convolution.weight, convolution.bias, padding=1))
    return x


def plain_decoding(layers, x):
    for convolution in (layers[0], layers[2], layers[4]):
        x = plain_leaky(F.conv_transpose2d(x, convolution.weight, convolution.bias, padding=1))
    return x


def plain_factor(sample, size):
    """Channel mean of squares of a sample's factors [C, H, W], as a unit vector."""
    block = sample.shape[-1] // size
    small = sample.reshape(len(sample), size, block, size, block).mean((2, 4))
    flat = (small**2).mean(0).flatten()
    return flat / flat.norm()


FT_CASES = {
    "equal": (resnet14, "last_stage"),
    "channels-differ": (resnet8x4, "last_stage"),
    "larger-teacher-map": (resnet8x4, "stage2:stage1"),
    "larger-student-map": (resnet8x4, "stage2:stage3"),
}


@pytest.mark.parametrize("kept", KEEPS)
@pytest.mark.parametrize("case", FT_CASES)
def test_ft_is_the_kept_share_of_the_difference_of_factors_on_the_kept_rows(case, kept):
    teacher, where = FT_CASES[case]
    distiller = FT(resnet8(10, 1, 8), teacher(10, 1, 8), where, 1.0, factor_share=0.5).double()
    (spot,) = distiller.spots
    f_s = torch.randn(BATCH, *spot.student_shape, dtype=torch.float64).requires_grad_()
    f_t = torch.randn(BATCH, *spot.teacher_shape, dtype=torch.float64)
    keep = torch.tensor(KEEPS[kept])
    loss = distiller.spot_loss(spot, f_s, f_t, keep, INDICES)
    translator = list(distiller.translators[spot.name])
    translated = plain_translation(translator, f_s)
    factors = plain_encoding(list(distiller.paraphrasers[spot.teacher].encoder), f_t)
    assert factors.shape[1] == spot.teacher_shape[0] // 2
    size = min(translated.shape[-1], factors.shape[-1])
    rows = [
        (plain_factor(translated[i], size) - plain_factor(factors[i], size)).abs().mean()
        for i in range(BATCH)
        if keep[i]
    ]
    expected = sum(rows) / BATCH if rows else 0 * f_s.sum()
    close(loss, expected)
    learned = [f_s, *(parameter for parameter in distiller.translators.parameters())]
    found = torch.autograd.grad(loss, learned)
    wanted = torch.autograd.grad(expected, learned, allow_unused=True)
    for gradient, plain in zip(found, wanted, strict=True):
        close(gradient, torch.zeros_like(gradient) if plain is None else plain)
    if kept == "none":
        assert loss == 0


def test_the_paraphraser_learns_to_give_back_the_teachers_maps():
    distiller = FT(resnet8(10, 1, 8), resnet14(10, 1, 8), "last_stage", 1.0, factor_share=0.5)
    teacher = random_features(resnet14(10, 1, 8), torch.float32)
    maps = teacher["stage3"]
    paraphraser = distiller.paraphrasers["stage3"]
    again = plain_decoding(list(paraphraser.decoder), plain_encoding(list(paraphraser.encoder), maps))
    assert_close(distiller.pretraining_loss(None, None, teacher), ((again - maps) ** 2).sum() / maps.numel())


def plain_flow(lower, upper):
    """[C, H, W] and [D, H', W'] to [C, D], positions one by one."""
    size = min(lower.shape[-1], upper.shape[-1])

    def shrink(maps):
        block = maps.shape[-1] // size
        return maps.reshape(len(maps), size, block, size, block).mean((2, 4))

    lower, upper = shrink(lower), shrink(upper)
    total = 0
    for i in range(size):
        for j in range(size):
            total = total + lower[:, i, j][:, None] * upper[:, i, j][None, :]
    return total / size**2


FSP_CASES = {
    "same-family": (resnet14, 8, "stages", ["stem", "stage1", "stage2", "stage3"]),
    "different-family": (wrn_16_1, 8, "stages", ["stem", "stage1", "stage2", "stage3"]),
    "larger-teacher-maps": (wrn_16_1, 16, "stages", ["stem", "stage1", "stage2", "stage3"]),
    "listed-in-another-order": (resnet14, 8, ["stage3", "stage1"], ["stem", "stage1", "stage3"]),
    "with-the-stem": (resnet14, 8, ["stem", "stage2"], ["stem", "stage2"]),
}


@pytest.mark.parametrize("kept", KEEPS)
@pytest.mark.parametrize("case", FSP_CASES)
def test_fsp_is_the_kept_share_of_the_flows_difference_masked_by_the_upper_stage(case, kept):
    build_teacher, size, where, stages = FSP_CASES[case]
    student, teacher = resnet8(10, 1, 8), build_teacher(10, 1, size)
    distiller = FSP(student, teacher, where, 2.5)
    f_s, f_t = (
        random_features(student, torch.float64, requires_grad=True),
        random_features(teacher, torch.float64),
    )
    keep = {spot: torch.tensor(KEEPS[kept]).roll(i) for i, spot in enumerate(distiller.spots)}
    masks = {spot.student: mask for spot, mask in keep.items()}
    loss = distiller(f_s, f_t, keep, INDICES)
    expected = 0 * f_s["stem"].sum()
    for lower, upper in pairwise(stages):
        for row in range(BATCH):
            if masks[upper][row]:
                of_student, of_teacher = (plain_flow(f[lower][row], f[upper][row]) for f in (f_s, f_t))
                expected = expected + 2.5 * ((of_student - of_teacher) ** 2).mean() / BATCH
    close(loss, expected)
    maps = [f_s[stage] for stage in stages]
    found, wanted = torch.autograd.grad(loss, maps), torch.autograd.grad(expected, maps, allow_unused=True)
    for gradient, plain in zip(found, wanted, strict=True):
        close(gradient, torch.zeros_like(gradient) if plain is None else plain)
    if kept == "none":
        assert loss == 0
    assert list(distiller.pretrained(student)._modules) == student.names[: student.index(stages[-1]) + 1]


def test_flows_that_half_precision_cannot_sum_begin_a_student():
    student, teacher = resnet8(10, 1, 8), resnet14(10, 1, 8)
    distiller = FSP(student, teacher, "stages", 1.0)
    student.features = lambda images: {name: 50 * maps for name, maps in of_student.items()}
    of_student, of_teacher = random_features(student, torch.float32), random_features(teacher, torch.float32)
    keep = dict.fromkeys(distiller.spots, torch.ones(BATCH, dtype=torch.bool))
    expected = distiller.differences(student.features(None), of_teacher, keep)
    with torch.autocast("cpu", torch.float16):
        found = distiller.pretraining_loss(student, torch.zeros(BATCH, 1, 8, 8), of_teacher)
    assert_close(found, expected)


def test_the_stem_alone_has_no_flow():
    with pytest.raises(ConfigError, match="where=stem: found one stage"):
        FSP(resnet8(10, 1, 8), resnet14(10, 1, 8), "stem", 1.0)


def test_fsp_between_networks_of_other_channels_is_refused_with_the_stage_and_both_numbers():
    with pytest.raises(ConfigError, match=r"where=stages: found 16 channels in the student and 32 .* stem"):
        FSP(resnet8(10, 1, 8), resnet8x4(10, 1, 8), "stages", 1.0)
    with pytest.raises(ConfigError, match=r"found 16 channels in the student and 64 .* at stem"):
        FSP(resnet8(10, 1, 8), vgg8(10, 1, 8), "stages", 1.0)


@pytest.mark.parametrize("share", [0, -1, "half", None, 0.01])
def test_a_share_that_leaves_no_factor_is_refused(share):
    with pytest.raises(ConfigError, match=f"factor_share of FT: found {share!r}"):
        FT(resnet8(10, 1, 8), resnet14(10, 1, 8), "last_stage", 1.0, factor_share=share)


@pytest.mark.parametrize("kind", [partial(FT, factor_share=0.5), FSP])
def test_vectors_are_refused(kind):
    with pytest.raises(ConfigError, match="where=embedding"):
        kind(resnet8(10, 1, 8), resnet14(10, 1, 8), "embedding", weight=1.0)


def test_a_distiller_without_a_pretraining_says_so():
    student, teacher = resnet8(10, 1, 8), resnet14(10, 1, 8)
    kd = KD(student, teacher, "logits", 1.0, temperature=4.0)
    with pytest.raises(ConfigError, match="KD has no pretraining"):
        Pretraining(student, teacher, "kd", kd, optimizer=partial(SGD, lr=0.01))


# Runs

METHODS = {"ft": ("distiller=ft",), "fsp_init": ("distiller=fsp_init",)}


@pytest.fixture
def config(tiny):
    def composed(method, *overrides):
        return tiny(
            "teacher=resnet14", *METHODS[method], "distiller.pretraining.epochs=2", "threads=1", *overrides
        )

    return composed


def own_run(config) -> Run:
    """The pretraining's."""
    return Run(prerequisites(config).pretraining)


def pretrainings(config) -> list[str]:
    return sorted(path.name for path in Run(config).folder.parent.glob("*_pretraining-*"))


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_what_it_names_and_nothing_else(method, config):
    composed = config(method)
    execute(composed)
    own = own_run(composed).config
    parts = build.parts(own)
    before = deepcopy(parts)
    dataset = build.dataset(own)
    made = build.trainer(own, parts, torch.device("cpu"))
    first, last = fit(made, dataset, 2, 64)
    label = {"ft": "ft", "fsp_init": "fsp"}[method]
    assert last[f"loss/{label}"] < first[f"loss/{label}"]
    assert "test/accuracy" not in last
    pretrained = {id(parameter) for parameter in made.pretrained.parameters()}
    everything = (
        ("student", parts.student, before.student),
        *((n, m, before.distillers[n]) for n, m in parts.distillers.items()),
    )
    moved = set()
    for part, now, then in everything:
        for (name, parameter), old in zip(now.named_parameters(), then.parameters(), strict=True):
            changed = not torch.equal(parameter, old)
            assert changed == (id(parameter) in pretrained), name
            moved |= {f"{part}.{name.split('.')[0]}"} if changed else set()
    assert (
        moved
        == {
            "ft": {"ft.paraphrasers"},
            "fsp_init": {"student.stem", "student.stage1", "student.stage2", "student.stage3"},
        }[method]
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_run_starts_from_what_was_learned_and_records_it(method, config, monkeypatch):
    composed = config(method)
    started = []
    begin = UnderWay.begin

    def spy(self):
        parts = (self.trainer.student, self.trainer.distillers)
        started.append((self.run.name, *(deepcopy(part.state_dict()) for part in parts)))
        begin(self)

    monkeypatch.setattr(UnderWay, "begin", spy)
    result = execute(composed)
    run = own_run(composed)
    learned = read_weights(run.weights)
    assert result["pretraining"] == {"run": run.name, "sha256": run.result()["student_sha256"]}
    (student, distillers), *_ = [
        (student, distillers) for name, student, distillers in started if name == result["run"]
    ]
    if method == "ft":
        assert_same(
            {f"ft.paraphrasers.{name}": value for name, value in learned.items()},
            only(distillers, "ft.paraphrasers."),
        )
        saved = Run(composed).load_checkpoint(sources_of(result))["distillers"]
        # Not trained any further.
        assert_same(only(saved, "ft.paraphrasers."), only(distillers, "ft.paraphrasers."))
        trained, before = only(saved, "ft.translators."), only(distillers, "ft.translators.")
        assert any(not torch.equal(trained[name], before[name]) for name in trained)
    else:
        assert_same({name: value for name, value in student.items() if name in learned}, learned)


def only(state: dict, prefix: str) -> dict:
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def test_one_paraphraser_serves_every_student_mode_and_seed_of_a_teacher(config):
    for overrides in (
        ("spot_mode=fixed",),
        ("spot_mode=adaptive", "seed=1"),
        ("student=resnet14", "distiller.beta=3", "epochs=1"),
    ):
        execute(config("ft", "teacher.training.epochs=2", *overrides))
    assert len(pretrainings(config("ft"))) == 1
    execute(config("ft", "teacher.training.epochs=1"))
    assert len(pretrainings(config("ft"))) == 2


@pytest.mark.slow
def test_one_initialisation_serves_the_modes_of_a_seed(config):
    for overrides in (("spot_mode=fixed",), ("spot_mode=anti",)):
        execute(config("fsp_init", *overrides))
    assert len(pretrainings(config("fsp_init"))) == 1
    execute(config("fsp_init", "seed=1"))
    assert len(pretrainings(config("fsp_init"))) == 2


@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_from_a_saved_state_bit_for_bit(method, config):
    own = own_run(config(method)).config
    dataset = build.dataset(own)
    whole, first, second = (build.trainer(own, build.parts(own), torch.device("cpu")) for _ in range(3))
    fit(whole, dataset, 2, 64)
    fit(first, dataset, 1, 64)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.prepare(dataset)
    second.load_state_dict(torch.load(saved, weights_only=True))
    fit(second, dataset, 2, 64)
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.slow
def test_killed_in_the_pretraining_and_after_it_ends_with_the_same_bits(config, tmp_path):
    undisturbed, disturbed = config("ft", f"runs={tmp_path}/undisturbed"), config("ft")
    assert in_a_process(undisturbed) == 0
    moments = (
        ("sakd.training.pretraining:Pretraining.train_step", 2, "before"),
        ("sakd.training.pretraining:Pretraining.train_step", 5, "before"),  # in its second epoch
        ("sakd.runs:Run.finish", 1, "before"),  # trained, not stored
        ("sakd.training.trainer:Trainer.train_step", 2, "after"),  # in the student's first epoch
        ("sakd.runs:Run.save_checkpoint", 1, "after"),
    )
    assert [in_a_process(disturbed, *moment) for moment in moments] == [KILLED] * len(moments)
    assert in_a_process(disturbed) == 0
    assert_same_runs(Run(disturbed), Run(undisturbed))
    assert_same_runs(own_run(disturbed), own_run(undisturbed))


def test_a_changed_product_is_refused(config):
    execute(config("ft", "epochs=1", "teacher.training.epochs=1"))
    composed = config("ft", "epochs=1", "teacher.training.epochs=1", "seed=3")
    run = own_run(composed)
    run.weights.write_bytes(run.weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"{run.weights}: found checksum .* the file was changed"):
        execute(composed)
    assert not Run(composed).folder.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distiller.pretraining.epochs=0", "distiller.pretraining.epochs: found 0"),
        (
            "distiller.pretraining.name=fta",
            "distiller.pretraining.name: found 'fta', expected one of kd, ft.*Did you mean 'ft'",
        ),
        ("~distiller.pretraining.optimizer", "distiller.pretraining.optimizer: found nothing"),
        ("+distiller.pretraining.epoch=3", "distiller.pretraining.epoch: .*Did you mean 'epochs'"),
        ("distiller.pretraining=soon", "distiller.pretraining: found 'soon'"),
    ],
)
def test_a_wrong_key_is_named(override, message, tiny):
    with pytest.raises(ConfigError, match=message):
        tiny("distiller=ft", override)


def test_a_wrong_optimizer_of_the_pretraining_is_found_before_the_teacher_trains(config):
    composed = config("ft", "+distiller.pretraining.optimizer.lrr=3")
    with pytest.raises(ConfigError, match=r"optimizer\.lrr: no such key"):
        execute(composed)
    assert not Run(composed).folder.parent.exists()
