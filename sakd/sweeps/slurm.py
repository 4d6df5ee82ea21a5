"""What SLURM is asked: which jobs it has, to cancel some, how many nodes a partition has."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sakd.errors import SlurmError

AT_ONCE = 200  # names or jobs of one command line


WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


@dataclass(frozen=True)
class Queued:
    """A job that SLURM has not done with: its ``id`` (of an array's job ARRAY_INDEX), ``state`` and why it
    waits."""

    id: str
    state: str
    reason: str

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def is_ending(self) -> bool:
        """Perhaps on its way back into the queue."""
        return self.state == "COMPLETING"


def queue(names: Sequence[str]) -> dict[tuple[str, int], Queued]:
    """Jobs with one of these names that are waiting or running, by name and index in their array (0 outside
    of one).

    Raises SlurmError where SLURM does not answer: without it a waiting job could not be told from a lost one.
    """
    found = {}
    for start in range(0, len(names), AT_ONCE):
        wanted = ",".join(names[start : start + AT_ONCE])
        told = _ask("squeue", "--noheader", "--array", f"--name={wanted}", "--format=%F|%K|%i|%T|%r|%j")
        for line in told.splitlines():
            base, index, job, state, reason, name = line.split("|", 5)
            array = index.isdigit()
            why = reason if state == "PENDING" else state
            found[name, int(index) if array else 0] = Queued(f"{base}_{index}" if array else job, state, why)
    return found


def cancel(jobs: Iterable[str]) -> None:
    """Take these jobs out of the queue, or end them with SIGTERM. Raises SlurmError."""
    jobs = list(jobs)
    for start in range(0, len(jobs), AT_ONCE):
        _ask("scancel", *jobs[start : start + AT_ONCE])


def largest_array() -> int:
    """How many jobs one array may have."""
    told = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), flags=re.MULTILINE)
    return max(1, int(told[1]) - 1) if told else 1000


def nodes(launcher: Mapping[str, object]) -> tuple[str, int]:
    """The partition that jobs would go to, and on how many nodes they may run. Raises SlurmError for an
    unknown partition."""
    partition = launcher.get("partition") or os.environ.get("SBATCH_PARTITION")
    told = [line.split("|") for line in _ask("sinfo", "--noheader", "--format=%P|%D").splitlines()]
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
    if launcher.get("nodelist"):
        total = len(_ask("scontrol", "show", "hostnames", str(launcher["nodelist"])).split())
    return str(partition), total


def _ask(*command: str) -> str:
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
