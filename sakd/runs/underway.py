"""A run under way: its log, its folder and its place in MLflow keep up with its training."""

import logging
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from sakd.configuration import short_names
from sakd.data import Dataset, evaluation_batches
from sakd.errors import CheckpointError, in_one_line
from sakd.files import explained, write_whole
from sakd.names import BEST, HEADLINE, VALIDATION
from sakd.networks.cost import Cost, cost
from sakd.runs import code, record
from sakd.runs.best import BestEpoch, BestWeights
from sakd.runs.logs import OwnLog
from sakd.runs.run import START_ANEW, Run
from sakd.runs.tracking import Delivery, Mirror, start_mirror
from sakd.runs.writing import Writer
from sakd.training import Certificate, Measured, Trainer, seen

log = logging.getLogger("sakd")

Result = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What one run's training needs; the runs before it are finished."""

    run: Run
    trainer: Trainer
    dataset: Dataset
    pretraining: dict[str, str] | None  # name and checksum of the run that pretrained it, for the result

    @property
    def certificate(self) -> Certificate | None:
        return None if self.trainer.teacher is None else self.trainer.teacher.certificate

    @property
    def sources(self) -> dict[str, str]:
        """What the run learns from beside its configuration, by checksum."""
        sources = {"data set": self.dataset.checksum}
        return sources if self.certificate is None else {**sources, "teacher": self.certificate.sha256}

    @property
    def title(self) -> str:
        names = short_names(self.run.config)
        title = names["student"]
        if self.certificate is not None:
            title = f"{names['teacher']} to {title}, {names['distiller']} {names['spot_mode']}"
        return f"{title}, seed {names['seed']}"


