"""Hand over what a sweep lacks, in cohorts, to its launcher; nothing that is done or on its way."""

import logging
import shlex
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import yaml

from sakd.configuration import flatten
from sakd.errors import ConfigError, SlurmError
from sakd.runs import code
from sakd.runs.tracking import PREPARATION, Delivery, goes_on, is_refusal, note_sweep, reason
from sakd.signals import uninterrupted
from sakd.sweeps import submissions
from sakd.sweeps.cohorts import cohorts
from sakd.sweeps.launchers import Launcher, launcher_of
from sakd.sweeps.plan import Plan, PlannedRun, check_parts
from sakd.sweeps.state import ON_THEIR_WAY, STATES, Standing, needed_elsewhere, open_jobs, survey
from sakd.sweeps.submissions import Array, Place, Submission, needs_of

log = logging.getLogger("sakd")

SECONDS_BETWEEN_LOOKS = 10.0

Standings = Mapping[str, Standing]  # by run


def launch(planned: Plan, only: Collection[str] = ("missing", "failed", "lost")) -> Standings | None:
    """Submit the cells whose state is in ``only``, and what they need first.

    How all stand once they are over; None where the launcher does not wait for that.

    Raises a SakdError before anything is submitted for what is wrong.
    """
    launcher = launcher_of(planned.sweep.launcher)
    launcher.check(planned)
    check_parts(planned.cells)
    delivery = Delivery(PREPARATION)  # other launches wait for this one's decision
    with submissions.deciding(planned.runs):
        standings = survey(planned.everything, planned.runs)
        settle(planned, standings, delivery)
        cells = {cell.name: cell.run.config for cell in planned.cells}
        note_sweep(cells, planned.sweep.overrides)
        wanted = _wanted(planned, standings, only)
        log.info("%s", summary(standings[cell.name] for cell in planned.cells))
        submission = _record(planned, wanted, launcher, delivery) if wanted else None
        if submission is None:
            log.info("nothing to submit")
        else:
            _submit(submission, launcher, standings)
            log.info("submitted %s", _told(submission))
    log.info("how it goes: sakd status %s", " ".join(map(shlex.quote, planned.sweep.overrides)))
    if submission is not None:
        launcher.carry_out(submission)
    awaited = _awaited(planned) if launcher.waits else None
    Delivery().catch_up(*(run.run for run in planned.everything))
    return awaited


def as_before(planned: Plan, changes: Sequence[str] = ()) -> Plan:
    """Plan with the launcher that its cells were last submitted with, but for ``changes``:
    hydra.launcher.KEY=VALUE.

    Raises ConfigError where they never were, or a change names no key of that launcher.
    """
    last = submissions.latest(submissions.read(planned.runs))
    found = [last[cell.name] for cell in planned.cells if cell.name in last]
    if not found:
        raise ConfigError(
            "hydra/launcher: found none, and these cells were never submitted; expected slurm or local"
        )
    keys = dict(max(found, key=lambda submission: submission.time).launcher)
    for change in changes:
        key, _, value = change.removeprefix("hydra.launcher.").partition("=")
        keys[key] = yaml.safe_load(value)
    launcher_of(keys)
    return replace(planned, sweep=replace(planned.sweep, launcher=keys))


def settle(planned: Plan, standings: Standings, delivery: Delivery | None = None) -> None:
    """Tell MLflow of runs that were killed without warning, which else stay RUNNING there.

    ``delivery``: of the command, where that has more to send.
    """
    delivery = delivery or Delivery(PREPARATION)
    for run in planned.everything:
        if standings[run.name].state in ("lost", "failed") and goes_on(run.run.folder):
            outcome = delivery.mark_ended(run.run.folder, lost=True)
            if isinstance(outcome, Exception):
                log.warning(
                    "%s: MLflow cannot be told that it is over (%s); `sakd sync` will",
                    run.name,
                    reason(outcome),
                    extra={"news": (run.name, "over")},
                )
                if not is_refusal(outcome):
                    return  # the store is away: the others would wait for it, too


