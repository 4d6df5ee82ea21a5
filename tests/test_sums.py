"""Several losses at once: ``distiller=[at,sp]`` is the sum of both, each with its own weight."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sakd.configuration import build, digest, prerequisites
from sakd.configuration.arguments import as_typed, choices, understood
from sakd.configuration.compose import compose_one, sweep
from sakd.data import train_batches
from sakd.errors import ConfigError
from sakd.streams import stream
from tests.conftest import light, take_step

SMALL = ("teacher=resnet8", "student=resnet8", "tracking=none")


def losses(*overrides: str) -> dict:
    return compose_one(overrides)["distiller"]["losses"]


def test_a_sum_has_the_losses_of_each_with_their_own_weights_and_kd_once():
    alone = losses("distiller=at") | losses("distiller=sp")
    assert {name: node["weight"] for name, node in alone.items()} == {"kd": 1.0, "at": 1000.0, "sp": 3000.0}
    assert losses("distiller=[at,sp]") == alone
    assert losses("distiller=[dkd,reviewkd]") == losses("distiller=dkd") | losses("distiller=reviewkd")
    assert losses("distiller=[kd,at]") == losses("distiller=at")


@pytest.mark.slow
def test_every_distiller_can_be_summed_with_another():
    """But for another KD: `at` has one beside it."""
    with pytest.raises(ConfigError, match="found the loss 'kd' twice"):
        compose_one(["distiller=kd_standardised+at"])
    others = [name for name in choices("distiller") if name not in ("none", "at", "kd_standardised")]
    sums = sweep([f"distiller={','.join(f'{name}+at' for name in others)}"]).cells
    alone = sweep([f"distiller={','.join([*others, 'at'])}"]).cells
    *own, attention = [config["distiller"]["losses"] for _, config in alone]
    for name, losses_alone, (_, config) in zip(others, own, sums, strict=True):
        assert config["distiller"]["name"] == f"{name}+at"
        assert config["distiller"]["losses"] == losses_alone | attention


def test_a_list_is_the_sum_of_that_name_and_order_counts_as_any_name_does():
    listed, named = compose_one(["distiller=[at,sp]"]), compose_one(["distiller=at+sp"])
    assert listed == named
    assert listed["distiller"]["name"] == "at+sp"
    assert digest(listed) == digest(named) != digest(compose_one(["distiller=sp+at"]))


def test_each_loss_of_a_sum_is_what_it_is_alone_and_their_gradients_add_up():
    """In the first step, which all begin with the same weights; each alone has cross-entropy and KD, too."""
    dataset = build.dataset(compose_one(SMALL))
    batch = next(iter(train_batches(dataset, 16, stream(0, "data", 1))))
    measured, steps = {}, {}
    for distiller in ("kd", "at", "sp", "at+sp"):
        config = compose_one((*SMALL, f"distiller={distiller}", "spot_mode=fixed"))
        trainer = build.trainer(config, build.parts(config), torch.device("cpu"))
        before = weights(trainer.student)
        trainer.prepare(dataset)
        trainer.begin_epoch()
        measured[distiller] = take_step(trainer, *batch)
        steps[distiller] = weights(trainer.student) - before
    summed = measured["at+sp"]
    for name in ("loss/task", "loss/kd", "loss/at"):
        assert torch.equal(summed[name], measured["at"][name])
    assert torch.equal(summed["loss/sp"], measured["sp"]["loss/sp"])
    assert_close(steps["at+sp"], steps["at"] + steps["sp"] - steps["kd"], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(steps["at+sp"], steps["at"], rtol=1e-2, atol=1e-4)


def weights(student: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in student.parameters()])


def test_weights_of_a_sum_are_set_by_the_loss_and_what_is_shared_once():
    chosen = losses("distiller=[at,sp]", "distiller.losses.at.weight=7", "distiller.alpha=0.5")
    assert {name: node["weight"] for name, node in chosen.items()} == {"kd": 0.5, "at": 7, "sp": 3000.0}
    with pytest.raises(ConfigError, match=r"no key 'distiller.beta'"):
        compose_one(["distiller=[at,sp]", "distiller.beta=7"])


def test_a_pretraining_of_a_sum_is_the_one_that_it_is_alone():
    alone = compose_one((*SMALL, "distiller=ft", *light("ft")))
    summed = compose_one((*SMALL, "distiller=[at,ft]", *light("ft")))
    own = {**alone["distiller"]["pretraining"], "distiller": "ft"}
    assert summed["distiller"]["pretraining"] == own
    (of_sum, of_one) = (prerequisites(config).pretraining for config in (summed, alone))
    assert of_sum == of_one  # one run serves both
    without = summed | {"distiller": summed["distiller"] | {"pretraining": alone["distiller"]["pretraining"]}}
    assert digest(summed) == digest(without)


def test_a_sweep_takes_sums_beside_others_and_a_key_that_the_default_has_not():
    cells = sweep(["distiller=at,[at,sp]", "distiller.losses.at.weight=5", "seed=0,1"]).cells
    assert [(c["distiller"]["name"], c["distiller"]["losses"]["at"]["weight"]) for _, c in cells] == [
        ("at", 5),
        ("at", 5),
        ("at+sp", 5),
        ("at+sp", 5),
    ]


@pytest.mark.parametrize("typed", ["null", "NULL"])
def test_a_sweep_takes_null_for_a_key_that_the_default_has_not(typed):
    node = "dataset=image_folder"
    cells = sweep([node, "dataset.classes=2", f"dataset.test_fraction={typed}", "seed=0,1"]).cells
    assert [(config["dataset"]["test_fraction"], config["seed"]) for _, config in cells] == [
        (None, 0),
        (None, 1),
    ]


def test_what_is_put_around_a_value_for_hydra_is_not_shown():
    typed = ["distiller=at,[at,sp]", "distiller.losses.at.weight=5", "seed=3", "student.x=1,2"]
    typed += ["dataset.train_samples=null", "dataset.test_samples=NULL"]
    arguments = understood(typed, multirun=True)
    assert arguments[1:4] == ["distiller.losses.at.weight=choice(5)", "seed=3", "student.x=1,2"]
    assert [as_typed(argument) for argument in arguments] == ["distiller=at,at+sp", *typed[1:]]


def test_of_two_values_for_one_key_the_last_counts_and_that_is_said(caplog):
    cells = sweep(["seed=0", "student=vgg8", "seed=1", "distiller=kd", "distiller=kd"]).cells
    assert [config["seed"] for _, config in cells] == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "seed: found two values, 0 and 1; the last counts (-m seed=0,1 runs both)"
    ]


REFUSED = {
    "distiller=[at,at]": "distiller=at+at: found one of them twice, expected each once",
    "distiller=[at,spp]": "distiller=at+spp: found no distiller 'spp', expected names out of",
    "distiller=[none,at]": "distiller=none+at: none has no loss, expected some to sum",
    "distiller=[ft,fsp_init]": "distiller=ft+fsp_init: found 2 with a pretraining, expected at most one",
    "distiller=[at,[sp]]": "distiller: found [at,['sp']], expected one of",
    "distiller=[]": "distiller: found [], expected one of",
    "distiller=null": "distiller: found null, expected one of",
    "distiller=1": "distiller: found 1, expected one of",
    "teacher=[resnet8,resnet14]": "teacher: found [resnet8,resnet14], expected one of",
    "student=null": "student: found null, expected one of",
    "dataset={a: 1}": "dataset: found {'a': 1}, expected one of",
    "hydra/launcher=null": "hydra/launcher: found null, expected one of local, slurm",
    "~distiller": "distiller: found none of its files, or several in a list, expected one",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_group_that_is_not_chosen_by_name_is_refused(mistake):
    with pytest.raises(ConfigError, match=re.escape(REFUSED[mistake])):
        compose_one([mistake])


OWN = {
    "changes_kd": "defaults: [kd, _self_]\nname: changes_kd\nalpha: 0.5\nlosses: {}\n",
    "changes_loss": "defaults: [kd, _self_]\nname: changes_loss\nlosses: {kd: {temperature: 2.0}}\n",
    "another_at": "name: another_at\nlosses: {at: {_target_: sakd.distillers.AT, where: hint, weight: 1.0}}"
    "\n",
    "by_parts": "name: by_parts\nscale: 3\nlosses:\n  part: {_target_: sakd.distillers.AT, where: hint,"
    " weight: '${times:2,${distiller.scale}}'}\n",
}


@pytest.fixture
def own_distillers(tmp_path):
    """Flags with which launch.py finds files of a user's own."""
    (tmp_path / "conf" / "distiller").mkdir(parents=True)
    for name, text in OWN.items():
        (tmp_path / "conf" / "distiller" / f"{name}.yaml").write_text(text)
    return "--config-dir", str(tmp_path / "conf")


