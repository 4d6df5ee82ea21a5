"""The README and docs/: every command is one that there is and runs, links lead somewhere, pages fit screens.

What runs is made small on the way (`quick`), and what cannot run here is named, with its reason, in NOT_RUN.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click
import pytest
import torch

from sakd.configuration.arguments import understood
from tests.browser import browser  # noqa: F401, a fixture
from tests.conftest import ROOT, compose_config
from tests.pages import PAGES, blocks_of, lines_of

# Programs, and lines, that are not run, and why.
NOT_RUN = {
    "pip": "installs; .ci/run does it",
    "pytest": "is what runs this",
    "mlflow": "a server, which does not end",
    "export": "where that server is",
    'student = mlflow.pytorch.load_model("models:/m-…")': "each run has its own; test_pages does it",
}
# Lines that need what is not there, and their like.
INSTEAD = {
    "sakd compare dataset=cifar100 teacher=resnet56,vgg13 --metric test/best_accuracy": (
        "sakd compare dataset=digits teacher=wrn_16_2 --metric test/best_accuracy"
    ),
    "python launch.py -m hydra/sweeper=optuna hydra.sweeper.direction=maximize dataset.val_fraction=0.2 "
    "'optimizer.lr=tag(log,interval(0.001,0.5))'": (
        "python launch.py -m dataset.val_fraction=0.2 optimizer.lr=0.1,0.5"  # Optuna: tests/test_optimized.py
    ),
}
FIRST = "python launch.py"  # as it is: docs name the run's folder
QUICK = ("dataset.train_samples=96", "dataset.test_samples=40", "epochs=3", "tracking=none")
NARROW = ("distiller=at,sp", "seed=0", "spot_mode=fixed,adaptive")  # of a sweep's many cells
WITH_RUNS = ("decisions.md", "protocol.md", "report.md")  # what they tell of
FEW = "distiller=fitnet,at,sp spot_mode=fixed,adaptive seed=0,1 tracking=mlflow"
RUNS = f"python launch.py -m dataset=digits teacher=wrn_16_2 {FEW}"


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page's shell blocks that can run."""
    for line in lines_of(page):
        for command in INSTEAD.get(line, line).split(" && "):
            words = shlex.split(command)
            if words[0] not in NOT_RUN:
                yield words


def quick(words: list[str], run: str) -> list[str]:
    """A command made small: fewer images, epochs and cells, stand-ins for data that are not here.

    ``run`` is the folder of a run, for RUN.
    """
    words = [run if word == "RUN" else word for word in words]
    if words == ["sakd", "compare"]:  # the first run is of another recipe
        return [*words, *(word for word in QUICK if word.startswith("epochs"))]
    if words == shlex.split(FIRST) or "--cfg" in words or not (launches(words) or names_sweep(words)):
        return words
    words = [word for word in words if word != "hydra/launcher=slurm"]
    if names_sweep(words):
        given = {word.partition("=")[0] for word in words}
        words += [word for word in NARROW if word.partition("=")[0] not in given]
    words = [re.sub(r"^experiment=([^\[].*)", r"experiment=[\1,debug]", word) for word in words]
    if any("debug" in word for word in words):
        return [*words, "tracking=none"]
    if "dataset.root=" in str(words):
        small = [] if "dataset.image_size=" in str(words) else ["dataset.image_size=32"]
        return [*words, *small, "experiment=debug", "tracking=none"]
    return [*words, *(word for word in QUICK if word.partition("=")[0] not in str(words))]


def launches(words: list[str]) -> bool:
    return words[1] in ("launch.py", "launch")


def names_sweep(words: list[str]) -> bool:
    return any(word.startswith("sweeps=") for word in words)


