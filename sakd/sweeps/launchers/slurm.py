"""Jobs of SLURM: arrays through submitit, and what SLURM is asked of them."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sakd.errors import ConfigError, SlurmError
from sakd.ranges import Count, Natural, Positive, Processes, Text, Threads
from sakd.runs import tracking
from sakd.sweeps.launchers.base import Launcher, Queue, Queued
from sakd.sweeps.plan import Plan
from sakd.sweeps.submissions import Array, Place, Submission, needs_of

AT_ONCE = 200  # names or jobs of one command line
UNCONFIRMED = 10.0  # seconds in which jobs of a launch that died may still come to SLURM
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
# Settings that all of submitit's executors have, and those of its executor for SLURM.
GENERIC = ("gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")
OF_SLURM = (
    *("partition", "account", "qos", "constraint", "nodelist", "exclude"),
    *("signal_delay_s", "array_parallelism"),
)
# Options of sbatch that are set here.
OURS = (
    *("dependency", "kill-on-invalid-dep", "array", "job-name", "output", "error", "open-mode", "signal"),
    "requeue",
)


@dataclass(frozen=True)
class SlurmSettings:
    """The keys of hydra/launcher=slurm; what may be None is then left to the cluster, or to sbatch's own
    variables."""

    partition: Text | None  # one, or several with commas
    account: Text | None  # that pays
    qos: Text | None  # quality of service
    constraint: Text | None  # features that a node must have
    nodelist: Text | None  # nodes that must be among a job's
    exclude: Text | None  # nodes that must not
    gpus_per_node: Processes | None  # None: no GPU
    cpus_per_task: Threads | None  # of a job, which is one task
    mem_gb: Positive | None  # of a job
    timeout_min: Count  # of a turn
    signal_delay_s: Natural  # so long before the limit a job is told
    max_num_timeout: Natural  # so many turns
    array_parallelism: Count  # jobs of one array at a time
    setup: list[str]  # shell commands before a job
    additional_parameters: dict[str, object]  # any other option of sbatch
    wait: bool  # True: a launch is over once its runs are

    def __post_init__(self):
        """Raise ConfigError for an option of sbatch that has a key of its own, or that sakd sets."""
        for key in self.additional_parameters:
            plain = str(key).replace("_", "-")
            if plain in OURS or hasattr(self, str(key)):
                better = f"hydra.launcher.{key}" if hasattr(self, str(key)) else "none: sakd sets it itself"
                raise ConfigError(f"hydra.launcher.additional_parameters: found {key}, expected {better}")


class SlurmLauncher(Launcher):
    """Launcher of `hydra/launcher=slurm`: hands over and returns, unless it is to wait."""

    Settings = SlurmSettings

    @property
    def waits(self) -> bool:
        return self.settings.wait

    def check(self, planned: Plan) -> None:
        """Refuse an SQLite store where jobs may run on several machines."""
        partition, count = nodes(self.settings)
        uris = {cell.run.config["tracking"].get("uri") for cell in planned.cells}
        files = [uri for uri in uris if uri is not None and tracking.is_a_file(uri)]
        if files and count > 1:
            raise ConfigError(
                f"tracking.uri: found {files[0]}, a file, for jobs on any of the {count} nodes of partition "
                f"{partition}, which would damage it; expected a server. Start one, `mlflow server --host "
                f"0.0.0.0 --backend-store-uri {files[0]}`, and set MLFLOW_TRACKING_URI=http://<its "
                "machine>:5000; or use tracking=none"
            )

    def largest_array(self) -> int:
        told = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), flags=re.MULTILINE)
        return max(1, int(told[1]) - 1) if told else 1000

    def submit(self, submission: Submission, under_way: Mapping[str, str]) -> None:
        ids = dict(under_way)
        handed_over: list[str] = []
        try:
            for array in submission.arrays:
                jobs = self._submit_array(submission, array, ids)
                handed_over += jobs
                ids |= {run: id for id, job in zip(jobs, array.jobs, strict=True) for run in job}
        except BaseException:
            with suppress(SlurmError):
                self.cancel(handed_over)
            raise
        submission.confirm()

    def _submit_array(self, submission: Submission, array: Array, ids: Mapping[str, str]) -> list[str]:
        """Submit one array; SLURM's id of each job. ``ids``: by run, of the jobs submitted before."""
        import submitit

        from sakd.sweeps.work import Work

        settings = asdict(self.settings)
        keys = {key: settings[key] for key in GENERIC if settings[key] is not None}
        keys |= {f"slurm_{key}": settings[key] for key in OF_SLURM if settings[key] is not None}
        further = {"requeue": True, **self.settings.additional_parameters}
        # All jobs of an array wait for the same.
        if dependency := _dependency(array.jobs[0], submission.needs, ids):
            further |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
        environment = [
            f"{shlex.join(submission.check())} || exit 1",
            *(f"export {name}={shlex.quote(value)}" for name, value in submission.environment().items()),
            "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
            # srun no longer takes this from the job by itself.
            "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
            # Where a cluster tells the shell, too, that time is up, it must not end before its job has.
            "trap : USR2",
        ]
        try:
            executor = submitit.AutoExecutor(
                submission.logs(array.name).absolute(),
                cluster="slurm",
                slurm_max_num_timeout=self.settings.max_num_timeout,
            )
            executor.update_parameters(
                **keys,
                name=array.name,
                slurm_additional_parameters=further,
                slurm_setup=[*environment, *self.settings.setup],
                stderr_to_stdout=True,
            )
            jobs = executor.submit_array([Work(submission.folder.absolute(), job) for job in array.jobs])
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
            raise SlurmError(f"hydra.launcher: sbatch refused these keys ({reason})") from error
        return [job.job_id for job in jobs]

    def carry_out(self, submission: Submission) -> None:
        """Do nothing: its jobs are the cluster's."""

    def queue(self, submissions: Sequence[Submission]) -> Queue:
        """Ask SLURM. Raises SlurmError where it does not answer: without it a waiting job could not be told
        from a lost one."""
        unconfirmed = [submission.time for submission in submissions if not submission.is_confirmed]
        if unconfirmed:  # its launch may have died, its jobs be on their way yet
            time.sleep(min(max(0.0, max(unconfirmed) + UNCONFIRMED - time.time()), UNCONFIRMED))
        names = [array.name for submission in submissions for array in submission.arrays]
        found: dict[Place, Queued] = {}
        for start in range(0, len(names), AT_ONCE):
            wanted = ",".join(names[start : start + AT_ONCE])
            told = ask("squeue", "--noheader", "--array", f"--name={wanted}", "--format=%F|%K|%i|%T|%r|%j")
            for line in told.splitlines():
                base, index, job, state, reason, name = line.split("|", 5)
                in_array = index.isdigit()  # a job alone is no array
                found[name, int(index) if in_array else 0] = Queued(
                    "waiting" if state in WAITING else "ending" if state == "COMPLETING" else "running",
                    f"{base}_{index}" if in_array else job,
                    reason if state == "PENDING" else state,
                )
        return found

    def cancel(self, ids: Iterable[str]) -> None:
        """Take them out of the queue, or end them with SIGTERM. Raises SlurmError."""
        ids = list(ids)
        for start in range(0, len(ids), AT_ONCE):
            ask("scancel", *ids[start : start + AT_ONCE])

    def logs(self, submission: Submission) -> dict[Place, Path]:
        """Find logs under submitit's names: JOB_INDEX_TASK, or JOB_TASK outside of an array."""
        found = {}
        for array in submission.arrays:
            for path in submission.logs(array.name).iterdir():
                if match := re.fullmatch(r"\d+(?:_(\d+))?_0_log\.out", path.name):
                    found[array.name, int(match[1] or 0)] = path
        return found


