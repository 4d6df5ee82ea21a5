"""The wheel, in a fresh virtual environment and an empty folder; and a plug-in's package beside it."""

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

import sakd
from sakd.networks import resnet8
from tests.conftest import ROOT, TINY
from tests.test_code import commit

PLUGIN = ROOT / "examples/plugin"
IN_THE_WHEEL = ("sakd", "hydra_plugins", "conf", "sweeps", "pyproject.toml", "README.md", "LICENSE")
SMALL = (*TINY[:-1], "epochs=1", "threads=1")
SWEEP = ("distiller=kd", "spot_mode=fixed,anti", "seed=0,1", "tracking=none")
THEIRS = ("hydra.searchpath=[pkg://their_kd.conf]", "distiller=logit_regression", "spot_mode=fixed")


def done(command: Sequence[str], where: Path) -> str:
    ended = subprocess.run(
        command, cwd=where, env={"PATH": "/usr/bin:/bin", "SAKD_TRACKING_MODEL": "false"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}"
    return ended.stdout


def copied(source: Path, to: Path) -> Path:
    """Copy ``source``, of the project what its wheel is made of."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {"__pycache__"} | ({*names} - {*IN_THE_WHEEL} if folder == str(ROOT) else set())

    return shutil.copytree(source, to, ignore=left_out)


def wheel(source: Path, work: Path) -> Path:
    """Build the wheel of a copy of ``source``."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done([*command, "--wheel-dir", str(work), str(copied(source, work / "source"))], work)
    (built,) = work.glob("*.whl")
    return built


class Environment:
    """A fresh virtual environment in the checkout of another project, and an empty folder beside it.

    What sakd needs comes from the environment of the tests: torch again would be 2 GB.
    """

    def __init__(self, folder: Path):
        self.folder, self.bin, self.empty = folder, folder / "project/.venv/bin", folder / "project/empty"
        done([sys.executable, "-m", "venv", "--without-pip", str(self.bin.parent)], folder)
        self.empty.mkdir()
        own = self.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(own) / "others.pth").write_text(sysconfig.get_path("purelib"))
        (folder / "project/.gitignore").write_text(".venv/\n")
        commit(folder / "project")  # which is not sakd's

    def install(self, *what: str) -> None:
        to = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet"]
        done([*to, "--no-deps", "--no-build-isolation", *what], self.folder)

    def run(self, command: str, *arguments: str) -> str:
        return done([str(self.bin / command), *arguments], self.empty)


@pytest.mark.slow
def test_the_wheel_does_all_from_an_empty_folder(tmp_path):
    fresh = Environment(tmp_path)
    for name, source in {"sakd": ROOT, "their_kd": PLUGIN}.items():
        (tmp_path / name).mkdir()
        fresh.install(str(wheel(source, tmp_path / name)))
    installed, empty = fresh.run, fresh.empty
    where = installed(
        "python", "-c", "import sakd, hydra_plugins.sakd as h; print(sakd.__file__, h.__file__)"
    )
    assert where.count(str(tmp_path / "project/.venv")) == 2
    assert "runs/digits-none-resnet8" in installed("sakd", "launch", *SMALL, "distiller=none")
    (folder,) = (empty / "runs").glob("*resnet8-none*")
    code = json.loads((folder / "result.json").read_text())["code"]
    assert code == {"commit": None, "changed": None, "snapshot": None, "version": sakd.__version__}
    assert "finished before" in installed("python", "-m", "sakd", "launch", *SMALL, "distiller=none")
    assert "name: vgg13\n" in installed(
        "sakd", "launch", "experiment=cifar100/vgg13_vgg8", "--cfg", "job", "--resolve"
    )
    told = installed(
        "sakd", "launch", "-m", *SMALL, *SWEEP, "hydra/launcher=local", "hydra.launcher.processes=1"
    )
    assert f"version {sakd.__version__}, no git checkout, as it was at" in told
    assert "4 cells: 4 finished" in installed("sakd", "status", *SMALL, *SWEEP)
    assert "0 cells" not in installed("sakd", "status", "sweeps=digits", "seed=0", "distiller=at")
    assert "kd" in installed("sakd", "compare")
    installed("sakd", "report")
    assert "anti" in (empty / "report.html").read_text()
    installed("sakd", "launch", *SMALL, *THEIRS, "tracking=none")
    (folder,) = (empty / "runs").glob("*logit_regression*")
    assert json.loads((folder / "result.json").read_text())["distiller"] == "logit_regression"


@pytest.mark.slow
def test_what_is_installed_editable_finds_its_plug_ins_from_anywhere(tmp_path):
    fresh = Environment(tmp_path)
    fresh.install("--editable", str(copied(ROOT, tmp_path / "source")))
    shown = fresh.run("sakd", "launch", "student=vgg13", "distiller=[at,sp]", "--cfg", "job", "--resolve")
    assert "name: at+sp\n" in shown
    assert "_sakd_completion" in fresh.run("sakd", "completion")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The example's package, outside of the checkout."""
    shutil.copytree(PLUGIN, tmp_path / "plugin")
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    yield tmp_path / "plugin/their_kd"
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_kd"]:
        del sys.modules[name]


def test_the_example_of_a_plug_in_has_ten_lines_and_keeps_the_rule_of_masked_losses(plugin):
    lines = [line for line in (plugin / "__init__.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 10
    from sakd.configuration.compose import compose_one

    node = compose_one(THEIRS)["distiller"]["losses"]["logit_regression"]
    import their_kd

    assert node["_target_"] == f"{their_kd.__name__}.LogitRegression"
    networks = resnet8(10, 1, 8), resnet8(10, 1, 8)
    loss = their_kd.LogitRegression(*networks, where=node["where"], weight=node["weight"])
    (spot,) = loss.spots
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    keep = torch.tensor([True, False, True, False])
    features = ({"logits": student}, {"logits": teacher})
    expected = node["weight"] * 0.5 * (student - teacher)[keep].square().mean()
    torch.testing.assert_close(loss(*features, {spot: keep}, torch.arange(4)), expected)
    assert loss(*features, {spot: ~keep & keep}, torch.arange(4)) == 0


def test_the_citation_has_the_version_that_is_installed():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == sakd.__version__


def test_the_hosted_ci_runs_what_the_readme_and_the_local_one_say():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    readme = (ROOT / "README.md").read_text()
    asked = ("pip install -e . && python launch.py", "pip install -e '.[test]' && pytest")
    assert all(command in commands and command in readme for command in asked)
    assert ".ci/run" in commands
