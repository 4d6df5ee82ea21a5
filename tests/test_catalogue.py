"""The tables of docs/: they are what the command writes, and what conf/ and the code say."""

import csv
import re

import pytest
import yaml
from click.testing import CliRunner

from sakd import catalogue, keys
from sakd.catalogue import ABSENT
from sakd.cli import main
from sakd.configuration import NOT_IDENTITY, digest, flatten
from sakd.errors import ConfigError
from tests.conftest import ROOT, compose_config

PAGES = ("keys.md", "methods.md")


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return catalogue.tables()


def rows(table: str) -> dict[str, list[str]]:
    """Cells by the name in the first column."""
    lines = [line.strip("| \n").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {name.strip("`"): cells for name, *cells in lines}


def test_the_docs_have_the_tables_that_the_command_writes(tables, tmp_path, monkeypatch):
    """Mend it with `sakd catalogue --write docs/keys.md --write docs/methods.md`."""
    monkeypatch.setattr(catalogue, "tables", lambda: tables)  # made once
    written = {name: (ROOT / "docs" / name).read_text() for name in PAGES}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    options = [word for name in PAGES for word in ("--write", str(tmp_path / name))]
    done = CliRunner().invoke(main, ["catalogue", *options])
    assert done.exit_code == 0, done.output
    assert {name: (tmp_path / name).read_text() for name in PAGES} == written
    placed = re.findall(r"^<!-- (\w+) -->$", "".join(written.values()), re.MULTILINE)
    assert sorted(placed) == sorted(tables)


def test_config_yaml_lists_the_keys_without_identity_as_the_command_writes_them(tmp_path):
    """Mend it with `sakd catalogue --write conf/config.yaml`."""
    copy = tmp_path / "config.yaml"
    copy.write_text((ROOT / "conf/config.yaml").read_text())
    done = CliRunner().invoke(main, ["catalogue", "--write", str(copy)])
    assert done.exit_code == 0, done.output
    assert copy.read_text() == (ROOT / "conf/config.yaml").read_text()
    for key, why in NOT_IDENTITY.items():
        assert re.search(rf"^#   {re.escape(key)} +{re.escape(why)}$", copy.read_text(), re.MULTILINE), key


def test_the_docs_list_the_keys_without_identity(tables):
    assert rows(tables["not_identity"]) == {key: [why] for key, why in NOT_IDENTITY.items()}


def test_every_distiller_has_a_row(tables):
    found = rows(tables["distillers"])
    assert set(found) == {path.stem for path in (ROOT / "conf/distiller").glob("*.yaml")} - {"none"}
    assert found["at"][:4] == [
        "Attention transfer",
        "Zagoruyko and Komodakis (2017), “Paying More Attention to Attention”, ICLR",
        "stages",
        "1000",
    ]
    assert found["cc"][1].startswith("Peng et al. (2019), ")
    assert (found["kd"][2:4], found["cc"][3], found["fsp_init"][2:4]) == (
        ["logits", "alpha = 1"],
        "0.02",
        ["stages", ABSENT],
    )


def test_networks_are_as_the_field_s_reference_says(tables):
    found = rows(tables["networks"])
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf/network").glob("*.yaml")}
    assert set(found) == {
        name for name, node in files.items() if not node.get("build", "").startswith("timm.")
    }
    with (ROOT / "tests/reference_networks.csv").open() as file:
        for reference in csv.DictReader(file):
            if reference["network"] in found:
                _, parameters, shapes = found[reference["network"]]
                assert parameters.replace(",", "") == reference["parameters"], reference["network"]
                assert shapes.split(", ") == reference["stage_output_shapes"].split(), reference["network"]


def test_costs_are_those_of_the_first_pair_and_device(tmp_path):
    steps = tmp_path / "step.csv"
    assert catalogue.costs(steps) == ({}, "")
    steps.write_text(
        "distiller,mode,pair,device,ms,images_per_second,ratio_to_fixed,ratio_to_floor,peak_mb\n"
        "kd,fixed,resnet56-resnet20,cpu,1,1,1.0,1.02,5\n"
        "kd,adaptive,resnet56-resnet20,cpu,1,1,1.1,1.128,5\n"
        "kd,adaptive,resnet56-resnet20,cuda,1,1,1.1,9.9,5\n"
        "kd,adaptive,vgg13-vgg8,cpu,1,1,1.1,9.9,5\n"
    )
    measured, where = catalogue.costs(steps)
    assert measured == {("kd", "fixed"): "1.02", ("kd", "adaptive"): "1.13"}
    assert where.endswith("resnet56 to resnet20, cpu.")
    table = catalogue.distillers(steps)
    assert rows(table)["kd"][-2:] == ["1.02", "1.13"]
    assert rows(table)["at"][-2:] == [ABSENT, ABSENT]
    assert table.endswith(f"|\n\n{where}\n")


def test_what_stands_around_the_tables_is_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\n<!-- /a -->\nbetween\n<!-- b -->\nold\n<!-- /b -->\nafter\n")
    for _ in range(2):
        catalogue.write({"a": "new \\1\n", "b": "newer\n"}, page)
        expected = (
            "before\n<!-- a -->\nnew \\1\n<!-- /a -->\nbetween\n<!-- b -->\nnewer\n<!-- /b -->\nafter\n"
        )
        assert page.read_text() == expected
    catalogue.write({"a": "new\n", "c": ""}, page)  # a page has some of the tables
    assert "new\n<!-- /a -->" in page.read_text()
    page.write_text("<!-- c -->\n")
    for names, found in (("cd", "c"), ("d", "name")):
        with pytest.raises(
            ConfigError, match=rf"page\.md: found no lines <!-- {found} --> and <!-- /{found} -->"
        ):
            catalogue.write(dict.fromkeys(names, ""), page)


def test_every_key_of_conf_has_a_row_with_what_it_may_be(tables):
    found = rows(tables["keys"])
    composed = [key for key, _ in flatten(compose_config())]
    groups = {"dataset", "student", "distiller", "spot_mode", "tracking", "optimizer", "schedule"}
    trainings = ("teacher.training.optimizer.", "teacher.training.schedule.")
    own = {key for key in composed if key.partition(".")[0] not in groups and not key.startswith(trainings)}
    own -= {key for key in own if key.startswith("teacher.") and key.count(".") == 1 and key not in found}
    assert own <= set(found)
    assert found["teacher.min_accuracy"] == [
        "`0.0`",
        "percent, from 0 to 100",
        "percent on the test images; a teacher below is refused",
    ]
    assert found["precision"][1] == "one of fp32, tf32, bf16, fp16"
    for group, key, kind in (
        ("dataset", "dataset.val_fraction", "a number from 0 to below 1"),
        ("distiller", "distiller.losses.crd.momentum", "a number from 0 to below 1"),
        ("spot_mode", "spot_mode.temperature", "a number above 0"),
        ("optimizer", "optimizer.weight_decay", "a number of at least 0"),
        ("schedule", "schedule.by", "one of epoch, step"),
        ("hydra_launcher", "hydra.launcher.mem_gb", "a number above 0 or null"),
        ("tracking", "tracking.model", "true or false"),
    ):
        assert rows(tables[f"keys_{group}"])[key][1] == kind, key


def test_a_key_s_comment_stands_beside_it_or_above(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# Of the file,\n# in two lines.\nname: x\na: 1  # beside\n# above b\nb:\n"
        "  c: [1,\n    2]   # last\n# above d,\n# too\nd: 0\n"
    )
    assert keys.about(file) == "Of the file, in two lines."
    assert [(key.path, " ".join(key.value.split()), key.comment) for key in keys.keys_of(file, "x")] == [
        ("x.a", "1", "beside"),
        ("x.b.c", "[1, 2]", "last"),
        ("x.d", "0", "above d, too"),
    ]


def test_a_distiller_without_a_whole_reference_is_named():
    reference = dict.fromkeys(catalogue.REFERENCE, "x")
    for key in reference:
        node = {"reference": {other: value for other, value in reference.items() if other != key}}
        with pytest.raises(ConfigError, match=rf"^conf/x\.yaml: reference\.{key}: found nothing"):
            catalogue.paper(node, "conf/x.yaml")


@pytest.mark.parametrize("authors", [["A"], ["A", "B"], ["A", "B", "C"]], ids=len)
def test_authors_are_named_up_to_two(authors):
    reference = {"method": "M", "authors": authors, "title": "T", "venue": "V", "year": 2020}
    who = {1: "A", 2: "A and B", 3: "A et al."}[len(authors)]
    assert catalogue.paper({"reference": reference}, "") == ("M", f"{who} (2020), “T”, V")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/distiller").glob("*.yaml")))
def test_a_reference_is_the_file_s_own_no_part_of_it_the_inherited_one_s(name):
    written = yaml.safe_load((ROOT / f"conf/distiller/{name}.yaml").read_text()).get("reference")
    config = compose_config(f"distiller={name}")
    assert config["distiller"].get("reference") == written
    if written is not None:
        assert set(written) == set(catalogue.REFERENCE)
        before = digest(config)
        config["distiller"]["reference"]["year"] = 1900
        assert digest(config) == before


def test_without_the_projects_files_nothing_is_written(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(before := "<!-- distillers -->\nold\n<!-- /distillers -->\n")
    monkeypatch.setattr(catalogue, "folder_of", (tmp_path / "conf").joinpath)
    done = CliRunner().invoke(main, ["catalogue", "--write", str(page)])
    assert done.exit_code == 1
    assert f"Error: {tmp_path}/conf/distiller: found no YAML files" in done.output
    assert page.read_text() == before
