"""Runs, trained: what they need first, then they themselves, resumed where they were left, tracked,
finished."""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from sakd.configuration import Config, build, prerequisites, require_accuracy
from sakd.data import Dataset
from sakd.errors import CheckpointError, DataError, RunError, RunHeldError, WithdrawnError, in_one_line
from sakd.networks.checkpoints import load_weights, parse_weights, read_weights
from sakd.networks.cost import warn_of_memory
from sakd.process import quickest_convolutions, tf32
from sakd.runs.anew import tell_what_is_trained_anew
from sakd.runs.certificates import certify
from sakd.runs.logs import OwnLog
from sakd.runs.optimized import check_optimized
from sakd.runs.run import Run
from sakd.runs.tracking import Delivery, concluded, start_mirror
from sakd.runs.underway import Prepared, Result, UnderWay
from sakd.signals import interruptible, uninterrupted
from sakd.terminal import Watch, Watched, counting
from sakd.training import Certificate, Cohort, Profile, Teacher, Trainer

log = logging.getLogger("sakd")

Outcome = Result | Exception

DEFAULT_THREADS = torch.get_num_threads()
SECONDS_BETWEEN_QUESTIONS = 1.0  # whether a member has been withdrawn
SECONDS_BETWEEN_LOOKS = 0.2  # whether another process still works on a run


def execute(config: Config, dataset: Dataset | None = None, leave_failure: bool = False) -> Result:
    """Train a run, from its last checkpoint if there is one, or read the result if it is finished.

    All that can be wrong with the configuration is found before any data is read; such a run leaves nothing,
    or, with ``leave_failure``, what a run that failed in training leaves: its folder with the traceback, and
    a FAILED run in MLflow. Raises a SakdError for what the user can mend; an interruption (SIGINT, SIGTERM,
    SIGHUP) ends as KeyboardInterrupt with the run marked KILLED.
    """
    run, delivery = Run(config), Delivery()
    with concluded(delivery, run):
        (outcome,) = Together([run], delivery, dataset, leave_failure, tells_anew=True).outcomes().values()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def execute_together(
    configs: Sequence[Config],
    *,
    leave_failures: bool = False,
    withdrawn: Callable[[str], bool] = lambda name: False,
    ended: Callable[[str, Outcome], None] = lambda name, outcome: None,
    delivery: Delivery | None = None,
) -> dict[str, Outcome]:
    """Train runs that may go together; their results by name, in order, and for one that fails its error.

    They share data set and how it is read, teacher, seed, batch size, precision, execution and folder of
    runs. What is finished is read, the others are trained as one cohort; a run that another process works on
    is waited for at the end. ``withdrawn(name)`` is asked now and then: a run for which it says True ends as
    KILLED, with WithdrawnError as its outcome. ``ended(name, outcome)`` is called as soon as a run has its
    outcome, while others go on. ``delivery``: of the launch, where that trains others, too.
    ``leave_failures`` and an interruption as in ``execute``.
    """
    runs = [Run(config) for config in configs]
    own = Delivery()
    with concluded(own, *runs) if delivery is None else nullcontext():
        together = Together(runs, delivery or own, None, leave_failures, withdrawn, ended, tells_anew=True)
        return together.outcomes()


def check_before_work(config: Config) -> None:
    """Do what ``execute`` does before any data is read, and nothing else. Raises as it does."""
    together = Together([Run(config)], Delivery())
    together.build(list(together.runs.values()))
    for outcome in together.ended.values():
        raise outcome


