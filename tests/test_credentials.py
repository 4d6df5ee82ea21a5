"""Passwords in a store's URI are used, and neither shown nor stored; credentials go to stores that the user
names."""

import json
import os
import socket
import threading
from pathlib import Path
from secrets import token_hex

import pytest
from click.testing import CliRunner

from sakd import credentials
from sakd.cli import main as cli
from sakd.configuration import parameters
from sakd.credentials import STORE, hidden, remember, remember_typed, revealed
from sakd.errors import ConfigError
from sakd.runs.tracking.store import reason
from tests.conftest import TINY, compose_config, compose_lazily, tracked_cells
from tests.servers import MlflowServer, free_port
from tests.test_tracking import a_folder

SECRET = "s3cret-Pässword"


URIS = {
    "http://user:secret@host:5000": "http://user:***@host:5000",
    "postgresql+psycopg2://user:secret@host/db": "postgresql+psycopg2://user:***@host/db",
    "postgresql://user:sec:r@et/@host/db": "postgresql://user:***@host/db",
    "mysql://host/db?user=a&password=secret&ssl=1": "mysql://host/db?user=a&password=***&ssl=1",
    "https://host/mlflow?token=secret": "https://host/mlflow?token=***",
    "http://user@host:5000": "http://user@host:5000",
    "sqlite:////data/run:1@home/mlflow.db": "sqlite:////data/run:1@home/mlflow.db",
    "http://user:***@host": "http://user:***@host",
}


@pytest.mark.parametrize("uri", URIS)
def test_a_password_is_hidden_wherever_its_uri_is_shown(uri):
    assert hidden(f"API request to {uri} failed") == f"API request to {URIS[uri]} failed"
    if "***" not in uri:
        assert remember(uri) == URIS[uri]
        assert revealed(URIS[uri]) == uri


def test_a_known_password_is_hidden_also_without_its_uri():
    remember("postgresql://user:p%40ssword@host/db")
    assert hidden("no user with p@ssword or p%40ssword") == "no user with *** or ***"


def test_a_password_is_hidden_before_a_message_is_cut():
    told = reason(OSError("x" * 130 + " http://user:not-yet-known@host"))
    assert told.endswith("http://user:***@host")


def test_of_what_mlflow_says_the_cause_is_told():
    assert reason(OSError("pool: (Caused by ResponseError('too many (503)'))")) == (
        "ResponseError('too many (503)')"
    )


def test_what_is_typed_names_stores_in_any_form():
    typed = "++tracking.uri=http://u:first1@a,'http://u:second@b'"
    assert remember_typed(typed) == "++tracking.uri=http://u:***@a,'http://u:***@b'"
    assert revealed("http://u:***@a") == "http://u:first1@a"
    assert revealed("http://u:***@b") == "http://u:second@b"
    assert remember_typed("dataset.root=x://u:second@b") == "dataset.root=x://u:second@b"


def test_a_configuration_has_no_password(monkeypatch):
    config = compose_config(f"tracking.uri='http://user:{SECRET}@host:5000'")
    assert config["tracking"]["uri"] == "http://user:***@host:5000"
    assert SECRET not in str(parameters(config))
    assert os.environ[STORE] == f"http://user:{SECRET}@host:5000", "for those that are started from here"
    credentials._uris.clear()  # as in one of those
    again = compose_config("tracking.uri=http://user:***@host:5000")
    assert revealed(again["tracking"]["uri"]) == os.environ[STORE]


def test_a_password_that_is_not_known_is_asked_for():
    with pytest.raises(ConfigError, match=r"tracking.uri: found http://user:\*\*\*@host, expected its pass"):
        compose_config("tracking.uri=http://user:***@host")


def test_a_configuration_is_shown_without_a_password(launch, monkeypatch):
    done = launch("--cfg", "all", "--resolve", f"tracking.uri='http://user:{SECRET}@host'")
    assert SECRET not in done.stdout + done.stderr
    assert done.stdout.count("http://user:***@host") >= 2  # with the override as it was typed
    monkeypatch.setenv(STORE, f"http://user:{SECRET}@another")
    assert compose_lazily().tracking.uri == "http://user:***@another"


