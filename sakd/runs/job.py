"""One run from its configuration: its teacher first, then its own training, resumed where it was left,
tracked, finished."""

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sakd.configuration import (
    Config,
    build,
    prerequisites,
    require_accuracy,
    short_names,
)
from sakd.data import Dataset
from sakd.errors import CheckpointError, DataError, in_one_line
from sakd.networks.checkpoints import load_weights, parse_weights, read_weights
from sakd.runs import code
from sakd.runs.certificates import Certificate, certify
from sakd.runs.run import ENDED_EARLY, Run
from sakd.runs.tracking import Mirror, start_mirror
from sakd.signals import interruptible
from sakd.terminal import Watch
from sakd.training import Profile, Trainer, allow_tf32

log = logging.getLogger("sakd")

Result = dict[str, Any]

DEFAULT_THREADS = torch.get_num_threads()


def execute(config: Config, dataset: Dataset | None = None, leave_failure: bool = False) -> Result:
    """The run's result: read if it is finished, else trained, from its last checkpoint if there is one.

    All that can be wrong with the configuration is found before any data is read; such a run leaves nothing,
    or, with ``leave_failure``, what a run that failed in training leaves: its folder with the traceback, and
    a FAILED run in MLflow. Raises a SakdError for what the user can mend; an interruption (SIGINT, SIGTERM)
    ends as KeyboardInterrupt with the run marked KILLED."""
    run = Run(config)
    result = run.result()
    if result is not None:
        if dataset is not None:
            _check_same_data(run, result, dataset)
        return result
    try:
        trainer, dataset, certificate, pretraining = _prepared(config, dataset)
    except Exception as error:
        if leave_failure:
            _leave_failure(run, error)
        raise
    with run.locked(waiting=lambda: log.info("another process works on %s; waiting for it", run.folder)):
        return run.result() or _train(run, trainer, dataset, certificate, pretraining)


def _prepared(
    config: Config, dataset: Dataset | None
) -> tuple[Trainer, Dataset, Certificate | None, dict[str, str] | None]:
    """What a training needs; the runs before it are finished, if need be by training them."""
    torch.set_num_threads(config["threads"] or DEFAULT_THREADS)
    device = build.device(config["device"])
    build.promises(config)
    parts = build.parts(config)
    trainer = build.trainer(config, parts, device)
    _check_prerequisites(config, parts, device)
    dataset = dataset or build.dataset(config)
    trainer.prepare(dataset)
    certificate = None
    if parts.teacher is not None:
        path = _teacher_weights(config, dataset)

        def accept(found: Certificate) -> None:
            require_accuracy(config["teacher"]["min_accuracy"], found.accuracy, found.source)
            _check_untouched(config, found)

        certificates = Path(config["runs"]) / ".certificates"
        certificate = certify(
            parts.teacher, config["teacher"]["name"], path, dataset, device, certificates, accept
        )
        log.info("teacher %s: %.2f %% (%s)", certificate.name, certificate.accuracy, path)
    pretraining = None if parts.pretraining is None else _pretraining(config, parts, dataset)
    return trainer, dataset, certificate, pretraining


def _leave_failure(run: Run, error: Exception) -> None:
    with run.locked():
        with suppress(type(error)), _own_log(run.folder / "run.log"):
            run.start()
            raise error
        mirror = start_mirror(run.folder, run.config)
        if mirror is not None:
            mirror.close("FAILED")


def _check_same_data(run: Run, result: Result, dataset: Dataset) -> None:
    if result["data_sha256"] != dataset.checksum:
        raise DataError(
            f"{run.folder}: learned from images with checksum {result['data_sha256']}, found "
            f"{dataset.checksum} now. Two data "
            "sets of one name count as one: give the other another dataset.name, or move that folder away"
        )


def _check_prerequisites(config: Config, parts: build.Parts, device: torch.device) -> None:
    """What can be known without data of the runs before this one: a weights file fits, or their trainings can
    be built."""
    if parts.teacher is None:
        return
    checkpoint = config["teacher"]["checkpoint"]
    if checkpoint is not None:
        path = Path(checkpoint)
        load_weights(parts.teacher, read_weights(path), config["teacher"]["name"], path)
    for own in prerequisites(config):
        if Run(own).result() is None:
            build.trainer(own, build.parts(own), device)


def _check_untouched(config: Config, certificate: Certificate) -> None:
    """A teacher trained here is still what its run stored."""
    own = prerequisites(config).teacher
    if own is not None:
        stored = Run(own).result()
        if stored["student_sha256"] != certificate.sha256:
            raise CheckpointError(
                f"{certificate.source}: found checksum {certificate.sha256}, expected "
                f"{stored['student_sha256']} as in "
                "result.json beside it; the file was changed. Move that folder away to train the "
                "teacher again"
            )


def _teacher_weights(config: Config, dataset: Dataset) -> Path:
    own = prerequisites(config).teacher
    if own is None:
        return Path(config["teacher"]["checkpoint"])
    if Run(own).result() is None:
        log.info("training the teacher %s first", config["teacher"]["name"])
    execute(own, dataset)
    return Run(own).weights