class UnderWay:
    """A run while it is trained: its log, its folder and its place in MLflow keep up with it."""

    def __init__(self, prepared: Prepared, lock: ExitStack, writing: ThreadPoolExecutor):
        """Begin with ``lock``, which holds the run's folder, and a thread in which epochs are written."""
        self.lock, self.writer = lock, Writer(writing)
        self.prepared, self.run, self.trainer = prepared, prepared.run, prepared.trainer
        self.own_log = OwnLog(self.run.folder / "run.log")
        self.mirror: Mirror | None = None
        self.recording = _recording(prepared) if self.trainer.record_spots else None
        self.recorded: dict[str, Any] | None = None  # what the checkpoint says of the record
        self.best = 0.0  # test accuracy so far, percent
        self.best_epoch: BestEpoch | None = None  # once it has begun
        self.best_weights: dict[str, Tensor] | None = None  # with keep_best
        self.together = 1  # members of its cohort
        self.over = False  # it has said how it ended

    def begin(self) -> None:
        """Write what the run is, and go on where it was left."""
        run = self.run
        run.start()
        self.mirror = start_mirror(run.folder, run.config)
        state = run.load_checkpoint(self.prepared.sources)
        if state is not None:
            self.recorded = state.pop("record", None)
            self.best_weights = state.pop("best", None)
            try:
                self.trainer.load_state_dict(state)
            except CheckpointError as error:
                raise CheckpointError(f"{run.folder / 'last.pt'}: {error}; {START_ANEW}") from error
            log.info("going on after epoch %d", self.trainer.epoch)
        if self.recorded is None:  # a file that is there tells of epochs that no checkpoint has
            with explained(run.folder / record.FILE):
                (run.folder / record.FILE).unlink(missing_ok=True)
        elif self.recording is not None:
            self.recording.go_on(run.folder / record.FILE, self.recorded)
        run.keep_metrics(self.trainer.epoch)
        self.best = max((line.get(HEADLINE, 0.0) for line in run.metrics()), default=0.0)
        self.best_epoch = BestEpoch.of(self.prepared.dataset.val is not None, run.metrics())

    @property
    def is_trained(self) -> bool:
        """True if no epoch is left, or ``early_stop`` says so: validation accuracy has not risen for long."""
        patience, epoch = self.run.config.get("early_stop"), self.trainer.epoch
        stops_early = patience is not None and epoch - self.best_epoch.epoch >= patience
        return epoch == self.run.config["epochs"] or stops_early

    def keep(self, measured: Measured) -> Measured:
        """Store an epoch; its measurements with what is known of the run beside.

        It is written while the next one is trained, and the one before is on the disk by now: a kill loses
        the epoch under way, and of the one before it only what is not written yet.
        """
        self.writer.wait()
        measured["time"] = time.time()
        if HEADLINE in measured:
            self.best = max(self.best, measured[HEADLINE])
            measured[BEST] = self.best
        is_best = self.best_epoch.is_raised_by(measured)
        if self.prepared.certificate is not None:
            measured["teacher/accuracy"] = self.prepared.certificate.accuracy
        recorded = [] if self.recording is None else [self._record_epoch()]
        self.writer.submit(
            partial(self.run.append_metrics, measured),
            *recorded,
            partial(self._save_checkpoint, self.trainer.snapshot(), is_best),
            *([] if self.mirror is None else [self.mirror.notify]),
        )
        return measured

    def _record_epoch(self) -> Callable[[], None]:
        """Read what the spot mode decided; the function that stores it, for the writer."""
        epoch, kept = self.trainer.epoch, self.trainer.kept_table.packed()

        def store() -> None:
            self.recording.add(epoch, kept)
            self.recorded = self.recording.state()
            write_whole(self.run.folder / record.FILE, self.recording.content())

        return store

    def _save_checkpoint(self, state: Callable[[], dict[str, Any]], is_best: bool) -> None:
        """Save the state, with the weights of the best epoch: a kill may not part them from its metrics."""
        saved = {**state(), "record": self.recorded}
        if self.run.config.get("keep_best"):
            if is_best:
                self.best_weights = self.trainer.evaluated_in(saved)
            saved["best"] = self.best_weights
        self.run.save_checkpoint(saved, self.prepared.sources)

    def finish(self) -> Result:
        """Store what the spot mode decided, weights and result, once all epochs are on the disk."""
        self.writer.wait()
        if self.recording is not None:
            write_whole(self.run.folder / record.FILE, self.recording.content(self._seen()))
        best = None if self.best_weights is None else BestWeights(self.best_epoch, self.best_weights)
        result = self.run.finish(self.trainer.product.state_dict(), self._result(), best)
        self.end("FINISHED")
        return result

    def _seen(self) -> dict[str, Any]:
        """What is known of training and test images in the end, by the names of a record's arrays."""
        trainer, dataset = self.trainer, self.prepared.dataset.to(self.trainer.device)
        arrays = {}
        for split in record.SPLITS:
            images = getattr(dataset, split)
            own = {"indices": dataset.places_of(split).numpy(), "labels": images.labels.cpu().numpy()}
            batches = evaluation_batches(images, dataset)
            own |= seen(trainer.evaluated, trainer.teacher.network, trainer.spot_mode, batches)
            arrays |= {f"{split}_{name}": array for name, array in own.items()}
        return arrays

    def failed(self, error: BaseException, status: str) -> None:
        """Say why it ends early, in its own log, once what is being written is on the disk."""
        try:
            self.writer.wait()
        except Exception as other:
            if other is not error:
                with self.own_log.speaking():
                    log.warning("%s", in_one_line(other))
        self.own_log.failed(error)
        self.end(status)

    def end(self, status: str) -> None:
        """Let MLflow know how it ended, and go of the folder; waits for nothing.

        Others of the cohort may go on for long, while this run may be tried again.
        """
        if self.mirror is not None:
            self.mirror.end(status)
        self.over = True
        self.lock.close()

    def interrupted(self, error: BaseException, status: str) -> None:
        """End with all others, unless all was stored already."""
        if (self.run.folder / "result.json").exists():
            self.end("FINISHED")
        else:
            self.failed(error, status)

    def deliver(self, delivery: Delivery) -> None:
        """Leave it to the launch to wait for MLflow."""
        if self.mirror is not None and self.over:
            delivery.add(self.mirror)

    def _result(self) -> Result:
        """What is kept of a finished run.

        Accuracies in percent (None after a pretraining), ``kept`` as shares in the last epoch and
        ``kept_mean`` over all, ``seconds`` of its own steps and its share of what its cohort shared.
        """
        run, certificate = self.run, self.prepared.certificate
        lines = run.metrics()
        last = lines[-1]
        best = max(lines, key=lambda line: line.get(HEADLINE, 0.0))
        spots = [key.removeprefix("kept/") for key in last if key.startswith("kept/")]
        return {
            "run": run.name,
            **short_names(run.config),
            "epochs": last["epoch"],
            "teacher": None if certificate is None else certificate.as_dict(),
            "pretraining": self.prepared.pretraining,
            "data_sha256": self.prepared.dataset.checksum,
            "moments": {key: list(getattr(self.prepared.dataset, key)) for key in ("mean", "std")},
            "student": {
                "name": run.config["student"]["name"],
                "accuracy": last.get(HEADLINE),
                "best_accuracy": best.get(HEADLINE),
                "best_epoch": best["epoch"],
                "val_accuracy": last.get(VALIDATION),
                **({"top5": last["test/top5"]} if "test/top5" in last else {}),
            },
            "cost": self._cost(),
            "device": self.trainer.device.type,
            "threads": torch.get_num_threads(),
            "kept": {spot: last[f"kept/{spot}"] for spot in spots},
            "kept_mean": {spot: sum(line[f"kept/{spot}"] for line in lines) / len(lines) for spot in spots},
            "seconds": sum(line["seconds"] for line in lines),
            "cohort": self.together,
            "versions": _versions(),
            "code": asdict(code.of_this_process()[0]),
        }

    def _cost(self) -> dict[str, Cost]:
        """What student and teacher cost; nothing of a pretraining, which is no network to use."""
        if "pretrains" in self.run.config["distiller"]:
            return {}
        costs = {"student": cost(self.trainer.student)}
        return costs if self.trainer.teacher is None else costs | {"teacher": self.trainer.teacher.cost}


def _recording(prepared: Prepared) -> record.Recording:
    dataset = prepared.dataset
    spots = [spot.name for spot in prepared.trainer.spots]
    return record.Recording(spots, dataset.train.labels.numpy(), dataset.places_of("train").numpy())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("sakd", "torch", "torchvision", "numpy", "scikit-learn", "hydra-core", "mlflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
