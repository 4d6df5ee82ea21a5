"""Some methods' losses begin small and count in full after some epochs."""

import io

import pytest
import torch

from sakd.configuration import build
from sakd.distillers import DKD
from sakd.networks import resnet8, resnet14
from tests.conftest import fit


def dkd(ramp_epochs):
    distiller = DKD(
        resnet8(10, 1, 8),
        resnet14(10, 1, 8),
        "logits",
        1.0,
        target_weight=1.0,
        others_weight=8.0,
        temperature=4.0,
        ramp_epochs=ramp_epochs,
    )
    distiller.prepare(torch.arange(10), 10, torch.Generator())
    return distiller


@pytest.mark.parametrize(
    ("ramp_epochs", "epoch", "share"),
    [(20, 1, 0.05), (20, 10, 0.5), (20, 20, 1), (20, 21, 1), (0, 1, 1), (0.5, 1, 1)],
)
def test_the_loss_rises_with_the_epochs(ramp_epochs, epoch, share):
    distiller = dkd(ramp_epochs)
    torch.manual_seed(0)
    student, teacher = {"logits": torch.randn(6, 10)}, {"logits": torch.randn(6, 10)}
    batch = student, teacher, {distiller.spots[0]: torch.ones(6, dtype=torch.bool)}, torch.arange(6)
    whole = distiller(*batch)
    assert whole > 0
    distiller.begin_epoch(epoch)
    torch.testing.assert_close(distiller(*batch), share * whole)


@pytest.mark.parametrize(("distiller", "name"), [("dkd", "dkd"), ("reviewkd", "reviewkd")])
def test_the_trainer_says_which_epoch_begins_also_after_a_resume(tiny, distiller, name):
    config = tiny(f"distiller={distiller}", "spot_mode=fixed", "dataset.train_samples=40")
    dataset = build.dataset(config)
    first, second = (build.trainer(config, build.parts(config), torch.device("cpu")) for _ in range(2))
    fit(first, dataset, 2, 20)
    assert first.distillers[name].share.item() == pytest.approx(2 / 20)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.prepare(dataset)
    second.load_state_dict(torch.load(saved, weights_only=True))
    fit(second, dataset, 3, 20)
    assert second.distillers[name].share.item() == pytest.approx(3 / 20)
