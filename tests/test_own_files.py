"""Files of a user's own: in a folder ``conf`` where it is called, in that of --config-dir, in a package."""

import sys

import pytest

from sakd.configuration.compose import compose_one, sweep
from sakd.errors import ConfigError

NETWORK = "_target_: sakd.networks.resnet14\nname: mine\n"
DISTILLER = "defaults: [kd, _self_]\nname: theirs\nlosses:\n  theirs: {_target_: sakd.distillers.SP, "
DISTILLER += "where: last_stage, weight: 1.0}\n"
TAUGHT = ("student=mine", "teacher=mine", "distiller=[at,theirs]")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package own_kd on the path, in whose folder conf are a network and a distiller."""
    for path, text in {"network/mine.yaml": NETWORK, "distiller/theirs.yaml": DISTILLER}.items():
        (tmp_path / "own_kd/conf" / path).parent.mkdir(parents=True)
        (tmp_path / "own_kd/conf" / path).write_text(text)
    (tmp_path / "own_kd/__init__.py").touch()
    (tmp_path / "own_kd/conf/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "own_kd"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_kd"]:
        del sys.modules[name]


def assert_found(config: dict):
    assert config["student"]["name"] == config["teacher"]["name"] == "mine"
    assert config["student"]["num_classes"] == 10  # in the student's own place
    assert set(config["distiller"]["losses"]) == {"kd", "at", "theirs"}


def test_networks_in_the_working_directory_are_found_as_student_and_teacher(own, monkeypatch):
    monkeypatch.chdir(own)
    assert_found(compose_one(TAUGHT))
    monkeypatch.chdir(own.parent)
    with pytest.raises(ConfigError, match="Could not find 'student/mine'"):
        compose_one(TAUGHT[:1])


def test_networks_in_a_package_are_found_as_student_and_teacher(own):
    searched = "hydra.searchpath=[pkg://own_kd.conf]"
    cells = sweep((searched, *TAUGHT[1:], "student=mine,resnet8")).cells
    assert_found(cells[0][1])
    assert cells[1][1]["student"]["name"] == "resnet8"


def test_networks_in_a_configuration_folder_are_found_as_student_and_teacher(own, launch):
    shown = launch("--config-dir", str(own / "conf"), *TAUGHT, "--cfg", "job", "--resolve").stdout
    assert shown.count("name: mine\n") == 2
    assert "name: at+theirs\n" in shown


def test_own_networks_are_offered_beside_ours(own, monkeypatch):
    monkeypatch.chdir(own)
    with pytest.raises(ConfigError, match=r"expected one of .*\bmine, resnet110, .*Did you mean 'mine'"):
        compose_one(["teacher=mime"])
