"""Hand what a sweep lacks to SLURM, or to processes on this machine; nothing that is done or on its way."""

import logging
import os
import shlex
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from sakd import code, tracking
from sakd.compose import Sweep
from sakd.errors import ConfigError, SlurmError
from sakd.sweeps import slurm, submissions
from sakd.sweeps.here import run_here
from sakd.sweeps.plan import Job, Plan, plan
from sakd.sweeps.state import ON_THEIR_WAY, STATES, Standing, survey
from sakd.sweeps.submissions import Array, Submission
from sakd.sweeps.work import Work

log = logging.getLogger("sakd")

SECONDS_BETWEEN_LOOKS = 10.0
# Keys of hydra.launcher, as submitit's executors have them in common, and as its SLURM executor has them.
SUBMITITS = ("gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")
SLURMS = ("partition", "account", "qos", "constraint", "nodelist", "exclude", "signal_delay_s", "array_parallelism")


def launch(sweep: Sweep, only: Collection[str] = ("missing", "failed", "lost")) -> None:
    """Submit the cells whose state is in ``only``, and what they need first. SystemExit(1) if it waits, and not all finish.

    Raises a SakdError before anything is submitted for what is wrong.
    """
    planned = plan(sweep)
    local = _is_local(sweep.launcher)
    if not local:
        _check_store(planned, sweep.launcher)
    with ExitStack() as alive:
        with submissions.deciding(planned.runs):
            standings = survey(planned.jobs, planned.runs)
            settle(planned, standings)
            wanted = _wanted(planned, standings, only)
            log.info("%s", summary(standings[job.name] for job in planned.cells))
            submission = _record(planned, wanted) if wanted else None
            if submission is None:
                log.info("nothing to submit")
            elif local:
                alive.enter_context(submission.alive())
            else:
                _submit(submission, wanted, standings, sweep.launcher)
                log.info("submitted %s", _told(submission))
        log.info("how it goes: sakd status %s", " ".join(map(shlex.quote, sweep.overrides)))
        if local and submission is not None:
            run_here(submission, wanted, sweep.launcher["processes"])
    if not local and not sweep.launcher["wait"]:
        return
    last = _awaited(planned)
    if any(last[job.name].state != "finished" for job in planned.cells):
        raise SystemExit(1)


def _is_local(launcher: Mapping[str, Any]) -> bool:
    return str(launcher["_target_"]).endswith("LocalLauncher")


def as_before(sweep: Sweep) -> Sweep:
    """With the launcher that its cells were last submitted with, unless the overrides choose one. ConfigError for none."""
    if any(text.startswith("hydra/launcher=") for text in sweep.overrides):
        return sweep
    planned = plan(sweep)
    last = submissions.latest(submissions.read(planned.runs))
    found = [last[job.name] for job in planned.cells if job.name in last]
    if not found:
        raise ConfigError("hydra/launcher: found none, and these cells were never submitted; expected slurm or local")
    return replace(sweep, launcher=max(found, key=lambda submission: submission.time).launcher)


def settle(planned: Plan, standings: Mapping[str, Standing]) -> None:
    """Runs that were killed without warning do not stay RUNNING in MLflow."""
    for job in planned.jobs:
        if standings[job.name].state in ("lost", "failed") and tracking.goes_on(job.run.folder):
            outcome = tracking.settle(job.run.folder, lost=True)
            if isinstance(outcome, Exception):
                log.warning("%s: MLflow cannot be told that it is lost (%s); `sakd sync` will", job.name, outcome)
                return  # the store is away: the others would wait for it, too


def cancel(planned: Plan) -> int:
    """Take the sweep's waiting jobs out of the queue and end those that run; the number of jobs.

    Of processes here, a whole launch ends that has some of these cells. Raises ConfigError where it is another machine's.
    """
    with submissions.deciding(planned.runs):
        standings = survey(planned.jobs, planned.runs)
        last = submissions.latest(submissions.read(planned.runs))
        at_slurm = {name: standing.job for name, standing in standings.items() if standing.job is not None}
        for name in at_slurm:
            submissions.note_failure(last[name].folder, name, "cancelled")
        slurm.cancel(at_slurm.values())
        others = [name for name, found in standings.items() if found.state in ON_THEIR_WAY[1:] and name not in at_slurm]
        here = [name for name in others if name in last and last[name].is_local and last[name].is_alive()]
        for submission in {last[name].folder: last[name] for name in here}.values():
            if submission.by != submissions.us():
                raise ConfigError(f"{submission.folder}: is of {submission.by}, found {submissions.us()}; cancel it there")
            for name in here:
                if last[name] is submission and standings[name].state == "queued":
                    submissions.note_failure(submission.folder, name, "cancelled")
            os.kill(submission.pid, signal.SIGTERM)
        return len(at_slurm) + len(here)


def _wanted(planned: Plan, standings: Mapping[str, Standing], only: Collection[str]) -> list[Job]:
    """Cells in these states, and all that they need and that is neither done nor on its way, each behind what it needs."""
    by_name = {job.name: job for job in planned.jobs}
    chosen: dict[str, Job] = {}

    def choose(job: Job) -> None:
        if standings[job.name].state in ON_THEIR_WAY or job.name in chosen:
            return
        for name in job.needs:
            choose(by_name[name])
        chosen[job.name] = job

    for job in planned.cells:
        if standings[job.name].state in only:
            choose(job)
    return list(chosen.values())


