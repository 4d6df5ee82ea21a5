"""CRD: the loss held against loops over rows and negatives, its banks, its constants, its draws, and what it
never builds."""

from types import SimpleNamespace

import pytest
import torch

from sakd.distillers import CRD, crd
from sakd.errors import ConfigError
from sakd.networks import resnet8, resnet8x4
from tests.test_distillers import BATCH, INDICES, KEEPS, LargestTensor, close, features

LABELS = torch.tensor([3, 0, 0, 1, 3, 0, 1, 0, 0, 4, 0, 1])  # uneven, and none of class 2
WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 7, 11, 0.07, 0.3
BANKS = ("student_banks", "teacher_banks")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(labels=LABELS, dtype=torch.float64, **keys):
    """A prepared CRD between a narrow student and a wide teacher."""
    keys = {
        "embedding_width": WIDTH,
        "negatives": NEGATIVES,
        "temperature": TEMPERATURE,
        "momentum": MOMENTUM,
    } | keys
    distiller = CRD(resnet8(5, 1, 8), resnet8x4(5, 1, 8), "embedding", 1.0, **keys).to(dtype)
    distiller.prepare(labels, 5, torch.Generator().manual_seed(1))
    return distiller


def bank_of(distiller, banks):
    return getattr(distiller, banks)["embedding"]


def snapshot(distiller):
    """Both banks' entries and constants, and the samples that the next step will draw."""
    state = distiller.stream.get_state()
    samples = torch.cat([INDICES[:, None], distiller.draw_negatives(INDICES)], 1)
    distiller.stream.set_state(state)
    student, teacher = (bank_of(distiller, banks) for banks in BANKS)
    constants = {"z_student": student.log_z.exp(), "z_teacher": teacher.log_z.exp()}
    entries = {"student": student.embeddings.clone(), "teacher": teacher.embeddings.clone()}
    return SimpleNamespace(samples=samples, **entries, **constants)


def step(distiller, student, teacher, keep):
    return distiller.spot_loss(distiller.spots[0], student, teacher, keep, INDICES)


def embedded(linear, rows):
    flat = [linear.weight @ row + linear.bias for row in rows]
    return torch.stack([e / (e**2).sum().sqrt() for e in flat])


def plain_scores(anchors, bank, samples):
    return [
        [((a * bank[j]).sum() / TEMPERATURE).exp() for j in own]
        for a, own in zip(anchors, samples, strict=True)
    ]


def plain_z(scores, n):
    flat = [score.detach() for row in scores for score in row]
    return n * sum(flat) / len(flat)


def plain_contrast(scores, z, n):
    noise = NEGATIVES / n
    loss = 0
    for positive, *negatives in scores:
        loss -= (positive / z / (positive / z + noise)).log()
        for negative in negatives:
            loss -= (noise / (negative / z + noise)).log()
    return loss / len(scores)


@pytest.mark.parametrize("kept", ["all", "some", "one"])
def test_two_steps_are_the_published_loss_on_the_kept_rows(kept):
    distiller, keep = build(), torch.tensor(KEEPS[kept])
    z_student = z_teacher = None
    for _ in range(2):  # the first fixes Z and moves the banks
        before = snapshot(distiller)
        f_s, f_t = features(distiller)
        learned = [f_s, *distiller.parameters()]
        assert len(learned) == 5
        loss = step(distiller, f_s, f_t, keep)
        e_s = embedded(distiller.embed_student["embedding"], f_s[keep])
        e_t = embedded(distiller.embed_teacher["embedding"], f_t[keep])
        by_student = plain_scores(e_s, before.teacher, before.samples[keep])
        by_teacher = plain_scores(e_t, before.student, before.samples[keep])
        if z_student is None:
            z_teacher, z_student = plain_z(by_student, 12), plain_z(by_teacher, 12)
        published = plain_contrast(by_student, z_teacher, 12) + plain_contrast(by_teacher, z_student, 12)
        expected = int(keep.sum()) / BATCH * published
        close(loss, expected)
        for found, wanted in zip(
            torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True
        ):
            close(found, wanted)