def cancel(planned: Plan) -> tuple[int, list[str]]:
    """Let no job train the sweep's cells any more: how many were to be trained, and which runs go on
    elsewhere.

    A note is left for the job, which looks at it, and other members of its cohort go on; a job that has no
    others is ended. What the cells need first is cancelled with them, unless other sweeps' jobs wait for it.
    """
    with submissions.deciding(planned.runs):
        standings = survey(planned.everything, planned.runs)
        last = submissions.latest(submissions.read(planned.runs))
        kept = needed_elsewhere([run.name for run in planned.first], standings, planned.runs)
        under_way = [
            name
            for name, standing in standings.items()
            if standing.state in ("running", "queued") and name not in kept
        ]
        queue = open_jobs({last[name].folder: last[name] for name in under_way if name in last}.values())
        at_work = [name for name in under_way if name in last and last[name].places[name] in queue]
        for name in at_work:
            submissions.note_cancelled(last[name].folder, name)
        _end_jobs_without_members({last[name].places[name]: last[name] for name in at_work})
        cells = {cell.name for cell in planned.cells}
        return len(cells.intersection(at_work)), sorted({*under_way} - {*at_work})


def _end_jobs_without_members(concerned: Mapping[Place, Submission]) -> None:
    queue = open_jobs({submission.folder: submission for submission in concerned.values()}.values())
    for place, submission in concerned.items():
        fresh = Submission.read(submission.folder)  # with the notes of this moment
        if place in queue and queue[place].id and all(fresh.is_over(run) for run in fresh.jobs[place]):
            launcher_of(submission.launcher).cancel([queue[place].id])


def _wanted(planned: Plan, standings: Standings, only: Collection[str]) -> list[PlannedRun]:
    """Choose cells in these states, and what they need that is neither done nor on its way, each behind what
    it needs. Raises a SakdError where what is finished and needed is not as it was stored."""
    by_name = {run.name: run for run in planned.everything}
    chosen: dict[str, PlannedRun] = {}

    def choose(run: PlannedRun) -> None:
        if standings[run.name].state in ON_THEIR_WAY or run.name in chosen:
            return
        for name in run.needs:
            choose(by_name[name])
        chosen[run.name] = run

    for cell in planned.cells:
        if standings[cell.name].state in only:
            choose(cell)
    for name in sorted({name for run in chosen.values() for name in run.needs} - chosen.keys()):
        by_name[name].run.result()
    return list(chosen.values())


def _jobs(planned: Plan, wanted: Sequence[PlannedRun]) -> list[list[str]]:
    """Group runs into jobs, each behind what it needs: what others need trains alone, and before, and cells
    train in cohorts."""
    alone = {run.name for run in planned.first}
    alone |= {name for run in planned.everything for name in run.needs}
    return [[run.name for run in cohort] for cohort in cohorts(wanted, alone)]


def _arrays(
    jobs: Sequence[Sequence[str]], needs: Mapping[str, Sequence[str]], largest: int | None
) -> list[list[list[str]]]:
    """Group jobs that wait for the same into arrays of at most ``largest``, each behind what it waits for."""
    depths: dict[str, int] = {}

    def depth(run: str) -> int:
        """Count the submitted runs that must be over before it, one after another."""
        if run not in depths:
            before = [name for name in needs.get(run, ()) if name in submitted]
            depths[run] = 1 + max(map(depth, before), default=-1)
        return depths[run]

    submitted = {run for job in jobs for run in job}
    groups: dict[tuple[int, str], list[list[str]]] = {}
    for job in jobs:
        waits_for = needs_of(job, needs)
        groups.setdefault((max(map(depth, job)), str(waits_for)), []).append(list(job))
    ordered = [groups[key] for key in sorted(groups, key=lambda key: key[0])]
    size = largest or len(jobs)
    return [alike[start : start + size] for alike in ordered for start in range(0, len(alike), size)]


