"""What the project promises about itself."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.conftest import ROOT
from tests.pages import blocks_of


def test_environment_yml_has_the_dependencies_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (by_pip,) = [entry["pip"] for entry in environment if isinstance(entry, dict)]
    assert sorted(by_pip) == sorted(project["dependencies"] + project["optional-dependencies"]["test"])
    assert f"python{project['requires-python']}" in environment


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sakd").rglob("__init__.py")}
    assert set(listed) == found | {"hydra_plugins.sakd", "sakd.conf", "sakd.conf.sweeps"}


def test_no_file_is_a_link():
    """So that a zip of it is whole, wherever it is unpacked."""
    folders = [ROOT / name for name in ("conf", "sweeps", "sakd", "hydra_plugins", "examples")]
    assert [path for folder in folders for path in folder.rglob("*") if path.is_symlink()] == []


def test_the_readme_is_one_that_is_read():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_library_example_runs_with_torch_alone(tmp_path):
    """In a process in which Hydra, MLflow and the rest cannot be imported."""
    (example,) = blocks_of(ROOT / "docs/library.md", "python")
    assert (
        len(
            [
                line
                for line in example.splitlines()
                if line.strip() and not line.startswith(("from", "import"))
            ]
        )
        <= 16
    )
    banned = ("hydra", "omegaconf", "mlflow", "submitit", "rich", "click", "safetensors")
    guard = f"import sys\nsys.modules.update(dict.fromkeys({banned!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + example],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "test/accuracy" in done.stdout


def test_the_tree_names_what_there_is():
    (tree,) = blocks_of(ROOT / "docs/tree.md", "text")
    for line in tree.splitlines():
        name = re.match(r"\s*(\S+)", line)
        if name and not line.startswith("    "):
            for part in line.split("  ")[0].split():
                assert (ROOT / part).exists(), part


ORDER = ("networks", "data", "spots", "distillers", "training", "configuration", "decisions", "runs")
ORDER += ("trained", "sweeps", "compare", "report", "doctor")


@pytest.mark.parametrize("wing", ORDER)
def test_imports_go_one_way(wing):
    """networks, data <- spots <- distillers <- training <- configuration <- runs <- sweeps, compare <-
    report."""
    leaves = {"errors", "streams", "files", "signals", "process", "plugin", "credentials", "names"}
    leaves |= {"ranges", "imports", "__version__"}
    allowed = {
        *leaves,
        *ORDER[: ORDER.index(wing) + 1],
        *(["terminal"] if wing in ("runs", "sweeps", "compare", "doctor") else []),
    }
    for path in (ROOT / "sakd" / wing).rglob("*.py"):
        text = path.read_text()
        imported = re.findall(
            r"^\s*(?:from|import) sakd\.(\w+)|^\s*from sakd import (\w+)", text, flags=re.MULTILINE
        )
        assert {a or b for a, b in imported} <= allowed, path
        if ORDER.index(wing) <= ORDER.index("training"):
            assert not re.search(
                r"^\s*(from|import) (hydra|omegaconf|mlflow|rich)", text, flags=re.MULTILINE
            ), path


def test_hydra_is_known_where_configurations_are_composed_and_nowhere_else():
    knowing = {
        path.relative_to(ROOT).as_posix()
        for folder in ("sakd", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(from|import) (hydra|omegaconf)", path.read_text(), flags=re.MULTILINE)
    }
    composing = {f"sakd/configuration/{name}.py" for name in ("arguments", "compose", "sums")}
    assert knowing == composing | {"sakd/launch.py"}