@pytest.mark.parametrize("kept", KEEPS)
def test_banks_move_at_the_kept_rows_alone(kept):
    distiller, keep = build(), torch.tensor(KEEPS[kept])
    before = snapshot(distiller)
    f_s, f_t = features(distiller)
    step(distiller, f_s, f_t, keep)
    for name, rows, linear in (
        ("student", f_s, distiller.embed_student["embedding"]),
        ("teacher", f_t, distiller.embed_teacher["embedding"]),
    ):
        expected = getattr(before, name)
        for index, embedding, is_kept in zip(INDICES, embedded(linear, rows).detach(), keep, strict=True):
            if is_kept:
                mixed = MOMENTUM * expected[index] + (1 - MOMENTUM) * embedding
                expected[index] = mixed / (mixed**2).sum().sqrt()
        found = bank_of(distiller, f"{name}_banks").embeddings
        close(found, expected)
        untouched = torch.ones(12, dtype=torch.bool).index_fill_(0, INDICES[keep], False)
        assert torch.equal(found[untouched], expected[untouched])
        assert not found.requires_grad


def test_banks_are_moved_in_place():
    distiller = build()
    buffers = {name: buffer.data_ptr() for name, buffer in distiller.named_buffers()}
    step(distiller, *features(distiller), torch.tensor(KEEPS["some"]))
    assert {name: buffer.data_ptr() for name, buffer in distiller.named_buffers()} == buffers


def test_steps_before_the_first_kept_row_leave_everything_as_it_is_and_the_next_fixes_z_for_good():
    distiller = build()
    start = {name: value.clone() for name, value in distiller.state_dict().items()}
    for _ in range(2):
        f_s, f_t = features(distiller)
        loss = step(distiller, f_s, f_t, torch.tensor(KEEPS["none"]))
        gradients = torch.autograd.grad(loss, [f_s, *distiller.parameters()])
        assert loss == 0
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, start[name]), name
    step(distiller, *features(distiller), torch.tensor(KEEPS["one"]))
    fixed = snapshot(distiller)
    for kept in ("all", "none"):
        step(distiller, *features(distiller), torch.tensor(KEEPS[kept]))
    after = snapshot(distiller)
    assert fixed.z_student == after.z_student != 1
    assert fixed.z_teacher == after.z_teacher != 1


def test_negatives_are_uniform_over_the_samples_of_other_classes():
    distiller = build(negatives=20_000)
    drawn = distiller.draw_negatives(INDICES)
    assert drawn.shape == (BATCH, 20_000)
    for index, row in zip(INDICES, drawn, strict=True):
        others = LABELS[index] != LABELS
        counts = row.bincount(minlength=12)
        assert (counts[~others] == 0).all()
        expected, freedom = 20_000 / int(others.sum()), int(others.sum()) - 1
        chi_square = float(((counts[others] - expected) ** 2 / expected).sum())
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    assert (drawn[3] != drawn[4]).any(), "two samples of class 0 draw their own"
    assert (distiller.draw_negatives(INDICES) != drawn).any(), "every step draws anew"


def test_draws_come_from_the_distillers_stream_alone_and_do_not_depend_on_what_is_kept():
    distiller = build()
    start = {name: value.clone() for name, value in distiller.state_dict().items()}
    f_s, f_t = features(distiller)
    losses = []
    for seed, kept in enumerate(("all", "none")):
        torch.manual_seed(seed)
        distiller.stream.manual_seed(1)
        step(distiller, f_s, f_t, torch.tensor(KEEPS[kept]))
        distiller.load_state_dict(start)
        losses.append(step(distiller, f_s, f_t, torch.tensor(KEEPS["some"])))
    assert losses[0] == losses[1]