def _record(
    planned: Plan, wanted: Sequence[PlannedRun], launcher: Launcher, delivery: Delivery
) -> Submission:
    """Write down what is about to be handed over, before it is; with the code copied and the store set
    up."""
    _prepare_store(wanted, delivery)
    copy = code.snapshot(planned.runs, packages=_packages(wanted))
    folder = submissions.new_folder(planned.runs)
    needs = {run.name: list(run.needs) for run in wanted if run.needs}
    arrays = _arrays(_jobs(planned, wanted), needs, launcher.largest_array())
    submission = Submission(
        folder,
        dict(planned.sweep.launcher),
        [Array(f"sakd-{folder.name}-{i}", jobs) for i, jobs in enumerate(arrays)],
        needs,
        list(planned.sweep.overrides),
        str(copy.absolute()),
        time=submissions.now(planned.runs),
    )
    submission.write({run.name: run.run.config for run in wanted})
    log.info("jobs run the code of %s, copied to %s", code.running(copy)[0], copy)
    return submission


def _packages(wanted: Iterable[PlannedRun]) -> set[str]:
    """What the runs' configurations name that is to be imported."""
    return {
        str(value)
        for run in wanted
        for key, value in flatten(run.run.config)
        if key.rpartition(".")[2] in ("_target_", "build")
    }


def _submit(submission: Submission, launcher: Launcher, standings: Standings) -> None:
    """Submit all of it or, where a part is refused or this is interrupted, nothing."""
    under_way = {name: standing.job for name, standing in standings.items() if standing.job is not None}
    try:
        launcher.submit(submission, under_way)
    except BaseException:
        with uninterrupted():
            submission.withdraw()
        raise


def _prepare_store(wanted: Iterable[PlannedRun], delivery: Delivery) -> None:
    """Set stores up before jobs start, which would else do so all at once."""
    stores: dict[str, set[str]] = {}
    for run in wanted:
        settings = run.run.config["tracking"]
        if settings["name"] == "mlflow":
            stores.setdefault(settings["uri"], set()).add(settings["experiment"])
    for uri, experiments in stores.items():
        error = delivery.set_up(uri, sorted(experiments))
        if error is not None:
            log.warning(
                "MLflow at %s %s (%s). Jobs run unharmed; `sakd sync` sends what is missing",
                uri,
                "refuses" if is_refusal(error) else "cannot be reached",
                reason(error),
            )


def _awaited(planned: Plan) -> Standings:
    """Wait until nothing of it runs or waits; how all stand then."""
    before, delivery = "", Delivery()
    while True:
        try:
            standings = survey(planned.everything, planned.runs)
        except SlurmError as error:  # its controller may be restarted
            log.warning("%s; asking again", error)
        else:
            settle(planned, standings, delivery)
            now = summary(standings[cell.name] for cell in planned.cells)
            if now != before:
                log.info("%s", now)
            if not any(standing.state in ("running", "queued") for standing in standings.values()):
                return standings
            before = now
        time.sleep(SECONDS_BETWEEN_LOOKS)


def summary(standings: Iterable[Standing]) -> str:
    """Count standings by state, in words."""
    counts = Counter(standing.state for standing in standings)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{number_of(sum(counts.values()), 'cell')}: {told}"


def _told(submission: Submission) -> str:
    jobs = submission.jobs.values()
    runs = sum(map(len, jobs))
    trained = f", which train {runs} runs," if runs > len(jobs) else ""
    arrays = number_of(len(submission.arrays), "array")
    return f"{number_of(len(jobs), 'job')}{trained} in {arrays}; logs in {submission.folder / 'logs'}"


def number_of(number: int, what: str) -> str:
    """Write a number with its noun: ``3 cells``, ``1 cell``."""
    return f"{number} {what}{'s' * (number != 1)}"
