"""Names are safe for MLflow and the file system, whatever a user calls things."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import _validate_metric, _validate_param

from sakd.configuration import Config, check, parameters
from sakd.errors import ConfigError
from sakd.names import LONGEST_FOLDER, folder, safe
from sakd.runs import Run
from sakd.runs.job import execute
from tests.conftest import TINY, compose_config

ODD = ["at(stage1)", "../../x", "/etc", "a//b", ".", "..", "..x", "x/..", "a\\b", "a=b,c", "-x", "x" * 400]
PLAIN = ["loss/task", "kept/stage3-stage4", "distiller.losses.at.weight", "näme 1:2", "optimizer._target_"]


@pytest.fixture(scope="module")
def plain() -> Config:
    return compose_config("tracking.uri=sqlite:///mlflow.db")


@pytest.mark.parametrize("name", [*ODD, *PLAIN])
def test_mlflow_takes_every_safe_name_and_plain_ones_stay(name):
    for made in (safe(name), safe(f"loss/{name}")):
        _validate_metric(made, 1.0, 0, 0)
        _validate_param(made, "value")
        assert safe(made) == made
    if name in PLAIN:
        assert safe(name) == name


@pytest.mark.parametrize("name", ODD)
def test_a_run_s_folder_is_one_folder_in_runs(name, plain, tmp_path):
    config = plain | {"runs": str(tmp_path)}
    for key in ("dataset", "student", "teacher", "distiller", "spot_mode"):
        changed = config | {key: config[key] | {"name": name}}
        made = Run(changed).folder
        assert made.parent == tmp_path
        assert made.resolve().parent == tmp_path.resolve()
        assert len(made.name.encode()) <= LONGEST_FOLDER
        assert made.name.endswith(f"-seed0-{Run(changed).digest}")
        assert parameters(changed)[f"{key}.name"] == name, "its value stays"


def test_a_folder_keeps_all_that_does_no_harm():
    assert folder("digits(2)", "at+sp", "a=b") == "digits(2)-at+sp-a=b"
    assert folder("microsoft/resnet-18", "x") == "microsoft_resnet-18-x"


@pytest.mark.parametrize("name", ["", " ", 3, None, ["a"], "a\nb", "a\tb", "a\x1b[2J", "a\u2028b"])
@pytest.mark.parametrize("key", ["dataset.name", "spot_mode.name", "tracking.experiment"])
def test_what_can_name_nothing_is_refused(key, name, plain):
    node, leaf = key.split(".")
    with pytest.raises(ConfigError, match=f"^{key}: found .*, expected a name, in one line$"):
        check(plain | {node: plain[node] | {leaf: name}})


def with_losses(config: Config, *names: str) -> Config:
    loss = {"_target_": "sakd.distillers.AT", "where": "stage1", "weight": 1.0}
    return config | {"distiller": config["distiller"] | {"losses": dict.fromkeys(names, loss)}}


def test_two_losses_that_would_be_one_metric_are_refused(plain):
    check(with_losses(plain, "a(1)", "a(2)"))
    with pytest.raises(ConfigError, match=r"distiller.losses: found 'a\(1' and 'a=1', which are both 'a_1'"):
        check(with_losses(plain, "a(1", "a=1"))


@pytest.mark.slow
def test_a_loss_with_an_odd_name_arrives(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    where = (f"runs={tmp_path}/runs", f"tracking.uri={uri}", "tracking.experiment=../odd/x")
    execute(with_losses(compose_config(*TINY, *where, "teacher.training.epochs=1"), "at(stage1)"))
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("../odd/x").experiment_id])
    assert run.info.status == "FINISHED"
    assert "loss/at_stage1_" in run.data.metrics
    assert run.data.params["distiller.losses.at_stage1_.where"] == "stage1"
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path / "mlartifacts")