# ---- sync


class Listener:
    """A server that says nothing, and remembers what it was sent."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.heard: list[bytes] = []
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.heard.append(connection.recv(1 << 16))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\n{}")


def noted(folder: Path, uri: str) -> Path:
    state = {"uid": "0" * 32, "start_time": 1, "uri": uri, "experiment": "sakd", "run_id": None}
    folder.parent.mkdir(exist_ok=True)
    (a_folder(folder) / "mlflow.json").write_text(json.dumps(state | {"status": "KILLED"}))
    return folder


def test_sync_sends_to_no_server_that_the_runs_alone_name(tmp_path, monkeypatch):
    listener = Listener()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET.encode().hex())
    noted(tmp_path / "run", listener.uri)
    told = CliRunner().invoke(cli, ["sync", str(tmp_path)])
    assert told.exit_code == 1
    assert f"run: found the store {listener.uri}, expected one that {STORE}" in told.output
    assert f"`sakd sync --uri {listener.uri}` sends there" in told.output
    assert listener.heard == []
    CliRunner().invoke(cli, ["sync", str(tmp_path), "--uri", listener.uri])
    assert any(SECRET.encode().hex().encode() in heard for heard in listener.heard)
    listener.socket.close()


def test_sync_takes_a_password_from_its_option_and_says_nothing_of_it(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    noted(tmp_path / "run", f"http://user:***@{address}")
    told = CliRunner().invoke(cli, ["sync", str(tmp_path)])
    assert (
        f"run: tracking.uri: found http://user:***@{address}, expected its password in {STORE}" in told.output
    )
    told = CliRunner().invoke(cli, ["sync", str(tmp_path), "--uri", f"http://user:{SECRET}@{address}"])
    assert f"http://user:***@{address}/api" in told.output
    assert SECRET not in told.output


@pytest.mark.parametrize("name", ["run.log", "config.yaml", "result.json"])
def test_a_link_among_what_is_sent_is_refused(name, tmp_path):
    folder = noted(tmp_path / "runs/run", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "id_rsa").write_text("private")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "id_rsa")
    told = CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")])
    assert told.exit_code == 1
    assert f"{folder / name}: found a link, expected a regular file" in told.output
    assert not (tmp_path / "mlartifacts").exists()


# ---- runs


@pytest.mark.slow
@pytest.mark.parametrize("how", ["environment", "typed"])
def test_a_password_reaches_the_store_and_nothing_else(how, launch, tmp_path):
    store = MlflowServer(tmp_path / "server")
    secret = token_hex(8)
    uri = store.uri.replace("://", f"://user:{secret}@")
    named = {STORE: uri} if how == "environment" else {}
    typed = () if how == "environment" else (f"tracking.uri={uri}",)
    keys = {"env": os.environ | named}
    server, said = store.start(), []
    try:
        said.append(launch(*TINY, "distiller=none", *typed, **keys))
        local = ("hydra/launcher=local", "hydra.launcher.processes=1", "device=cpu", "spot_mode=fixed")
        cells = (*TINY, *local, "distiller=kd,at", "teacher.training.epochs=1", *typed)
        said.append(launch("-m", *cells, **keys))
        said.append(launch("-m", *TINY, "distiller=none", "seed=1,2", *typed, **keys))
        said.append(launch(*TINY, "distiller=none", *typed, **keys))
        failing = (*TINY, "distiller=none", "optimizer.lr=-1", *typed)
        said.append(launch("-m", *failing, "seed=3,4", expect=1, **keys))
        runs = [run for name in ("sakd", "sakd-teachers") for run in tracked_cells(store.uri, name)]
        assert len([run for run in runs if run.info.status == "FINISHED"]) == 6
    finally:
        store.stop(server)
    said.append(launch(*TINY, "distiller=none", "seed=9", *typed, **keys))  # the server is away
    assert secret not in "".join(done.stdout + done.stderr for done in said)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "submission.json" for path in files)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
