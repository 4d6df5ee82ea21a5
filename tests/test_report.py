"""The page about runs: what stands in it, that it needs nothing else, and what it does in a browser."""

import base64
import hashlib
import io
import json
import re
import time
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib import colormaps
from PIL import Image

from sakd.cli import main as cli
from sakd.compare.formats import ABSENT
from sakd.configuration import build
from sakd.credentials import hidden
from sakd.errors import ConfigError
from sakd.files import with_checksum
from sakd.report import charts, of_cells, of_folder, write_report
from sakd.report.page import environment
from sakd.report.pictures import data_uri
from sakd.runs import Run
from sakd.runs.record import Recording
from sakd.sweeps import PlannedRun
from tests.browser import browser  # noqa: F401
from tests.test_compare import composed, finish

SCRIPT = "<script>alert('x')</script>"
KEPT = {"kept/stage1": 0.5, "kept/logits": 0.75}


def record(run: Run, shares: dict[str, list[list[float]]], classes: int = 4, of_each: int = 8) -> None:
    """A record with these shares of each class's images, by spot, epoch and class."""
    labels = np.repeat(np.arange(classes), of_each)
    recording = Recording(list(shares), labels, np.arange(len(labels)))
    for epoch in range(len(next(iter(shares.values())))):
        masks = [
            np.concatenate([np.arange(of_each) < share * of_each for share in by_epoch[epoch]])
            for by_epoch in shares.values()
        ]
        recording.add(epoch + 1, np.packbits(np.array(masks), axis=-1))
    (run.folder / "spots.npz").write_bytes(recording.content())


def fail(run: Run, error: str) -> None:
    """A run that has ended early."""
    (run.folder / "result.json").unlink()
    told = "2026-01-02 03:04:05,678 INFO begins\n2026-01-02 03:04:06,678 ERROR ended early: "
    (run.folder / "run.log").write_text(f"{told}{error}\nTraceback (most recent call last):\n  deep down\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """AT at fixed and adaptive spots with two seeds, one with a record; one by another pair, badly named; two
    that failed; a teacher."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    for seed in (0, 1):
        finish(folder, 97.25 + seed, "distiller=at", "spot_mode=fixed", seed=seed, commit="f" * 40)
        adaptive = finish(folder, 91.5 + seed, "distiller=at", "spot_mode=adaptive", seed=seed, measured=KEPT)
    record(adaptive, {"stage1": [[1.0, 0.5, 0.25, 0.0], [1.0] * 4], "logits": [[1.0] * 4] * 2})
    finish(folder, 88.75, "distiller=at", "spot_mode=fixed", changes={"student.name": f"net{SCRIPT}"})
    fail(finish(folder, 12.0, "distiller=at", "spot_mode=adaptive", seed=2), f"out of luck {SCRIPT}")
    fail(
        finish(folder, 12.0, "distiller=at", "spot_mode=adaptive", seed=3), "http://me:secret99@host is gone"
    )
    finish(folder, 99.0, "distiller=none", teacher=None)
    return folder


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    inner: list["Element"] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list["Element"]:
        """Those inside with this tag and these attributes."""
        found = [each for inner in self.inner for each in inner.all(tag, **attributes)]
        wanted = {("class" if key == "kind" else key): value for key, value in attributes.items()}
        return [self, *found] if self.tag == tag and wanted.items() <= self.attributes.items() else found

    @property
    def words(self) -> str:
        """Its text and that of all inside."""
        return " ".join(" ".join([self.text, *(inner.words for inner in self.inner)]).split())


class Page(HTMLParser):
    """A page as elements; ``root`` has all."""

    ALONE = ("meta", "input", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]
        self.feed(text)
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].inner.append(element)
        if tag not in self.ALONE:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].inner.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].text += data


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    done = CliRunner().invoke(cli, ["report", "--from", str(runs), "--output", str(path)])
    assert (done.exit_code, done.output) == (0, f"{path}\n")
    return path.read_text()