class Together:
    """Runs that train together: what goes wrong in one is its own outcome, and the others go on."""

    def __init__(
        self,
        runs: Sequence[Run],
        delivery: Delivery,
        dataset: Dataset | None = None,
        leave_failures: bool = False,
        withdrawn: Callable[[str], bool] = lambda name: False,
        tell: Callable[[str, Outcome], None] = lambda name, outcome: None,
        tells_anew: bool = False,
    ):
        self.runs = {run.name: run for run in runs}
        self.dataset, self.leave_failures, self.withdrawn = dataset, leave_failures, withdrawn
        self.delivery, self.tell, self.tells_anew = delivery, tell, tells_anew
        self.ended: dict[str, Outcome] = {}
        self.held: dict[str, Run] = {}  # another process works on these
        self.noted: set[str] = set()  # runs under way that have told by themselves how they ended

    def outcomes(self) -> dict[str, Outcome]:
        """Train what is not finished; the outcome of every run, in order."""
        while open_runs := self._unfinished():
            self.held.clear()
            self._attempt(open_runs)
            if self.held:  # by another process: theirs is the result, once that is done with it
                self._wait(next(iter(self.held.values())))
        return {name: self.ended[name] for name in self.runs}

    def _unfinished(self) -> list[Run]:
        """List runs without an outcome; those that have been finished, here or elsewhere, get theirs."""
        for run in self.runs.values():
            if run.name not in self.ended:
                with self._alone(run, leave=False):
                    result = run.result()
                    if result is not None:
                        self._check_same_data(run, result)
                        self._end(run.name, result)
        return [run for run in self.runs.values() if run.name not in self.ended]

    def _wait(self, run: Run) -> None:
        """Wait until no other process works on a run; those withdrawn meanwhile end."""
        log.info("another process works on %s; waiting for it", run.folder)
        asked: dict[str, float] = {}
        while run.is_held:
            for held in self._open(self.held.values()):
                with self._alone(held, leave=False):
                    self._ask(held.name, asked)
            if not self._open(self.held.values()):
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _attempt(self, runs: Sequence[Run]) -> None:
        """Train ``runs``; afterwards each has an outcome, or is held by another process."""
        try:
            # Inside, a teacher may be trained, with a precision of its own.
            with self._for_all(runs), tf32(runs[0].config["precision"] == "tf32"), quickest_convolutions():
                self._train(self._prepare(runs))
            return
        except torch.OutOfMemoryError as error:
            open_runs = self._open(runs)
            if len(open_runs) < 2:
                for run in open_runs:
                    self._failed(run, error.with_traceback(None))
                return
        half = (len(open_runs) + 1) // 2  # here, the failed cohort's memory is free
        gc.collect()
        torch.cuda.empty_cache()
        log.warning(
            "too little GPU memory for %d runs at once; going on with %d and %d",
            len(open_runs),
            half,
            len(open_runs) - half,
        )
        self._attempt(open_runs[:half])
        self._attempt(open_runs[half:])

    # ---- before

    def _prepare(self, runs: Sequence[Run]) -> list[Prepared]:
        """Prepare runs: what can be wrong is found before data is read, and that before anything is
        trained."""
        shared = runs[0].config
        torch.set_num_threads(shared["threads"] or DEFAULT_THREADS)
        teacher, built, trainers = self.build(runs)
        runs = self._open(runs)
        if not runs:
            return []
        if self.tells_anew:  # of what goes on: beside a mistake nothing else is said
            tell_what_is_trained_anew(runs)
        runs[0].check_place()  # else it would be found once all images have been looked at
        dataset = self.dataset or _read_images(shared)
        if shared["batch_size"] > len(dataset.train):
            text = (
                f"batch_size: found {shared['batch_size']}, more than the {len(dataset.train)} images to "
                f"train {runs[0].name} on; each epoch is one batch of them all"
            )
            log.warning("%s", text, extra={"news": ("batch_size", text)})
        for run in runs:
            with self._alone(run):
                trainers[run.name].prepare(dataset, shared["batch_size"])
                _tell_of_single_steps(run, trainers[run.name].last_batch)
        runs = self._open(runs)
        if teacher is not None and runs:
            self._certify(teacher, runs, dataset)
        prepared = []
        for run in self._open(runs):
            with self._alone(run):
                pretraining = _take_over_pretraining(run.config, built[run.name], dataset, self.delivery)
                prepared.append(Prepared(run, trainers[run.name], dataset, pretraining))
        return prepared

    def build(self, runs: Sequence[Run]) -> tuple[Teacher | None, dict[str, build.Parts], dict[str, Trainer]]:
        """Build all that runs are made of, before data is read: their teacher; parts and trainers by name.

        A run of which something is wrong ends.
        """
        shared = runs[0].config
        device = build.device(shared["device"])
        build.promises(shared)
        teacher, built, trainers = None, {}, {}
        for run in runs:
            with self._alone(run):
                build.check_parts(run.config)
                built[run.name] = build.parts(run.config, None if teacher is None else teacher.network)
                _warn_of_memory(run.config, built[run.name])
                if teacher is None and built[run.name].teacher is not None:
                    teacher = Teacher(
                        built[run.name].teacher, device=device, execution=build.execution(shared)
                    )
                trainers[run.name] = build.trainer(run.config, built[run.name], device, teacher)
                check_optimized(run.config, trainers[run.name].measurements)
                _check_pretraining_can_be_built(run.config, device)
                run.check_saved()
        runs = self._open(runs)
        if teacher is not None and runs:
            _check_teacher(shared, teacher, device)
        return teacher, built, trainers

    def _certify(self, teacher: Teacher, runs: Sequence[Run], dataset: Dataset) -> None:
        """Load and measure the teacher; a run that expects more of it ends."""
        config = runs[0].config
        path, expected = _teacher_weights(config, dataset, self.delivery)

        def accept(found: Certificate) -> None:
            if expected is not None and found.sha256 != expected:
                raise CheckpointError(
                    f"{found.source}: found checksum {found.sha256}, expected {expected} as in result.json "
                    "beside it; the file was changed. Move that folder away to train the teacher again"
                )
            for run in runs:
                with self._alone(run):
                    require_accuracy(run.config["teacher"]["min_accuracy"], found.accuracy, found.source)
            if not self._open(runs):
                raise self.ended[runs[0].name]

        name, asked = config["teacher"]["name"], config["teacher"].get("checkpoint_part")
        certify(teacher, name, path, dataset, Path(config["runs"]) / ".certificates", accept, asked)
        log.info("teacher %s: %.2f %% (%s)", name, teacher.certificate.accuracy, path)

    # ---- the training itself

    def _train(self, prepared: Sequence[Prepared]) -> None:
        """Train what is not finished meanwhile, but for those that another process holds."""
        with ExitStack() as stack:
            members: dict[str, UnderWay] = {}
            writing = stack.enter_context(ThreadPoolExecutor(1, "writing"))
            for one in prepared:
                with self._alone(one.run, leave=False):
                    lock = stack.enter_context(ExitStack())
                    try:
                        lock.enter_context(one.run.locked(wait=False))
                    except RunHeldError:
                        self.held[one.run.name] = one.run
                        continue
                    result = one.run.result()
                    if result is None:
                        members[one.run.name] = UnderWay(one, lock, writing)
                    else:
                        self._end(one.run.name, result)
            if members:
                self._train_members(members)

    def _train_members(self, members: Mapping[str, UnderWay]) -> None:
        logs = ExitStack()
        with interruptible():
            try:
                for name, member in members.items():
                    member.together = len(members)
                    with self._alone(member.run, leave=False):  # without a log there is nowhere to leave it
                        logs.enter_context(member.own_log)
                    if name not in self.ended:
                        with self._alone(member.run, member):
                            self._ask(name, {})
                            member.begin()
                self._train_epochs({name: m for name, m in members.items() if name not in self.ended})
            except BaseException as error:  # of what all share, such as the data, or an interruption
                with uninterrupted():
                    open_members = [member for name, member in members.items() if name not in self.ended]
                    for member in open_members:
                        member.interrupted(error, _status(error, len(open_members)))
                        self.noted.add(member.run.name)
                raise
            finally:
                for member in members.values():
                    member.deliver(self.delivery)
                logs.close()

    def _train_epochs(self, members: Mapping[str, UnderWay]) -> None:
        if not members:
            return
        first = next(iter(members.values())).prepared
        cohort = Cohort(first.trainer.teacher, {name: m.trainer for name, m in members.items()})
        epochs = {name: member.run.config["epochs"] for name, member in members.items()}
        watched = {
            name: Watched(member.prepared.title, epochs[name], member.trainer.epoch)
            for name, member in members.items()
        }
        profiled = len(members) == 1 and first.run.config["profile"]
        profile = Profile(first.run.folder, first.trainer.device) if profiled else None
        asked: dict[str, float] = {}
        with Watch(watched) as watch, profile or nullcontext():

            def progress(name: str, *seen: Any) -> None:
                self._ask(name, asked)
                members[name].writer.check()
                watch.step(name, *seen)
                if profile is not None:
                    profile.step()

            def failed(name: str, error: Exception) -> None:
                cohort.drop(name)
                watch.drop(name, in_one_line(error))
                self._failed(members[name].run, error, members[name])

            def ended(name: str) -> None:
                member = members[name]
                if member.trainer.epoch < epochs[name]:
                    cohort.drop(name)
                    best = member.best_epoch.epoch
                    watch.drop(name, f"stopped: val/accuracy has not risen since epoch {best}")
                self._end(name, member.finish())

            for name, member in members.items():
                if member.is_trained:  # killed between its last epoch and its result
                    with self._alone(member.run, member, failed):
                        ended(name)
            batch_size = first.run.config["batch_size"]
            for name, measured in cohort.fit(
                first.dataset,
                epochs,
                batch_size,
                progress,
                failed,
                lambda name: members[name].own_log.speaking(),
            ):
                with self._alone(members[name].run, members[name], failed):
                    watch.epoch(name, members[name].keep(measured))
                    if members[name].is_trained:
                        ended(name)

    def _ask(self, name: str, asked: dict[str, float]) -> None:
        """Raise WithdrawnError if a run is to end; the question is put once a second at most."""
        now = time.monotonic()
        if now - asked.get(name, 0.0) >= SECONDS_BETWEEN_QUESTIONS:
            asked[name] = now
            if self.withdrawn(name):
                raise WithdrawnError(f"{name}: cancelled")

    # ---- outcomes

    def _end(self, name: str, outcome: Outcome) -> None:
        self.ended[name] = outcome
        self.tell(name, outcome)

    def _open(self, runs: Iterable[Run]) -> list[Run]:
        return [run for run in runs if run.name not in self.ended]

    @contextmanager
    def _alone(
        self,
        run: Run,
        member: UnderWay | None = None,
        failed: Callable[[str, Exception], None] | None = None,
        leave: bool = True,
    ) -> Iterator[None]:
        """Make what goes wrong inside this run's outcome. Its own log speaks inside, where it is under
        way."""
        try:
            with nullcontext() if member is None else member.own_log.speaking():
                yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if failed is not None:
                failed(run.name, error)
            else:
                self._failed(run, error, member, leave)

    def _failed(self, run: Run, error: Exception, member: UnderWay | None = None, leave: bool = True) -> None:
        if member is not None:
            member.failed(error, _status(error))
        self._end(run.name, error)
        if member is None and leave and self.leave_failures and run.name not in self.noted:
            _leave_failure(run, error, self.delivery)

    @contextmanager
    def _for_all(self, runs: Sequence[Run]) -> Iterator[None]:
        """Make what goes wrong inside, of what all share, the outcome of all that have none yet."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            for run in self._open(runs):
                self._failed(run, error)

    def _check_same_data(self, run: Run, result: Result) -> None:
        if self.dataset is not None and result["data_sha256"] != self.dataset.checksum:
            raise DataError(
                f"{run.folder}: learned from images with checksum {result['data_sha256']}, found "
                f"{self.dataset.checksum} now. Two data sets of one name count as one: give the other "
                "another dataset.name, or move that folder away"
            )


def _tell_of_single_steps(run: Run, batches: int) -> None:
    """Say so where the ``batches`` of an epoch are fewer than make a step."""
    accumulate = run.config.get("accumulate", 1)
    if accumulate > batches:
        text = (
            f"accumulate: found {accumulate}, more than the {batches} batches of an epoch of {run.name}; "
            "each epoch is one step"
        )
        log.warning("%s", text, extra={"news": ("accumulate", text)})


def _warn_of_memory(config: Config, built: build.Parts) -> None:
    for key, network in (("student", built.student), ("teacher", built.teacher)):
        if network is not None:
            warn_of_memory(key, config[key]["name"], network, config["batch_size"])


def _status(error: BaseException, together: int = 1) -> str:
    """What MLflow is told of a run that ends early, with how many others."""
    if isinstance(error, (KeyboardInterrupt, WithdrawnError)):
        return "KILLED"
    if isinstance(error, SystemExit):  # a cluster's time limit puts the job back into the queue
        return "SCHEDULED"
    is_split = isinstance(error, torch.OutOfMemoryError) and together > 1
    return "SCHEDULED" if is_split else "FAILED"


def _read_images(config: Config) -> Dataset:
    """The data set, every file of which has been read once."""
    return build.dataset(config).ready(Path(config["runs"]) / ".checked_images", counting)


def _check_teacher(config: Config, teacher: Teacher, device: torch.device) -> None:
    """Check what can be known of a teacher without data: its file fits, or its training can be built."""
    own = prerequisites(config).teacher
    if own is None:
        path = build.weights_file(config["teacher"], "teacher")
        asked = config["teacher"].get("checkpoint_part")
        load_weights(teacher.network, read_weights(path), config["teacher"]["name"], path, asked)
    else:
        _check_first(own, device, "teacher.training.", "teacher.training")


def _check_pretraining_can_be_built(config: Config, device: torch.device) -> None:
    """Check that the training of what is pretrained can be built."""
    own = prerequisites(config).pretraining
    if own is not None:
        _check_first(own, device, "distiller.pretraining.")


def _check_first(own: Config, device: torch.device, within: str, start: str = "student") -> None:
    """Check that a run that is needed first is finished, or its training can be built and go on.

    ``within``: the node, with a dot, in which its keys are written; ``start``: that in which it is written
    where its weights begin.
    """
    run = Run(own)
    if run.result() is None:
        build.trainer(own, build.parts(own, start=start), device, within=within)
        run.check_saved()


def _teacher_weights(config: Config, dataset: Dataset, delivery: Delivery) -> tuple[Path, str | None]:
    """Train the teacher if need be; its file, and the checksum that this has if it was trained here."""
    own = prerequisites(config).teacher
    if own is None:
        return build.weights_file(config["teacher"], "teacher"), None
    if Run(own).result() is None:
        log.info("training the teacher %s first", config["teacher"]["name"])
    return Run(own).weights, _train_first(own, dataset, delivery)["student_sha256"]


def _train_first(own: Config, dataset: Dataset, delivery: Delivery) -> Result:
    """Train a run that others need, or find it; too little memory for it is no matter of their number."""
    run = Run(own)
    (outcome,) = Together([run], delivery, dataset).outcomes().values()
    if isinstance(outcome, torch.OutOfMemoryError):
        raise RunError(f"{run.name}, which is needed first: {in_one_line(outcome)}") from outcome
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _take_over_pretraining(
    config: Config, parts: build.Parts, dataset: Dataset, delivery: Delivery
) -> dict[str, str] | None:
    """Give this run's distiller, or student, what its pretraining has learned: a run found again like a
    teacher.

    What it was, for the result.
    """
    own = prerequisites(config).pretraining
    if own is None:
        return None
    if Run(own).result() is None:
        log.info("pretraining for %s first", config["distiller"]["name"])
    expected = _train_first(own, dataset, delivery)["student_sha256"]
    weights = Run(own).weights
    raw = weights.read_bytes()
    if sha256(raw).hexdigest() != expected:
        raise CheckpointError(
            f"{weights}: found another checksum than {expected} as in result.json beside it; the file was "
            "changed. Move that folder away to pretrain again"
        )
    parts.pretraining.pretrained(parts.student).load_state_dict(parse_weights(raw, weights))
    return {"run": Run(own).name, "sha256": expected}


def _leave_failure(run: Run, error: Exception, delivery: Delivery) -> None:
    """Leave of a run that failed before its training a folder with the traceback, and a FAILED run in MLflow.

    Nothing, but a word, where the folder cannot be written or another process works there.
    """
    try:
        with run.locked(wait=False):
            if (run.folder / "result.json").exists():
                return
            with OwnLog(run.folder / "run.log") as own_log:
                run.start()
                own_log.failed(error)
            mirror = start_mirror(run.folder, run.config)
            if mirror is not None:
                mirror.end("FAILED")
                delivery.add(mirror)
    except RunError as reason:
        log.warning("the failure of %s is noted nowhere: %s", run.name, reason)
