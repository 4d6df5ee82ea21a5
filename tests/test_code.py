"""Which code runs, and copies of it that stay as they are."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sakd import __version__
from sakd.errors import RunError
from sakd.runs import code, copies
from tests.conftest import ROOT, TINY


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(root), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout


def commit(root: Path) -> str:
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=all")
    return git(root, "rev-parse", "HEAD").strip()


def checkout(folder: Path) -> Path:
    """A git checkout of this project as it is now, in ``folder``."""
    folder.mkdir()
    for name in ("sakd", "hydra_plugins", "sweeps", "conf"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("launch.py", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    commit(folder)
    return folder


@pytest.fixture
def small(tmp_path):
    """A checkout of three files, one of them in a folder, and what it ignores."""
    root = tmp_path / "small"
    (root / "sakd").mkdir(parents=True)
    (root / "sakd/module.py").write_text("ANSWER = 41\n")
    (root / "launch.py").write_text("import sakd\n")
    (root / ".gitignore").write_text("/runs/\n*.log\n")
    commit(root)
    (root / "runs").mkdir()
    (root / "runs/result.json").write_text("{}")
    (root / "my.log").write_text("noise")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_has_tracked_and_untracked_files_as_they_are_and_none_that_are_ignored(small, tmp_path):
    (small / "sakd/module.py").write_text("ANSWER = 42\n")
    (small / "sakd/näu.py").write_text("untracked\n")
    (small / "sakd/new.txt").write_text("no code until git tracks it\n")
    (small / "launch.py").unlink()
    copy = contents(code.snapshot(tmp_path, small))
    assert copy.pop("snapshot.json")
    assert copy.pop("snapshot.diff")
    assert copy == {
        ".gitignore": b"/runs/\n*.log\n",
        "sakd/module.py": b"ANSWER = 42\n",
        "sakd/näu.py": b"untracked\n",
    }


def test_a_copy_has_what_a_link_to_a_folder_leads_to(small, tmp_path):
    (small / "alias").symlink_to("sakd", target_is_directory=True)
    commit(small)
    copy = code.snapshot(tmp_path, small)
    assert (copy / "alias/module.py").read_text() == "ANSWER = 41\n"


def test_a_copy_is_made_once_for_one_state_and_anew_for_another(small, tmp_path):
    first = code.snapshot(tmp_path, small)
    noted = (first / "snapshot.json").read_bytes(), first.stat().st_mtime_ns
    (small / "my.log").write_text("more noise")
    assert code.snapshot(tmp_path, small) == first
    assert ((first / "snapshot.json").read_bytes(), first.stat().st_mtime_ns) == noted
    (small / "sakd/module.py").write_text("ANSWER = 42\n")
    second = code.snapshot(tmp_path, small)
    assert second != first
    assert (first / "sakd/module.py").read_text() == "ANSWER = 41\n"
    assert (second / "sakd/module.py").read_text() == "ANSWER = 42\n"
    commit(small)  # the same files, of another commit
    assert code.snapshot(tmp_path, small) not in (first, second)
    assert len(list((tmp_path / ".code").iterdir())) == 3


def test_a_copy_tells_the_commit_and_what_differs_from_it(small, tmp_path):
    (small / "sakd/module.py").write_text("ANSWER = 42\n")
    (small / "sakd/new.py").write_text("untracked\n")
    copy = code.snapshot(tmp_path, small)
    now = git(small, "rev-parse", "HEAD").strip()
    shutil.rmtree(small)
    told, difference = code.running(copy)
    assert (told.commit, told.changed) == (now, True)
    assert told.snapshot.endswith(f"({copy.name})")
    assert "-ANSWER = 41\n+ANSWER = 42\n" in difference
    assert "+++ b/sakd/new.py\n@@ -0,0 +1 @@\n+untracked\n" in difference
    assert str(told).startswith(f"commit {now[:12]} with changes, as it was at ")


def test_a_checkout_without_changes_has_no_difference(small, tmp_path):
    now = git(small, "rev-parse", "HEAD").strip()
    assert code.running(small) == (code.Code(now, False, version=__version__), "")
    told, difference = code.running(code.snapshot(tmp_path, small))
    assert (told.commit, told.changed, difference) == (now, False, "")


def test_a_copy_of_a_copy_is_itself(small, tmp_path):
    copy = code.snapshot(tmp_path, small)
    assert code.snapshot(tmp_path / "further", copy) == copy
    assert not (tmp_path / "further").exists()


def test_outside_of_git_the_package_is_copied_and_no_commit_told(tmp_path):
    shutil.copytree(ROOT / "sakd", tmp_path / "plain/sakd", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "plain/private.txt").write_text("no part of the package")
    script = (
        "from pathlib import Path; from sakd.runs import code; print(code.snapshot(Path('..')).absolute())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "plain", capture_output=True, text=True, check=True
    )
    copy = Path(done.stdout.strip())
    assert contents(copy / "sakd") == {
        name: text for name, text in contents(tmp_path / "plain/sakd").items() if "__pycache__" not in name
    }
    assert sorted(path.name for path in copy.iterdir()) == ["sakd", "snapshot.diff", "snapshot.json"]
    told, difference = code.running(copy)
    assert (told.commit, told.changed, difference) == (None, None, "")
    assert str(told).startswith(f"version {__version__}, no git checkout, as it was at ")


def test_new_files_are_code_in_the_projects_folders_and_in_plug_ins_that_are_named_alone(small, tmp_path):
    theirs = {"their_kd/loss.py", "their_kd/conf/new.yaml", "their_loss.py"}
    for path in ("sakd/new.py", "conf/distiller/new.yaml", *theirs):
        (small / path).parent.mkdir(parents=True, exist_ok=True)
        (small / path).write_text(f"{path}\n")
    for path in ("build/lib/sakd/old.py", "notebook.py", "others/x.py", ".venv/lib/torch/x.py", "sakd/x.bin"):
        (small / path).parent.mkdir(parents=True, exist_ok=True)
        (small / path).write_text("no code of ours\n")
    before = contents(code.snapshot(tmp_path, small))
    assert {path for path in before if "new" in path} == {"sakd/new.py", "conf/distiller/new.yaml"}
    named = {"their_kd.loss.Theirs", "their_loss.Loss", "torch.optim.SGD"}
    copy = code.snapshot(tmp_path, small, packages=named)
    assert contents(copy).keys() - before.keys() == theirs
    for path in ("their_kd/loss.py", "their_loss.py"):
        assert f"+++ b/{path}\n" in (copy / "snapshot.diff").read_text()


@pytest.mark.parametrize("text", ["", "one line", "one line\n", "a\n\nc\r\n", "a\x0cb\nc"])
def test_a_new_file_of_the_difference_is_there_again_once_git_has_applied_it(text, small, tmp_path):
    (small / "sakd/new.py").write_bytes(text.encode())
    patch = code.running(small)[1]
    (small / "sakd/new.py").unlink()
    subprocess.run(["git", "-C", str(small), "apply", "-"], input=patch.encode(), check=True)
    assert (small / "sakd/new.py").read_bytes() == text.encode()


CHANGES = {
    "a line more": ("sakd/module.py", lambda path: path.write_text(path.read_text() + "print('changed')\n")),
    "a file more": ("torch.py", lambda path: path.write_text("print('changed')\n")),
    "bytecode": ("sakd/__pycache__/module.cpython-311.pyc", lambda path: path.write_bytes(b"changed")),
    "a file less": ("launch.py", Path.unlink),
    "another commit": (
        "snapshot.json",
        lambda path: path.write_text(path.read_text().replace('"commit": "', '"commit": "f')),
    ),
    "no note": ("snapshot.json", lambda path: path.write_text("[]")),
    "another difference": ("snapshot.diff", lambda path: path.write_text("+none\n")),
    "a link": (
        "sakd/module.py",
        lambda path: (
            path.rename(path.parents[3] / "module.py"),
            path.symlink_to(path.parents[3] / "module.py"),
        ),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_that_is_not_what_was_copied_is_named_and_not_used(change, small, tmp_path):
    copy = code.snapshot(tmp_path, small)
    check = [
        sys.executable,
        "-I",
        "-c",
        Path(copies.__file__).read_text(),
        str(copy),
    ]  # as a job's script does
    assert subprocess.run(check, capture_output=True, text=True, check=True).stderr == ""
    path, changed = CHANGES[change]
    (copy / path).parent.mkdir(exist_ok=True)
    changed(copy / path)
    told = f"{copy / path}: is not as it was copied"
    for use in (code.running, lambda copy: code.snapshot(tmp_path, small), code.check_copy):
        with pytest.raises(RunError, match=f"^{re.escape(told)}.*; move {copy} away, and launch again$"):
            use(copy)
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(told)


def test_processes_that_copy_at_once_get_one_whole_copy(small, tmp_path):
    for number in range(200):
        (small / f"sakd/module{number}.py").write_text(f"NUMBER = {number}\n")
    commit(small)
    start = tmp_path / "start"
    script = "import sys; from pathlib import Path; from sakd.runs import code; print('ready', flush=True)\n"
    script += "runs, root, start = map(Path, sys.argv[1:])\nwhile not start.exists(): pass\n"
    script += "print(code.snapshot(runs, root))"
    command = [sys.executable, "-c", script, str(tmp_path), str(small), str(start)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    start.touch()
    (folder,) = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert {process.returncode for process in processes} == {0}
    assert [str(path) for path in (tmp_path / ".code").iterdir()] == [folder]
    assert len(contents(Path(folder))) == 203 + 2


def test_a_folder_where_nobody_can_write_is_named(small, tmp_path):
    (tmp_path / ".code").write_text("a file")
    with pytest.raises(RunError, match=f"cannot copy the code to {tmp_path}/.code"):
        code.snapshot(tmp_path, small)


def test_an_installed_package_in_the_checkout_of_another_project_is_told_by_its_version(small):
    """The environment that it is installed in lies there."""
    (small / "sakd/conf").mkdir()
    assert code.running(small) == (code.Code(None, None, version=__version__), "")


@pytest.mark.slow
def test_a_run_of_changed_code_leaves_the_difference_until_it_is_committed(tmp_path):
    root = checkout(tmp_path / "checkout")
    with (root / "sakd/training/trainer.py").open("a") as file:
        file.write("# changed\n")
    command = [
        sys.executable,
        str(root / "launch.py"),
        *TINY[:-1],
        "epochs=1",
        "distiller=none",
        "tracking=none",
    ]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["code"] == {
        "commit": git(root, "rev-parse", "HEAD").strip(),
        "changed": True,
        "snapshot": None,
        "version": __version__,
    }
    difference = (folder / "code.diff").read_text()
    assert "+++ b/sakd/training/trainer.py" in difference
    assert "\n+# changed\n" in difference
    commit(root)
    script = "import yaml; from sakd.runs import Run; config = yaml.safe_load(open('config.yaml')); "
    script += "Run(config | {'runs': '..'}).start()"
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, check=True)
    assert not (folder / "code.diff").exists()
