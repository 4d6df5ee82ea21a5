"""Profile of a few steps: where their time goes.

It is a trace that Perfetto opens, and the most expensive operations as a table.
"""

import logging
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from sakd.files import write_whole

log = logging.getLogger("sakd")

SKIPPED, WARM_UP, STEPS = 5, 2, 10
OPERATIONS = 10


class Profile:
    """Watches steps 8 to 17 of this process' first epoch.

    Leaves ``trace.json`` and ``profile.txt`` in ``folder``. An epoch of fewer steps leaves what there was of
    it.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        plan = schedule(wait=SKIPPED, warmup=WARM_UP, active=STEPS, repeat=1)
        self.profiler = profile(
            activities=activities, schedule=plan, on_trace_ready=self._write, record_shapes=True
        )

    def __enter__(self) -> "Profile":
        self.profiler.start()
        return self

    def step(self) -> None:
        """Take in that a step is done; to be called after every one."""
        self.profiler.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.profiler.stop()

    def _write(self, profiler: profile) -> None:
        partial = self.folder / "trace.json.partial"
        profiler.export_chrome_trace(str(partial))
        partial.replace(self.folder / "trace.json")
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=OPERATIONS, max_name_column_width=60)
        write_whole(self.folder / "profile.txt", table.encode())
        log.info(
            "a profile of %d steps is in %s (open trace.json in Perfetto) and profile.txt", STEPS, self.folder
        )