def test_a_loaded_state_goes_on_with_banks_and_constants():
    whole, loaded = build(), build()
    step(whole, *features(whole), torch.tensor(KEEPS["some"]))
    state = whole.state_dict()
    names = {f"{banks}.embedding.{part}" for banks in BANKS for part in ("embeddings", "log_z", "z_is_fixed")}
    names |= {
        f"embed_{network}.embedding.{part}"
        for network in ("student", "teacher")
        for part in ("weight", "bias")
    }
    assert set(state) == names
    loaded.load_state_dict(state)
    loaded.stream.set_state(whole.stream.get_state())
    f_s, f_t = features(whole)
    keep = torch.tensor(KEEPS["all"])
    assert step(whole, f_s, f_t, keep) == step(loaded, f_s, f_t, keep)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in whole.state_dict().items())


def test_banks_start_uniform_with_an_expected_length_of_one():
    bank = bank_of(build(embedding_width=128), "student_banks").embeddings
    bound = (3 / 128) ** 0.5
    assert bank.shape == (12, 128)
    assert bank.abs().max() <= bound
    close_to = {"rel": 0.1}
    assert float(bank.abs().mean()) == pytest.approx(bound / 2, **close_to)
    assert float(bank.square().sum(1).mean()) == pytest.approx(1, **close_to)
    assert abs(float(bank.mean())) < 0.1 * bound


@pytest.mark.parametrize(("products", "largest"), [(2**24, BATCH * 600), (2 * 600, 600 * 5)])
def test_no_tensor_is_larger_than_batch_by_bank_or_the_bank(products, largest, monkeypatch):
    labels = torch.arange(600) % 5
    whole, watched = (build(labels, embedding_width=5, negatives=400) for _ in range(2))
    watched.load_state_dict(whole.state_dict())
    f_s, f_t = features(whole)
    keep = torch.tensor(KEEPS["some"])
    expected = torch.autograd.grad(step(whole, f_s, f_t, keep), f_s)
    monkeypatch.setattr(crd, "PRODUCTS", products)
    with LargestTensor() as seen:
        found = torch.autograd.grad(step(watched, f_s, f_t, keep), f_s)
    close(*found, *expected)
    assert 0 < seen.numel <= largest < BATCH * 401 * 5


def test_autocast_changes_no_bit():
    distillers = build(dtype=torch.float32), build(dtype=torch.float32)
    distillers[1].load_state_dict(distillers[0].state_dict())
    f_s, f_t = features(distillers[0], dtype=torch.float32)
    keep = torch.tensor(KEEPS["some"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = step(distillers[0], f_s, f_t, keep)
    loss = step(distillers[1], f_s, f_t, keep)
    assert torch.equal(cast, loss)
    assert torch.equal(*(torch.autograd.grad(value, f_s)[0] for value in (cast, loss)))


def test_a_very_low_temperature_gives_finite_numbers():
    distiller = build(dtype=torch.float32, temperature=0.001)  # exp(1 / 0.001) is none
    f_s, f_t = features(distiller, dtype=torch.float32)
    for kept in ("none", "some", "all"):
        loss = step(distiller, f_s, f_t, torch.tensor(KEEPS[kept]))
        assert loss.isfinite()
        assert torch.autograd.grad(loss, f_s)[0].isfinite().all()
    assert all(value.isfinite().all() for value in distiller.state_dict().values())


def test_a_training_set_of_one_class_is_refused():
    with pytest.raises(
        ConfigError, match="found 12 training samples, all of class 3; expected at least two classes"
    ):
        build(torch.full((12,), 3))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("embedding_width", value) for value in (0, 1.5)),
        *(("negatives", value) for value in (0, True)),
        *(("temperature", value) for value in (0, None)),
        *(("momentum", value) for value in (-0.1, 1, "0.5")),
    ],
)
def test_a_key_without_sense_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"{key} of CRD: found {value!r}"):
        build(**{key: value})