def _pretraining(config: Config, parts: build.Parts, dataset: Dataset) -> dict[str, str]:
    """Give this run's distiller, or student, what its pretraining has learned: a run of its own, found again
    like a teacher.

    What it was, for the result.
    """
    own = prerequisites(config).pretraining
    if Run(own).result() is None:
        log.info("pretraining for %s first", config["distiller"]["name"])
    expected = execute(own, dataset)["student_sha256"]
    weights = Run(own).weights
    raw = weights.read_bytes()
    if sha256(raw).hexdigest() != expected:
        raise CheckpointError(
            f"{weights}: found another checksum than {expected} as in result.json beside it; the file "
            "was changed. "
            "Move that folder away to pretrain again"
        )
    parts.pretraining.pretrained(parts.student).load_state_dict(parse_weights(raw, weights))
    return {"run": Run(own).name, "sha256": expected}


def _train(
    run: Run,
    trainer: Trainer,
    dataset: Dataset,
    certificate: Certificate | None,
    pretraining: dict[str, str] | None,
) -> Result:
    mirror, status = None, "FAILED"
    allow_tf32(run.config["precision"] == "tf32")
    try:
        with _own_log(run.folder / "run.log"), interruptible():
            run.start()
            mirror = start_mirror(run.folder, run.config)
            state = run.load_checkpoint(_sources(dataset, certificate))
            if state is not None:
                trainer.load_state_dict(state)
                log.info("going on after epoch %d", trainer.epoch)
            run.keep_metrics(trainer.epoch)
            _train_epochs(run, trainer, dataset, certificate, mirror)
            result = run.finish(trainer.product.state_dict(), _result(run, dataset, certificate, pretraining))
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except SystemExit:  # a cluster's time limit: the job has been put back into the queue, and goes on later
        status = "SCHEDULED"
        raise
    finally:
        if mirror is not None and not mirror.close(status):
            log.warning(
                "MLflow has not got everything of this run (%s); `sakd sync` sends the rest", mirror.error
            )
    return result


def _train_epochs(
    run: Run, trainer: Trainer, dataset: Dataset, certificate: Certificate | None, mirror: Mirror | None
) -> None:
    config = run.config
    best = max((line.get("test/accuracy", 0.0) for line in run.metrics()), default=0.0)
    names = short_names(config)
    title = names["student"]
    if certificate is not None:
        title = f"{names['teacher']} to {title}, {names['distiller']} {names['spot_mode']}"
    title += f", seed {names['seed']}"
    sources = _sources(dataset, certificate)
    profile = Profile(run.folder, trainer.device) if config["profile"] else None
    with Watch(title, config["epochs"], trainer.epoch) as watch, profile or nullcontext():

        def progress(*seen: Any) -> None:
            watch.step(*seen)
            if profile is not None:
                profile.step()

        for metrics in trainer.fit(dataset, config["epochs"], config["batch_size"], progress):
            metrics["time"] = time.time()
            if "test/accuracy" in metrics:
                best = max(best, metrics["test/accuracy"])
                metrics["test/best_accuracy"] = best
            if certificate is not None:
                metrics["teacher/accuracy"] = certificate.accuracy
            run.append_metrics(metrics)
            run.save_checkpoint(trainer.state_dict(), sources)
            watch.epoch(metrics)
            if mirror is not None:
                mirror.notify()


def _sources(dataset: Dataset, certificate: Certificate | None) -> dict[str, str]:
    """What a run learns from beside its configuration, by checksum."""
    sources = {"data set": dataset.checksum}
    return sources if certificate is None else {**sources, "teacher": certificate.sha256}


def _result(
    run: Run, dataset: Dataset, certificate: Certificate | None, pretraining: dict[str, str] | None
) -> Result:
    """What is kept of a finished run; accuracies in percent (None after a pretraining), ``kept`` as shares in
    the last epoch."""
    lines = run.metrics()
    last = lines[-1]
    best = max(lines, key=lambda line: line.get("test/accuracy", 0.0))
    return {
        "run": run.name,
        **short_names(run.config),
        "epochs": run.config["epochs"],
        "teacher": None if certificate is None else certificate.as_dict(),
        "pretraining": pretraining,
        "data_sha256": dataset.checksum,
        "student": {
            "name": run.config["student"]["name"],
            "accuracy": last.get("test/accuracy"),
            "best_accuracy": best.get("test/accuracy"),
            "best_epoch": best["epoch"],
            "val_accuracy": last.get("val/accuracy"),
        },
        "kept": {key.removeprefix("kept/"): share for key, share in last.items() if key.startswith("kept/")},
        "seconds": sum(line["seconds"] for line in lines),
        "versions": _versions(),
        "code": asdict(code.of_this_process()[0]),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("sakd", "torch", "torchvision", "numpy", "scikit-learn", "hydra-core", "mlflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _own_log(path: Path) -> Iterator[None]:
    """Messages, and the traceback of what ends the run early, in the run's own log."""
    handler = logging.FileHandler(path)
    handler.handleError = lambda record: (
        None
    )  # a full disk has its own error, which must not drown in this one
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    own = logging.getLogger("sakd")

    def write(level: int, message: str, error: BaseException | None = None) -> None:
        traceback = None if error is None else (type(error), error, error.__traceback__)
        handler.handle(own.makeRecord(own.name, level, __file__, 0, "%s", (message,), traceback))

    own.addHandler(handler)
    try:
        write(logging.INFO, f"begins, with the code of {code.of_this_process()[0]}")
        yield
    except SystemExit:
        write(logging.INFO, "ends here, to go on in its next turn")
        raise
    except BaseException as error:
        write(logging.ERROR, f"{ENDED_EARLY}{in_one_line(error)}", error)
        raise
    finally:
        own.removeHandler(handler)
        handler.close()