def _dependency(job: Sequence[str], needs: Mapping[str, Sequence[str]], ids: Mapping[str, str]) -> str:
    """Say in sbatch's words that what all of a job's runs need must end well, and what some need must end."""
    told = []
    for condition, names in zip(("afterok", "afterany"), needs_of(job, needs), strict=True):
        waited_for = sorted(ids[name] for name in names if name in ids)
        told += [":".join([condition, *waited_for])] if waited_for else []
    return ",".join(told)


def nodes(settings: SlurmSettings) -> tuple[str, int]:
    """The partition that jobs would go to, and on how many nodes they may run. Raises SlurmError for an
    unknown partition."""
    partition = settings.partition or os.environ.get("SBATCH_PARTITION")
    told = [line.split("|") for line in ask("sinfo", "--noheader", "--format=%P|%D").splitlines()]
    known = sorted({name.rstrip("*") for name, _ in told})
    if partition is None:
        partition = next((name.rstrip("*") for name, _ in told if name.endswith("*")), None)
        if partition is None:
            raise SlurmError(
                "hydra.launcher.partition: found none, and the cluster has no default; it has "
                f"{', '.join(known)}"
            )
    chosen = str(partition).split(",")
    if unknown := sorted(set(chosen) - set(known)):
        raise SlurmError(
            f"hydra.launcher.partition: found {', '.join(unknown)}, expected one of {', '.join(known)}"
        )
    total = sum(int(count) for name, count in told if name.rstrip("*") in chosen)
    if settings.nodelist:
        total = len(ask("scontrol", "show", "hostnames", settings.nodelist).split())
    return str(partition), total


def ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except FileNotFoundError as error:
        raise SlurmError(f"found no command {command[0]}, expected SLURM's on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]}: no answer within a minute, expected SLURM's controller to answer"
        ) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason"])[-1]
        reason = re.sub(r"^(\w+: (error: )?|slurm_\w+ error: )", "", last)
        raise SlurmError(f"{command[0]}: {reason}") from error
    return done.stdout
