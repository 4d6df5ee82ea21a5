"""Hand what a sweep lacks to SLURM, or to processes on this machine; nothing that is done or on its way."""

import logging
import os
import shlex
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

import yaml

from sakd.errors import ConfigError, SlurmError
from sakd.runs import code, tracking
from sakd.sweeps import launchers, slurm, submissions
from sakd.sweeps.here import run_here
from sakd.sweeps.plan import Job, Plan
from sakd.sweeps.state import ON_THEIR_WAY, STATES, Standing, needed_elsewhere, survey
from sakd.sweeps.submissions import Array, Submission
from sakd.sweeps.work import Work

log = logging.getLogger("sakd")

SECONDS_BETWEEN_LOOKS = 10.0


def launch(planned: Plan, only: Collection[str] = ("missing", "failed", "lost")) -> None:
    """Submit the cells whose state is in ``only``, and what they need first. SystemExit(1) if it waits, and
    not all finish.

    Raises a SakdError before anything is submitted for what is wrong.
    """
    launcher = planned.sweep.launcher
    launchers.check(launcher)
    local = launchers.is_local(launcher)
    if not local:
        _check_store(planned)
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
                _submit(submission, wanted, standings)
                log.info("submitted %s", _told(submission))
        log.info("how it goes: sakd status %s", " ".join(map(shlex.quote, planned.sweep.overrides)))
        if local and submission is not None:
            run_here(submission, wanted, launcher["processes"])
    if not local and not launcher["wait"]:
        return
    last = _awaited(planned)
    if any(last[job.name].state != "finished" for job in planned.cells):
        raise SystemExit(1)


def as_before(planned: Plan, changes: Sequence[str] = ()) -> Plan:
    """With the launcher that its cells were last submitted with, but for ``changes``:
    hydra.launcher.KEY=VALUE.

    Raises ConfigError where they never were, or a change names no key of that launcher.
    """
    last = submissions.latest(submissions.read(planned.runs))
    found = [last[job.name] for job in planned.cells if job.name in last]
    if not found:
        raise ConfigError(
            "hydra/launcher: found none, and these cells were never submitted; expected slurm or local"
        )
    launcher = dict(max(found, key=lambda submission: submission.time).launcher)
    for change in changes:
        key, _, value = change.removeprefix("hydra.launcher.").partition("=")
        if key not in launcher:
            raise ConfigError(f"hydra.launcher.{key}: no such key; expected one of {', '.join(launcher)}")
        launcher[key] = yaml.safe_load(value)
    return replace(planned, sweep=replace(planned.sweep, launcher=launcher))


def settle(planned: Plan, standings: Mapping[str, Standing]) -> None:
    """Runs that were killed without warning do not stay RUNNING in MLflow."""
    for job in planned.jobs:
        if standings[job.name].state in ("lost", "failed") and tracking.goes_on(job.run.folder):
            outcome = tracking.mark_ended(job.run.folder, lost=True)
            if isinstance(outcome, Exception):
                log.warning(
                    "%s: MLflow cannot be told that it is over (%s); `sakd sync` will", job.name, outcome
                )
                return  # the store is away: the others would wait for it, too


def cancel(planned: Plan) -> tuple[int, list[str]]:
    """Take the sweep's waiting jobs out of the queue and end those that run: how many, and which runs go on
    elsewhere.

    What the cells need first is cancelled with them, unless other sweeps' jobs wait for it. Of processes
    here, a whole launch ends that has some of these cells."""
    with submissions.deciding(planned.runs):
        standings = survey(planned.jobs, planned.runs)
        last = submissions.latest(submissions.read(planned.runs))
        names = {job.name for job in planned.jobs}
        kept = needed_elsewhere([job.name for job in planned.first], names, planned.runs)
        under_way = [name for name in names if standings[name].state in ON_THEIR_WAY[1:] and name not in kept]
        at_slurm = [name for name in under_way if standings[name].job is not None]
        here = [name for name in under_way if name not in at_slurm and name in last and _is_ours(last[name])]
        for name in under_way:
            if name in at_slurm or (name in here and standings[name].state == "queued"):
                submissions.note_failure(last[name].folder, name, "cancelled")
        slurm.cancel(standings[name].job for name in at_slurm)
        for pid in {last[name].pid for name in here}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        return len(at_slurm) + len(here), sorted({*under_way} - {*at_slurm, *here})


def _is_ours(submission: Submission) -> bool:
    """Whether its jobs are processes of a launch on this machine that still goes on."""
    return submission.is_local and submission.by == submissions.us() and submission.is_alive()


def _wanted(planned: Plan, standings: Mapping[str, Standing], only: Collection[str]) -> list[Job]:
    """Cells in these states, and all that they need and that is neither done nor on its way, each behind what
    it needs."""
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
        depths[job.name] = 1 + max((depths[name] for name in job.needs if name in names), default=-1)
        groups.setdefault((depths[job.name], job.needs), []).append(job)
    ordered = (groups[key] for key in sorted(groups, key=lambda key: key[0]))
    return [jobs[start : start + largest] for jobs in ordered for start in range(0, len(jobs), largest)]


