"""What SLURM would say to a sweep's jobs, and one that tries a node."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sakd.errors import SlurmError
from sakd.sweeps.launchers.slurm import SlurmSettings, ask, nodes

LIMIT_MIN = 1  # of the canary
PATIENCE = 600.0  # seconds that it may wait for its turn
BETWEEN_LOOKS = 1.0
EXAMINED = ("python", "packages", "torch", "cuda", "store", "runs")  # by the canary: data may take longer


def check_jobs(settings: SlurmSettings) -> str:
    """SLURM in one line. Raises SlurmError unless it would take jobs of these settings.

    It is asked for the partition, its limit of time, and, without a job being made, what sbatch says.
    """
    partition, count = nodes(settings)
    for name in partition.split(","):
        told = ask("sinfo", "--noheader", "--partition", name, "--format=%a|%l").split()[0]
        available, limit = told.split("|")
        if available != "up":
            raise SlurmError(
                f"hydra.launcher.partition: found {name}, which is {available}; expected one that is up"
            )
        minutes = _minutes(limit)
        if minutes is not None and settings.timeout_min > minutes:
            raise SlurmError(
                f"hydra.launcher.timeout_min: found {settings.timeout_min}, expected at most {minutes:g}, "
                f"the limit of partition {name}"
            )
    ask("sbatch", "--test-only", *_options(settings, settings.timeout_min), "--wrap=true")
    return f"partition {partition}, {count} nodes: takes jobs of these keys"


def _minutes(limit: str) -> float | None:
    """Minutes of SLURM's ``[days-]hours:minutes:seconds``; None for no limit."""
    if not (found := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)):
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def _options(settings: SlurmSettings, minutes: int) -> list[str]:
    chosen = {
        **{key: getattr(settings, key) for key in ("partition", "account", "qos", "constraint")},
        **{key: getattr(settings, key) for key in ("nodelist", "exclude")},
        "gpus-per-node": settings.gpus_per_node,
        "cpus-per-task": settings.cpus_per_task,
        "mem": None if settings.mem_gb is None else f"{int(settings.mem_gb * 1024)}M",
        "time": minutes,
        **settings.additional_parameters,
    }
    return [f"--{key.replace('_', '-')}={value}" for key, value in chosen.items() if value is not None]


def canary(settings: SlurmSettings, overrides: Sequence[str], runs: Path) -> str:
    """Let a job of one minute examine its node, and say in one line what it found.

    Its output lies below ``runs``, as that of a sweep's jobs, and is taken away. Raises SlurmError for what
    it finds wrong, and where it does not come to its turn.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs, prefix=".doctor-") as folder:
        output = Path(folder).absolute() / "canary"
        asked = [word for name in EXAMINED for word in ("--only", name)]
        own = ["device=cuda"] if settings.gpus_per_node else []  # what it asks SLURM for it must find
        own += [override for override in overrides if not override.startswith("hydra")]
        command = [sys.executable, "-m", "sakd", "doctor", "--format", "json", *asked, *own]
        script = "\n".join(
            ["#!/bin/bash", *settings.setup, f"{shlex.join(command)} > {shlex.quote(str(output))}"]
        )
        (Path(folder) / "job.sh").write_text(script + "\n")
        options = [
            *_options(settings, LIMIT_MIN),
            "--job-name=sakd-canary",
            f"--output={output}.log",
            "--parsable",
        ]
        job = ask("sbatch", *options, str(Path(folder) / "job.sh")).strip().partition(";")[0]
        try:
            _wait(job)
        finally:
            subprocess.run(["scancel", "--quiet", job], capture_output=True, timeout=60, check=False)
        return _read(output, job)


def _wait(job: str) -> None:
    until = time.monotonic() + PATIENCE
    while told := _queued(job):
        if time.monotonic() > until:
            raise SlurmError(
                f"job {job} was not over within {PATIENCE / 60:.0f} minutes ({told}); it is cancelled"
            )
        time.sleep(BETWEEN_LOOKS)


def _queued(job: str) -> str:
    try:
        return ask("squeue", "--noheader", f"--jobs={job}", "--format=%T, %r").strip()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # it is over, and forgotten
            return ""
        raise


def _read(output: Path, job: str) -> str:
    try:
        findings = json.loads(output.read_text())
    except (OSError, ValueError) as error:
        log = output.with_name("canary.log")
        last = (log.read_text().strip().splitlines() if log.exists() else []) or ["no output"]
        raise SlurmError(
            f"job {job}: found no findings of it below {output.parent.parent} ({last[-1]})"
        ) from error
    wrong = [f"{found['name']}: {found['told']}" for found in findings if found["state"] == "fail"]
    if wrong:
        raise SlurmError(f"job {job} found {'; '.join(wrong)}")
    return f"job {job} ran on a node, {next(found['told'] for found in findings if found['name'] == 'cuda')}"