def test_files_of_ones_own_are_summed_and_what_contradicts_is_named(launch, own_distillers):
    shown = launch(*own_distillers, "distiller=[by_parts,sp]", "--cfg", "job", "--resolve").stdout
    assert "name: by_parts+sp" in shown
    assert re.search(r"part:\n.*\n.*\n +weight: 6\n", shown)
    for mistake, told in {
        "distiller=[changes_kd,at]": "changes_kd changes kd's alpha, so it cannot be summed",
        "distiller=[changes_loss,at]": "changes_loss changes kd's losses.kd, so it cannot be summed",
        "distiller=[another_at,at]": "found the loss 'at' twice, expected each once",
    }.items():
        assert told in launch(*own_distillers, mistake, "tracking=none", expect=1).stderr


def test_a_list_in_a_file_is_refused_with_the_form_that_is_meant(launch, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "both.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /distiller: [at, sp]\n"
    )
    stopped = launch("--config-dir", "conf", "experiment=both", "tracking=none", expect=1)
    assert stopped.stderr.strip().startswith(
        "error: distiller: found none of its files, or several in a list"
    )
    assert "a sum is written distiller: at+sp" in stopped.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sum_trains_and_logs_each_loss(launch):
    done = launch(*SMALL, "distiller=[at,sp]", "epochs=1", "dataset.train_samples=128")
    for loss in ("kd", "at", "sp"):
        assert re.search(rf"  {loss} \d", done.stdout + done.stderr)