def _arrays(wanted: Sequence[Job], largest: int) -> list[list[Job]]:
    """Jobs that wait for the same: one array (of at most ``largest``) each, each behind what it waits for."""
    names = {job.name for job in wanted}
    groups: dict[tuple[int, tuple[str, ...]], list[Job]] = {}
    depths: dict[str, int] = {}
    for job in wanted:
        needs = tuple(name for name in job.needs if name in names)
        depths[job.name] = 1 + max((depths[name] for name in needs), default=-1)
        groups.setdefault((depths[job.name], job.needs), []).append(job)
    ordered = (groups[key] for key in sorted(groups, key=lambda key: key[0]))
    return [jobs[start : start + largest] for jobs in ordered for start in range(0, len(jobs), largest)]


def _record(planned: Plan, wanted: Sequence[Job]) -> Submission:
    """What is about to be handed over, on the disk before it is; with the code copied and the store set up."""
    _prepare_store(wanted)
    copy = code.snapshot(planned.runs / ".code")
    folder = submissions.new_folder(planned.runs)
    largest = len(wanted) if _is_local(planned.sweep.launcher) else slurm.largest_array()
    arrays = [Array(f"sakd-{folder.name}-{i}", [job.name for job in jobs]) for i, jobs in enumerate(_arrays(wanted, largest))]
    needs = {job.name: list(job.needs) for job in wanted if job.needs}
    sweep = planned.sweep
    submission = Submission(folder, dict(sweep.launcher), arrays, needs, list(sweep.overrides), str(copy.absolute()))
    submission.write({job.name: job.run.config for job in wanted})
    log.info("jobs run the code of %s, copied to %s", code.running(copy)[0], copy)
    return submission


def _submit(
    submission: Submission, wanted: Sequence[Job], standings: Mapping[str, Standing], launcher: Mapping[str, Any]
) -> None:
    by_name = {job.name: job for job in wanted}
    ids = {name: standing.job for name, standing in standings.items() if standing.job is not None}
    try:
        for array in submission.arrays:
            needs = {name for run in array.runs for name in by_name[run].needs}
            before = sorted(ids[name] for name in needs if name in ids)
            ids |= _submit_array(submission, array, before, launcher)
    except SlurmError:
        slurm.cancel(ids[name] for name in by_name if name in ids)
        submission.withdraw()
        raise


def _submit_array(submission: Submission, array: Array, before: Sequence[str], launcher: Mapping[str, Any]) -> dict[str, str]:
    """SLURM's id of each run's job."""
    import submitit

    keys = {key: launcher[key] for key in SUBMITITS if launcher.get(key) is not None}
    keys |= {f"slurm_{key}": launcher[key] for key in SLURMS if launcher.get(key) is not None}
    further = dict(launcher.get("additional_parameters") or {})
    if before:
        further |= {"dependency": "afterok:" + ":".join(before), "kill-on-invalid-dep": "yes"}
    environment = [
        f"export PYTHONPATH={shlex.quote(submission.snapshot)}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
        "export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}",
    ]
    try:
        executor = submitit.AutoExecutor(
            submission.logs(array.name).absolute(), cluster="slurm", slurm_max_num_timeout=launcher["max_num_timeout"]
        )
        executor.update_parameters(
            **keys,
            name=array.name,
            slurm_additional_parameters={"requeue": True, **further},
            slurm_setup=[*environment, *(launcher.get("setup") or [])],
            stderr_to_stdout=True,
        )
        jobs = executor.submit_array([Work(submission.folder.absolute(), run) for run in array.runs])
    except (RuntimeError, ValueError) as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise SlurmError(f"hydra.launcher: sbatch refused these keys ({reason.strip()})") from error
    return {run: job.job_id for run, job in zip(array.runs, jobs, strict=True)}


def _check_store(planned: Plan, launcher: Mapping[str, Any]) -> None:
    """An SQLite file is written by jobs of one machine alone."""
    partition, nodes = slurm.nodes(launcher)
    uris = {job.run.config["tracking"].get("uri") for job in planned.cells}
    files = [uri for uri in uris if uri is not None and tracking.is_a_file(uri)]
    if files and nodes > 1:
        raise ConfigError(
            f"tracking.uri: found {files[0]}, a file, for jobs on any of the {nodes} nodes of partition {partition}, which "
            "would damage it; expected a server. Start one, `mlflow server --host 0.0.0.0 --backend-store-uri "
            f"{files[0]}`, and set MLFLOW_TRACKING_URI=http://<its machine>:5000; or use tracking=none"
        )


def _prepare_store(wanted: Iterable[Job]) -> None:
    """Before jobs start, so that they do not set up a fresh one all at once."""
    stores: dict[str, set[str]] = {}
    for job in wanted:
        settings = job.run.config["tracking"]
        if settings["name"] == "mlflow":
            stores.setdefault(settings["uri"], set()).add(settings["experiment"])
    for uri, experiments in stores.items():
        error = tracking.prepare(uri, sorted(experiments))
        if error is not None:
            log.warning(
                "MLflow at %s cannot be reached (%s). Jobs run unharmed; `sakd sync` sends what is missing", uri, error
            )


def _awaited(planned: Plan) -> dict[str, Standing]:
    """How it stands once nothing of it runs or waits."""
    before = ""
    while True:
        standings = survey(planned.jobs, planned.runs)
        settle(planned, standings)
        now = summary(standings[job.name] for job in planned.cells)
        if now != before:
            log.info("%s", now)
        if not any(standing.state in ("running", "queued") for standing in standings.values()):
            return standings
        before = now
        time.sleep(SECONDS_BETWEEN_LOOKS)


def summary(standings: Iterable[Standing]) -> str:
    """How many there are in each state."""
    counts = Counter(standing.state for standing in standings)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{sum(counts.values())} cells: {told}"


def _told(submission: Submission) -> str:
    numbers = [len(array.runs) for array in submission.arrays]
    return f"{sum(numbers)} jobs in {len(numbers)} arrays; logs in {submission.folder / 'logs'}"
