"""What a run's machine does meanwhile, where tracking.system_metrics asks for it.

``system.jsonl`` in the run's folder has a line for each sample, by MLflow's names, for the page's tab of
system metrics. They are of the whole machine: of all runs that train there.
"""

import contextvars
import json
import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sakd.errors import in_one_line
from sakd.files import append, read_whole
from sakd.runs.stored import Metrics

log = logging.getLogger("sakd")

FILE = "system.jsonl"
SECONDS_BETWEEN = 10.0  # samples
COUNTER = "system/cpu_utilization_percentage"  # every sample has it


class Sampling:
    """Samples the machine from a thread of its own, until it is to ``end``."""

    def __init__(self, folder: Path):
        self._folder, self._ended = folder, threading.Event()
        self._number = 0
        context = contextvars.copy_context()  # what it says goes to this run
        threading.Thread(target=context.run, args=(self._work,), name="samples", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _work(self) -> None:
        try:
            self._number = len(samples(self._folder))  # of those so far: the run may go on
            monitors = _monitors()
        except Exception as error:  # the run is worth no less for it
            log.warning("no system metrics: %s", in_one_line(error))
            return
        while True:
            with suppress(Exception):  # a full disk is told by what matters; a monitor may fail at any time
                self._sample(monitors)
            if self._ended.wait(SECONDS_BETWEEN):
                return

    def _sample(self, monitors: list[Any]) -> None:
        sample: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            sample |= {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self._number += 1
        append(self._folder / FILE, json.dumps({"sample": self._number, "time": time.time(), **sample}))


def _monitors() -> list[Any]:
    """MLflow's: of processor and memory, disk and network, and of GPUs where they can be asked."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # no GPU, or no nvidia-ml-py
        found.append(GPUMonitor())
    return found


def samples(folder: Path) -> list[Metrics]:
    """The samples of a run, but for what a kill has cut short."""
    *whole, _ = (read_whole(folder / FILE) or b"").split(b"\n")
    found = []
    for line in whole:
        with suppress(ValueError):
            sample = json.loads(line)
            fits = isinstance(sample, dict) and {"sample", "time", COUNTER} <= sample.keys()
            if fits and all(isinstance(value, (int, float)) for value in sample.values()):
                found.append(sample)
    return found