def carried_out(words: list[str], folder: Path) -> None:
    program = (
        [sys.executable, str(ROOT / "launch.py")]
        if words[0] == "python"
        else [sys.executable, "-m", "sakd.cli"]
    )
    rest = words[2:] if words[0] == "python" else words[1:]
    rest = [found for word in rest for found in (sorted(glob.glob(word, root_dir=folder)) or [word])]
    done = subprocess.run(
        [*program, *rest], cwd=folder, capture_output=True, text=True, timeout=900, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


# ---- fast: all commands are ones that there are

composed = cache(compose_config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_docs_is_one_that_there_is(page):
    from sakd.cli import main

    for words in commands_of(page):
        if not launches(words):
            command = main.commands[words[1]]
            command.make_parser(click.Context(command)).parse_args(
                words[2:]
            )  # raises for what it does not take
        else:
            left_out = ("-", "sweeps=", "hydra/", "teacher.checkpoint=")
            overrides = [word for word in words[2:] if "=" in word and not word.startswith(left_out)]
            one = [re.sub(r"(=[^\[\],]+),.*", r"\1", override) for override in overrides]
            composed(*understood(one))


def test_what_is_not_run_is_still_there():
    lines = [line for page in PAGES for line in lines_of(page)]
    programs = {words[0] for line in lines for command in line.split(" && ") if (words := command.split())}
    python = "".join(block for page in PAGES for block in blocks_of(page, "python"))
    assert all(name in programs or name in python for name in NOT_RUN)
    assert set(INSTEAD) <= set(lines)
    assert set(WITH_RUNS) <= {page.name for page in PAGES}


# ---- slow: they run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a few finished runs, and with the store that has them."""
    folder = tmp_path_factory.mktemp("runs")
    carried_out(quick(shlex.split(RUNS), ""), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if [*commands_of(page)]], ids=lambda page: page.name)
def test_every_command_of_the_docs_runs(page, tmp_path, request):
    if page.name in WITH_RUNS:
        shutil.copytree(request.getfixturevalue("runs"), tmp_path, dirs_exist_ok=True)
    if page.name == "coming.md":
        give_teachers(tmp_path)
    for words in commands_of(page):
        found = sorted(path.parent for path in tmp_path.glob("runs/*fitnet-*/result.json"))
        run = str(found[0].relative_to(tmp_path)) if found else ""
        carried_out(quick(words, run), tmp_path)


def give_teachers(folder: Path) -> None:
    """Teachers' files where RepDistiller and mdistiller have them, in their form and with their names."""
    from sakd.networks import resnet32x4
    from sakd.networks.checkpoints import shared_weights

    network = resnet32x4(100, 3, 32)  # classes, channels, image size
    for place in ("save/models", "download_ckpts/cifar_teachers"):
        file = folder / place / "resnet32x4_vanilla/ckpt_epoch_240.pth"
        file.parent.mkdir(parents=True)
        torch.save({"epoch": 240, "model": shared_weights(network), "accuracy": 0.0}, file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "block"),
    [(page, block) for page in PAGES if page.name != "library.md" for block in blocks_of(page, "python")],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_every_python_block_of_the_docs_runs(page, block, tmp_path):
    """The library's example has a test of its own: with torch alone."""
    if any(line in NOT_RUN for line in re.sub(r" +#.*", "", block).splitlines()):
        return
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    os.environ["PYTHONPATH"] = str(ROOT)
    notebook = nbformat.read(ROOT / "docs/digits.ipynb", as_version=4)
    with_results = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    told = "".join(
        output.get("text", "") for cell in with_results.cells for output in cell.get("outputs", [])
    )
    (accuracy,) = re.findall(r"^adaptive +(\d+\.\d) %", told, re.MULTILINE)
    assert float(accuracy) > 75  # percent, after six epochs; by chance 10


@pytest.mark.slow
def test_the_pictures_of_the_idea_are_drawn_by_their_script(tmp_path):
    script = tmp_path / "draw.py"
    script.write_text((ROOT / "docs/pictures/draw.py").read_text())
    subprocess.run([sys.executable, str(script)], check=True, timeout=100)
    drawn = {path.name for path in tmp_path.iterdir()}
    kept = {
        path.name for path in (ROOT / "docs/pictures").iterdir() if path.suffix in (".svg", ".png", ".py")
    }
    assert drawn == kept - {"first_run.png"}


# ---- slow: the pages as a site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages, built with warnings as errors."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "read"),
         str(ROOT / "docs"), str(folder / "html")],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Page(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, Any]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.add(value)
            if name in ("id", "name") and value:
                self.places.add(value)


def broken(pages: dict[Path, Page]) -> list[str]:
    """Links within a site that lead nowhere."""
    missing = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = target in pages and unquote(parts.fragment) in pages[target].places
            if not (there or (target not in pages and target.is_file())):
                missing.append(f"{path.name}: {link}")
    return missing


@pytest.mark.slow
def test_no_link_within_the_pages_is_broken(site):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    assert broken(pages) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="b.html">x</a><a href="#here">y</a><img src="c.png">'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#there">x</a><a href="https://else.where/z">y</a>')
    pages = {path: Page(path) for path in tmp_path.glob("*.html")}
    assert sorted(broken(pages)) == ["a.html: c.png", "b.html: a.html#there"]


@pytest.mark.slow
def test_links_of_the_readme_lead_to_files():
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("width", [1440, 390])
def test_every_page_fits_a_screen_and_shows_its_pictures(site, browser, width):  # noqa: F811
    screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for page in sorted(site.glob("*.html")):
        browser.get(page.as_uri())
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{page.name} is {wide} pixels wide"
        unseen = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        assert browser.execute_script(unseen) == [], page.name
        errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert errors == [], page.name
