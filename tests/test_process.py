"""A process keeps the memory that a step frees for the next one, and its idle threads give way."""

import os
import re
import subprocess
import sys

import pytest

from sakd import process
from tests.conftest import ROOT

# Eight maps, as large as a batch's in the first stage of a ResNet for CIFAR, made and freed again and again.
FAULTS = """
import resource, sys
import numpy as np
from sakd.process import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("not glibc")
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [np.ones(2**20, dtype=np.float32) for _ in range(8)]
    del maps
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system had to give in the last of five rounds of 32 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if "not glibc" in done.stderr:
        pytest.skip("another C library")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_is_freed_is_not_asked_of_the_system_again():
    assert faults("kept") < 100
    assert faults("as usual") > 1000  # else there would be nothing to arrange


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: object())
    assert not process.keep_freed_memory()
    monkeypatch.setattr(process.sys, "platform", "darwin")
    assert not process.keep_freed_memory()


def test_a_library_that_refuses_large_sizes_gets_a_smaller_one(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return int(parameter == process.TRIM_THRESHOLD or value == 2**25)

    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: Library())
    assert process.keep_freed_memory()
    assert asked == [(-3, 2**28), (-3, 2**25), (-1, 2**31 - 1)]


def spins(script: str, **environment: str) -> set[str]:
    """How long idle threads wait awake in a process, as its OpenMP libraries say when they are loaded."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True,
        env={key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        | {"OMP_DISPLAY_ENV": "VERBOSE"} | environment,
    )  # fmt: skip
    found = {*re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)}
    if not found:
        pytest.skip("torch has another OpenMP")
    return found


@pytest.mark.slow
def test_idle_threads_give_way_soon_unless_the_environment_says_otherwise():
    script = "from sakd.process import set_up; set_up(); import torch"
    assert spins(script) == {process.SPINS}
    assert spins("import benchmarks.step") == {process.SPINS}
    assert spins(script, GOMP_SPINCOUNT="5") == {"5"}
    assert not spins("import torch") & {process.SPINS}  # else there would be nothing to arrange


@pytest.mark.parametrize("module", ["launch", "sakd.sweeps.work"])
def test_what_sets_its_process_up_has_not_imported_torch_before(module):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=100, check=True)