@pytest.fixture(scope="module")
def page(text) -> Element:
    return Page(text).root


def section(page: Element, name: str) -> Element:
    (found,) = page.all("section", id=name)
    return found


def rows(page: Element) -> list[list[str]]:
    """Cells of the table of runs."""
    (table,) = section(page, "runs").all("table")
    return [[cell.words for cell in row.inner] for row in table.all("tbody")[0].all("tr")]


def test_each_run_stands_in_the_table_with_its_accuracy_and_state(page):
    found = {(row[2], row[4], row[5]): row for row in rows(page)}
    assert len(found) == 8
    for mode, accuracy in (("fixed", 97.25), ("adaptive", 91.5)):
        for seed in (0, 1):
            row = found["resnet8", mode, str(seed)]
            kept = "62.50" if mode == "adaptive" else ABSENT
            told = [f"{accuracy + seed:.2f}", f"{accuracy + seed + 1:.2f}", "98.50", kept, "2/2", "2.0"]
            assert row[6:] == [*told, "finished", ""]
    assert [found["resnet8", "adaptive", seed][-2] for seed in "23"] == ["failed"] * 2


def test_names_and_errors_from_elsewhere_are_text(text, page):
    assert SCRIPT not in text
    assert len(page.all("script")) == 1
    assert [row[2] for row in rows(page)].count(f"net{SCRIPT}") == 1
    assert f"out of luck {SCRIPT}" in section(page, "failures").words
    (policy,) = [tag.attributes["content"] for tag in page.all("meta") if "http-equiv" in tag.attributes]
    own = base64.b64encode(hashlib.sha256(page.all("script")[0].text.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert policy.endswith(f"script-src 'sha256-{own}'")  # no other script runs


def test_a_picture_is_no_text_in_which_a_password_could_seem_to_stand():
    content = base64.b64decode("AAAApwdAAA==")
    uri = data_uri(content, "png")
    assert hidden(str(uri)) != uri  # ;…pwd…= begins a password elsewhere
    shown = environment().from_string("{{ uri }} {{ text }}").render(uri=uri, text="//me:secret99@host")
    assert shown == "data:image/png;base64,AAAApwdAAA== //me:***@host"


def references(element: Element):
    """What a browser would load, or go to."""
    for key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
        if key in element.attributes:
            yield element.attributes[key]
    styles = element.attributes.get("style", "") + element.text * (element.tag == "style")
    yield from re.findall(r"url\(['\"]?([^'\")]*)|@import\s+(\S+)", styles)
    for inner in element.inner:
        yield from references(inner)


def test_nothing_is_referred_to_but_the_page_itself(page):
    found = list(references(page))
    assert len(found) > 20
    inside = {
        f"#{tag.attributes['id']}"
        for kind in ("section", "details")
        for tag in page.all(kind)
        if "id" in tag.attributes
    }
    assert all(each in inside or each.startswith("data:image/") for each in found)
    drawn = [base64.b64decode(each.partition(",")[2]) for each in found if each.startswith("data:image/svg")]
    assert len(drawn) == 2
    for svg in drawn:
        assert {each[:1] for each in re.findall(r'href="([^"]*)', svg.decode())} == {"#"}
        assert "url(http" not in svg.decode()


def test_what_failed_has_its_last_words_and_no_password(text, page):
    failures = section(page, "failures").all("details")
    assert len(failures) == 2
    assert failures[0].all("span", kind="state failed")[0].words == "failed"
    assert f": out of luck {SCRIPT}" in failures[0].all("summary")[0].words
    assert "deep down" in failures[0].all("pre")[0].text
    assert "http://me:***@host is gone" in failures[1].words
    assert "secret99" not in text


def test_the_comparison_is_that_of_compare(runs, page):
    told = CliRunner().invoke(cli, ["compare", "--from", str(runs), "--format", "markdown"]).output
    lines = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|")]
    tables = section(page, "comparison").all("table")
    shown = [[cell.words for cell in row.inner] for table in tables for row in table.all("tr")]
    assert shown == [line for line in lines if set(line) != {"---"}]
    notes = [note.words for note in section(page, "comparison").all("li")]
    assert notes[:-1] == [" ".join(line[2:].split()) for line in told.splitlines() if line.startswith("- ")]
    assert notes[-1] == "Left out of the comparison: networks trained alone (1)."


def test_runs_that_cannot_be_compared_are_reported_all_the_same(runs, tmp_path):
    for rate in (0.05, 0.01):
        finish(tmp_path / "runs", 97.0, "distiller=at", "spot_mode=fixed", changes={"optimizer.lr": rate})
    write_report(of_folder(tmp_path / "runs"), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text()).root
    assert "found runs of 2 recipes, expected one" in section(page, "comparison").words
    assert len(rows(page)) == 2
    (table,) = section(page, "configurations").all("table")
    (differing,) = table.all("tbody")[0].all("tr")
    assert differing.words in ("optimizer.lr 0.05 (1) 0.01 (1)", "optimizer.lr 0.01 (1) 0.05 (1)")


def test_teachers_code_and_configurations_are_said(page):
    (teacher,) = section(page, "teachers").all("tbody")[0].all("tr")
    assert [cell.words for cell in teacher.inner] == ["a", "digits", "98.50", "5", "a" * 16, "elsewhere"]
    assert [each.words for each in section(page, "code").all("li")] == [
        f"commit {'c' * 12} (4 runs)",
        f"commit {'f' * 12} (2 runs)",
    ]
    assert "spot_mode.gamma" in section(page, "configurations").words


def test_curves_have_a_point_for_each_epoch_where_it_was_measured(page):
    (card,) = [card for card in page.all("details", kind="card") if "adaptive seed 1" in card.words]
    titles = [chart.all("figcaption")[0].words for chart in card.all("figure", kind="chart")]
    assert titles == ["Accuracy, %", "Losses", "Distilled, % of the images"]
    test, teacher = card.all("figure", kind="chart")[0].all("polyline")
    (x, y), (later_x, later_y) = [map(float, point.split(",")) for point in test.attributes["points"].split()]
    assert (x, later_x) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert y < later_y  # SVG counts from above, and accuracy falls from 93.5 to 92.5
    assert (test.words, teacher.words) == ("test", "teacher")


def test_who_was_distilled_is_a_picture_of_shares(page):
    (card,) = [card for card in page.all("details", kind="card") if card.all("figure", kind="shares")]
    (figure,) = card.all("figure", kind="shares")  # at the logits all were
    assert figure.all("figcaption")[0].words == "stage1: classes 0 to 3, epochs 1 to 2"
    (image,) = figure.all("img")
    content = base64.b64decode(image.attributes["src"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    shares = np.array([[1, 1], [0.5, 1], [0.25, 1], [0, 1]])
    np.testing.assert_allclose(pixels / 255, colormaps["cividis"](shares)[..., :3], atol=0.02)
    assert "from 0.0% to 100.0%" in image.attributes["alt"]


def test_axes_end_at_round_numbers_but_not_past_what_can_be():
    drawn = charts.chart("", [charts.Curve("a", [1, 2, 3], [46.0, 93.0, 100.0], 0)], charts.PERCENT)
    assert [tick.text for tick in drawn.up] == ["45", "60", "75", "90"]
    assert float(drawn.lines[0].points.split(",")[-1]) == charts.TOP
    flat = charts.chart("", [charts.Curve("a", [1], [0.0], 0)])
    assert max(float(tick.text) for tick in flat.up) > 1e-9
    assert len(flat.lines[0].points.split()) == 2  # a dot
    assert charts.chart("", [charts.Curve("a", [1, 2], [np.nan, np.inf], 0)]) is None
    long = charts.chart("", [charts.Curve("a", range(1, 1001), range(1000), 0)])
    places = [point.split(",") for point in long.lines[0].points.split()]
    assert len(places) == charts.POINTS
    assert float(places[-1][0]) == charts.WIDTH - charts.RIGHT


# ---- which runs


def test_runs_are_chosen_by_name_and_by_the_filters_of_compare(runs):
    def chosen(*words):
        return sorted(run.name for run in of_folder(runs, words).runs)

    every = chosen()
    adaptive = [name for name in every if "-adaptive-" in name]
    assert (len(every), len(adaptive)) == (8, 4)
    assert chosen("spot_mode=adaptive") == adaptive
    assert chosen("spot_mode=adaptive", "seed=2,3") == adaptive[2:]
    assert chosen(adaptive[0], str(runs / adaptive[1]), adaptive[0][:-3]) == adaptive[:2]
    assert chosen("distiller=none") == [name for name in every if "-none-none-" in name]
    assert chosen("teacher.sha256=aaaaaaaaaaaa", "student=resnet8") == [
        name for name in every if "seed2" not in name and "seed3" not in name and "resnet8-at" in name
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=2,3"], "seed=2,3: found no finished run to report, expected some"),
        (["spot_mode=fixed", "seed=2"], "seed: found '2', expected one of 0, 1"),
        (["spotmode=fixed"], "spotmode: no such key in the runs' configurations. Did you mean 'spot_mode'?"),
        (["elsewhere"], "elsewhere: found no such run"),
        (["sweeps=digits"], "--from: found --from="),
        (["--from", "nowhere"], "--from: found 'nowhere', expected a folder of runs"),
        (
            ["--output", "nowhere/page.html"],
            "--output: found no folder 'nowhere', expected one for page.html",
        ),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_what_is_there(runs, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    Path("report.html").write_text("before")
    done = CliRunner().invoke(cli, ["report", "--from", str(runs), *words])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert told in done.output
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "before")]


def test_a_file_that_cannot_be_written_is_told_in_one_line(runs, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(Exception, match=r"^cannot write .*taken: Is a directory"):
        write_report(of_folder(runs), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_what_is_damaged_is_said_and_stops_nothing(tmp_path):
    folder = tmp_path / "runs"
    whole, record_, metrics, result, config = [
        finish(folder, 90.0 + seed, "distiller=at", "spot_mode=fixed", seed=seed) for seed in range(5)
    ]
    (record_.folder / "spots.npz").write_bytes(b"PK damaged")
    (metrics.folder / "metrics.jsonl").write_text("{}\n")
    (result.folder / "result.json").write_text('{"sha256": "no"}')
    (config.folder / "config.yaml").write_text("epochs: [")
    write_report(of_folder(folder), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text()).root
    said = [each.words for each in section(page, "failures").all("li")]
    assert len(said) == 4
    for line, told in zip(
        said,
        ("spots.npz: cannot be read", "line 1: found no epoch", "result.json: found checksum", config.name),
        strict=True,
    ):
        assert told in line
    assert [row[2] for row in rows(page)] == ["90.00", "91.00", "92.00", "93.00"]
    assert "(2)" in section(page, "comparison").words  # of those that are whole
    assert whole.name in page.words


def test_a_sweeps_page_has_cells_that_are_not_there_yet(tmp_path):
    folder = tmp_path / "runs"
    for seed in (0, 1):
        finish(folder, 90.0 + seed, "distiller=at", "spot_mode=fixed", seed=seed)
    config = composed("distiller=at", "spot_mode=fixed") | {"runs": str(folder)}
    cells = [PlannedRun(Run(config | {"seed": seed})) for seed in range(4)]
    states = dict(
        zip((cell.name for cell in cells), ("finished", "finished", "queued", "missing"), strict=True)
    )
    write_report(of_cells("a sweep of mine", cells, states), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text()).root
    assert page.all("h1")[0].words == "a sweep of mine"
    assert [row[-2] for row in rows(page)] == ["finished", "finished", "queued", "missing"]
    assert "90.50 ± 0.71 (2 of 4)" in section(page, "comparison").words
    with pytest.raises(ConfigError, match="found no finished run"):
        write_report(of_cells("", cells[2:], states), tmp_path / "none.html")


@pytest.mark.slow
def test_a_sweep_is_named_as_it_is_launched(tmp_path):
    words = ("sweeps=digits", "seed=0", f"runs={tmp_path}", "--output", f"{tmp_path}/page.html")
    done = CliRunner().invoke(cli, ["report", *words])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "found no finished run to report" in done.output


@pytest.mark.slow
def test_a_hundred_and_fifty_runs_take_seconds_and_few_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)
    draw = np.random.default_rng(0)
    epochs = 240
    measured = {f"{what}/stage{n}": 0.9 for what in ("loss", "kept") for n in (1, 2, 3)} | {
        "train/accuracy": 80
    }
    for distiller in ("fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "nst", "dkd", "dist"):
        for mode in ("fixed", "adaptive", "anti"):
            for seed in range(5):
                run = finish(
                    tmp_path / "runs",
                    float(draw.normal(97, 0.3)),
                    f"distiller={distiller}",
                    f"spot_mode={mode}",
                    seed=seed,
                    changes={"epochs": epochs},
                    measured=measured,
                )
                if mode != "fixed":
                    record(run, {f"stage{n}": draw.random((epochs, 10)).tolist() for n in (1, 2, 3)}, 10, 180)
    start = time.monotonic()
    write_report(of_folder(tmp_path / "runs"), tmp_path / "page.html")
    seconds, size = time.monotonic() - start, (tmp_path / "page.html").stat().st_size
    print(f"\n{seconds:.1f} s, {size / 1e6:.1f} MB")
    assert seconds < 40
    assert size < 6e6


# ---- in a browser


@pytest.fixture
def shown(browser, text, tmp_path):  # noqa: F811
    """The page in a browser of a given width and preferred colours."""
    path = tmp_path / "report.html"
    path.write_text(text)

    def show(width: int = 1440, colours: str = "light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        preferred = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # what was said of earlier pages
        browser.get(path.as_uri())
        return browser.execute_script

    return show


COLUMN = """
const table = document.querySelector("#runs table");
const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === arguments[0]);
const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
return rows.map((row) => row.cells[column].textContent.trim());
"""
CLICK = """
const headings = [...document.querySelectorAll("#runs thead th")];
const heading = headings.find((cell) => cell.textContent.trim() === arguments[0]);
heading.querySelector("button").click();
return heading.ariaSort;
"""
FILTER = """
const field = document.getElementById("filter");
field.value = arguments[0];
field.dispatchEvent(new Event("input"));
const cards = document.querySelectorAll(".card:not([hidden])").length;
return [document.querySelector("#runs output").value, cards];
"""
OPEN_ALL = "for (const each of document.querySelectorAll('details')) each.open = true"
OVERFLOW = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
PICTURES = "return [...document.images].map((image) => [image.complete, image.naturalWidth])"
COMPARISONS = (
    "return [...document.querySelectorAll('#comparison img')].map((image) => image.checkVisibility())"
)
COLOURS = "return getComputedStyle(document.body).backgroundColor"
CHOOSE = "document.getElementById(arguments[0]).click(); " + COLOURS


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["last %", "kept %"])
def test_the_table_sorts_by_numbers_and_what_is_not_known_is_last(shown, heading):
    run = shown()
    unsorted = run(COLUMN, heading)
    known = sorted((each for each in unsorted if each != ABSENT), key=float)
    unknown = [ABSENT] * unsorted.count(ABSENT)
    assert known + unknown != unsorted
    assert (run(CLICK, heading), run(COLUMN, heading)) == ("ascending", known + unknown)
    assert (run(CLICK, heading), run(COLUMN, heading)) == ("descending", known[::-1] + unknown)


@pytest.mark.slow
def test_the_filter_leaves_runs_that_have_all_its_words_and_a_link_opens_a_run(shown):
    run = shown()
    assert run(FILTER, "adaptive seed=1") == ["1 of 8", 1]
    assert run(COLUMN, "last %") == ["92.50"]
    assert run(FILTER, "seed=") == ["8 of 8", 8]
    assert run(FILTER, "") == ["8 of 8", 8]
    run("location.hash = 'run-1'")
    is_open = "document.getElementById('run-1').open"
    assert run(f"return new Promise((done) => setTimeout(() => done({is_open}), 200))")


def colours_of(element) -> int:
    """How many colours an element of the page has on the screen."""
    pixels = np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"))
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


@pytest.mark.slow
def test_pictures_load_nothing_is_fetched_and_nothing_is_wrong(shown, browser):  # noqa: F811
    run = shown()
    run(OPEN_ALL)
    sizes = run(PICTURES)
    assert len(sizes) == 3
    assert all(complete and width for complete, width in sizes)
    for place in ("#comparison figure", "#curves .chart svg", ".shares img"):
        assert colours_of(browser.find_element("css selector", place)) > 3, place
    asked = [entry["message"] for entry in browser.get_log("performance")]
    asked = [message for message in asked if "Network.requestWillBeSent" in message]
    urls = {url for message in asked for url in re.findall(r'"url":"([^"]*)"', message)}
    assert {url for url in urls if not url.startswith("data:image/")} == {browser.current_url}
    assert browser.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_and_follows_the_colours_that_are_wanted(shown, width):
    light, dark = shown(width, "light")(COLOURS), shown(width, "dark")(COLOURS)
    assert light != dark
    run = shown(width, "dark")
    run(OPEN_ALL)
    assert run(OVERFLOW) == 0
    assert run(COMPARISONS) == [False, True]
    assert run(CHOOSE, "light") == light
    assert run(COMPARISONS) == [True, False]
    run = shown(width, "light")
    assert run(CHOOSE, "dark") == dark
    assert run(COMPARISONS) == [False, True]


def test_a_report_of_few_runs_has_the_samples_themselves(tmp_path):
    run = finish(tmp_path / "runs", 90.0, "distiller=at", "spot_mode=adaptive", measured=KEPT)
    images = build.dataset(run.config).train
    recording = Recording(["stage1"], images.labels.numpy(), np.arange(len(images)))
    recording.add(1, np.packbits(np.arange(len(images)) % 3 > 0)[None])
    (run.folder / "spots.npz").write_bytes(recording.content())
    path = run.folder / "result.json"
    result = json.loads(path.read_text()) | {"data_sha256": build.dataset(run.config).checksum}
    del result["sha256"]
    path.write_text(json.dumps(with_checksum(result)))
    write_report(of_folder(tmp_path / "runs"), tmp_path / "one.html")
    figures = Page((tmp_path / "one.html").read_text()).root.all("figure", kind="figure")
    assert [figure.all("figcaption")[0].text for figure in figures] == ["classes", "samples", "images"]


def test_a_report_of_few_runs_has_every_picture_of_their_decisions(runs, tmp_path):
    (run,) = [path.parent.name for path in runs.glob("*/spots.npz")]
    write_report(of_folder(runs, [run]), tmp_path / "one.html")
    figures = Page((tmp_path / "one.html").read_text()).root.all("figure", kind="figure")
    assert [figure.all("figcaption")[0].text for figure in figures] == ["classes", "samples", "changes"]
    for figure in figures:
        image = Image.open(io.BytesIO(base64.b64decode(figure.all("img")[0].attributes["src"].split(",")[1])))
        assert np.asarray(image.convert("L")).std() > 10