def _record(planned: Plan, wanted: Sequence[Job]) -> Submission:
    """What is about to be handed over, on the disk before it is; with the code copied and the store set
    up."""
    _prepare_store(wanted)
    sweep = planned.sweep
    copy = code.snapshot(planned.runs)
    folder = submissions.new_folder(planned.runs)
    largest = len(wanted) if launchers.is_local(sweep.launcher) else slurm.largest_array()
    arrays = [
        Array(f"sakd-{folder.name}-{i}", [job.name for job in jobs])
        for i, jobs in enumerate(_arrays(wanted, largest))
    ]
    needs = {job.name: list(job.needs) for job in wanted if job.needs}
    when = submissions.now(planned.runs)
    submission = Submission(
        folder, dict(sweep.launcher), arrays, needs, list(sweep.overrides), str(copy.absolute()), time=when
    )
    submission.write({job.name: job.run.config for job in wanted})
    log.info("jobs run the code of %s, copied to %s", code.running(copy)[0], copy)
    return submission


def _submit(submission: Submission, wanted: Sequence[Job], standings: Mapping[str, Standing]) -> None:
    """All of it, or, where SLURM refuses a part or this is interrupted, nothing."""
    needs = {job.name: job.needs for job in wanted}
    before = {name: standing.job for name, standing in standings.items() if standing.job is not None}
    ids: dict[str, str] = {}
    try:
        for array in submission.arrays:
            waited_for = {name for run in array.runs for name in needs[run]}
            ids |= _submit_array(
                submission, array, sorted(job for name, job in (before | ids).items() if name in waited_for)
            )
    except BaseException:
        with suppress(SlurmError):
            slurm.cancel(ids.values())
        submission.withdraw()
        raise
    submission.confirm()


def _submit_array(submission: Submission, array: Array, before: Sequence[str]) -> dict[str, str]:
    """SLURM's id of each run's job; they start once the jobs ``before`` have ended well."""
    import submitit

    launcher = submission.launcher
    keys = {key: launcher[key] for key in launchers.GENERIC if launcher[key] is not None}
    keys |= {f"slurm_{key}": launcher[key] for key in launchers.SLURM if launcher[key] is not None}
    further = {"requeue": True, **launcher["additional_parameters"]}
    if before:
        further |= {"dependency": "afterok:" + ":".join(before), "kill-on-invalid-dep": "yes"}
    environment = [
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
            slurm_max_num_timeout=launcher["max_num_timeout"],
        )
        executor.update_parameters(
            **keys,
            name=array.name,
            slurm_additional_parameters=further,
            slurm_setup=[*environment, *launcher["setup"]],
            stderr_to_stdout=True,
        )
        jobs = executor.submit_array([Work(submission.folder.absolute(), run) for run in array.runs])
    except (RuntimeError, ValueError) as error:
        reason = next(
            (line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__
        )
        raise SlurmError(f"hydra.launcher: sbatch refused these keys ({reason.strip()})") from error
    return {run: job.job_id for run, job in zip(array.runs, jobs, strict=True)}


def _check_store(planned: Plan) -> None:
    """An SQLite file is written by jobs of one machine alone."""
    partition, nodes = slurm.nodes(planned.sweep.launcher)
    uris = {job.run.config["tracking"].get("uri") for job in planned.cells}
    files = [uri for uri in uris if uri is not None and tracking.is_a_file(uri)]
    if files and nodes > 1:
        raise ConfigError(
            f"tracking.uri: found {files[0]}, a file, for jobs on any of the {nodes} nodes of partition "
            f"{partition}, which "
            "would damage it; expected a server. Start one, `mlflow server --host 0.0.0.0 "
            "--backend-store-uri "
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
        error = tracking.set_up_store(uri, sorted(experiments))
        if error is not None:
            log.warning(
                "MLflow at %s cannot be reached (%s). Jobs run unharmed; `sakd sync` sends what is missing",
                uri,
                error,
            )


def _awaited(planned: Plan) -> dict[str, Standing]:
    """How it stands once nothing of it runs or waits."""
    before = ""
    while True:
        try:
            standings = survey(planned.jobs, planned.runs)
        except SlurmError as error:  # its controller may be restarted
            log.warning("%s; asking again", error)
        else:
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
    return f"{_number(sum(counts.values()), 'cell')}: {told}"


def _told(submission: Submission) -> str:
    jobs = _number(sum(len(array.runs) for array in submission.arrays), "job")
    return f"{jobs} in {_number(len(submission.arrays), 'array')}; logs in {submission.folder / 'logs'}"


def _number(number: int, of: str) -> str:
    return f"{number} {of}{'s' * (number != 1)}"
