"""A run is its resolved configuration: its digest names its folder, where all lies that it leaves.

``config.yaml``, ``metrics.jsonl`` (a line per epoch, the truth), ``last.pt`` (resume from here),
``spots.npz`` (``sakd.runs.record``), ``student.safetensors``, ``best.safetensors`` (with ``keep_best``),
``result.json`` (only once finished),
``run.log``, ``code.diff`` (if the code is not its commit's). Files appear whole or not at all; what
a run goes on from, or answers from, has a checksum.
"""

import fcntl
import io
import json
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from sakd import configuration, credentials
from sakd.errors import CheckpointError, RunError, RunHeldError
from sakd.files import append, explained, is_sealed, read_whole, refuse_link, seal, with_checksum, write_whole
from sakd.runs import code
from sakd.runs.stored import Metrics, read_metrics, read_result

if TYPE_CHECKING:
    from sakd.runs.best import BestWeights  # with torch, which most looks at a run do without

ENDED_EARLY = "ended early: "
START_ANEW = "move it away to train from the start"
LAST_BYTES = 1 << 16  # of a run.log hold its last message, with a traceback


class Run:
    """The folder ``runs/<name>-<digest>`` of a resolved configuration."""

    def __init__(self, config: configuration.Config):
        self.config = config
        credentials.remember(config["tracking"].get("uri") or "")  # who has the configuration names its store
        self.digest = configuration.digest(config)  # once: a teacher's file counts by what it held then
        self.name = configuration.run_name(config, self.digest)
        self.folder = Path(config["runs"]) / self.name

    @property
    def weights(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def best_weights(self) -> Path:
        return self.folder / "best.safetensors"

    def result(self) -> dict[str, Any] | None:
        """The result that a finished run stored; None while it is not finished.

        Raises RunError if the file is damaged or another run's, CheckpointError if the weights are not those
        that it stored, or the teacher falls short of what the config expects.
        """
        refuse_link(self.folder)
        result = read_result(self.folder)
        if result is None:
            return None
        if result["run"] != self.name:
            raise RunError(
                f"{self.folder / 'result.json'}: found the result of {result['run']!r:.120}, expected this "
                "run's; move the file away to finish the run again"
            )
        accuracies = result["student"]["accuracy"], result["student"]["best_accuracy"]
        if (None in accuracies) != ("pretrains" in self.config["distiller"]):
            raise RunError(
                f"{self.folder / 'result.json'}: found accuracies {accuracies}, expected a network's, or "
                "None of a pretraining; move the file away to finish the run again"
            )
        self._check_weights(self.weights, result["student_sha256"])
        if "best" in result:
            self._check_weights(self.best_weights, result["best"]["sha256"])
        if result["teacher"] is not None:
            configuration.require_accuracy(
                self.config["teacher"]["min_accuracy"],
                result["teacher"]["accuracy"],
                result["teacher"]["source"],
            )
        return result

    def _check_weights(self, path: Path, expected: str) -> None:
        """Raise CheckpointError unless the weights have the checksum that the result expects."""
        try:
            status = path.lstat()
            found = "a link or folder"
            if stat.S_ISREG(status.st_mode):
                found = f"checksum {configuration.sha256_as_of(path, status)}"
        except FileNotFoundError:
            found = "no such file"
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        if found != f"checksum {expected}":
            raise CheckpointError(
                f"{path}: found {found}, expected checksum {expected} as in result.json beside it; "
                "the file was changed or taken away. Bring it back, or move result.json away: the same "
                "command then stores the weights again, from last.pt"
            )

    @property
    def is_held(self) -> bool:
        """True while any process works in the run's folder."""
        return is_locked(self.folder / ".lock")

    def check_place(self) -> None:
        """Raise RunError unless the folder can be written, or made; nothing is left."""
        place = self.folder.absolute()
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise self._cannot_be_written(error) from error

    def _cannot_be_written(self, error: OSError) -> RunError:
        return RunError(f"runs={self.config['runs']}: cannot write {self.folder} ({error.strerror or error})")

    @contextmanager
    def locked(self, wait: bool = True) -> Iterator[None]:
        """Work in the run's folder, as the only process; the kernel lets go of the lock when that dies.

        Another process that has it is waited for. Raises RunHeldError instead where it is not to ``wait``,
        and RunError if the folder cannot be written.
        """
        refuse_link(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock")
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise RunHeldError(f"{self.folder}: another process works on it") from None
        except OSError as error:
            raise self._cannot_be_written(error) from error
        try:
            yield
        finally:
            lock.release()

    def start(self) -> None:
        """Write the configuration, and what the code has that its commit has not.

        Leftovers of a killed write are removed.
        """
        for leftover in self.folder.glob("*.partial"):
            with explained(leftover):
                leftover.unlink()
        write_whole(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False).encode())
        difference = code.of_this_process()[1]
        if difference:
            write_whole(self.folder / "code.diff", difference.encode())
        else:
            (self.folder / "code.diff").unlink(missing_ok=True)

    def metrics(self) -> list[Metrics]:
        """Whole lines of metrics.jsonl."""
        return read_metrics(self.folder)

    def keep_metrics(self, epochs: int) -> None:
        """Drop lines past ``epochs``, and a line that a kill cut short.

        They are trained again, with the same values. Raises RunError unless a line is there for each epoch up
        to ``epochs``.
        """
        kept = self._metrics_of(epochs)
        lines = "".join(f"{_line(metrics)}\n" for metrics in kept)
        write_whole(self.folder / "metrics.jsonl", lines.encode())

    def _metrics_of(self, epochs: int) -> list[Metrics]:
        """The metrics of the first ``epochs``. Raises RunError unless a line is there for each."""
        try:
            kept = read_metrics(self.folder, epochs)
        except RunError as error:
            raise RunError(f"{error}; move last.pt away to train from the start") from error
        if [line["epoch"] for line in kept] != list(range(1, epochs + 1)):
            raise RunError(
                f"{self.folder / 'metrics.jsonl'}: found epochs {[line['epoch'] for line in kept]}, expected "
                f"1 to {epochs} as in last.pt; move last.pt away to train from the start"
            )
        return kept

    def append_metrics(self, metrics: Metrics) -> None:
        append(self.folder / "metrics.jsonl", _line(metrics))

    def save_checkpoint(self, state: Mapping[str, Any], sources: Mapping[str, str]) -> None:
        """Save a trainer's state, from which the run goes on.

        ``sources``: checksums, by name, of what the run learns from and its configuration does not hold.
        """
        import torch

        content = io.BytesIO()  # a full disk is then an ordinary OSError
        torch.save({"digest": self.digest, "sources": dict(sources), "trainer": dict(state)}, content)
        write_whole(self._checkpoint, seal(content))

    def load_checkpoint(self, sources: Mapping[str, str]) -> dict[str, Any] | None:
        """The trainer's last saved state; None before the first.

        Raises CheckpointError if the file is not as it was written or foreign, or the run learned from other
        ``sources`` before.
        """
        saved = self._saved()
        if saved is None:
            return None
        for name in {**saved["sources"], **sources}:
            before, now = saved["sources"].get(name), sources.get(name)
            if before != now:
                raise CheckpointError(
                    f"{self._checkpoint}: found a {name} with checksum {before} in the epochs so far, "
                    f"and now one with {now}; expected the same. Bring it back, or move last.pt away to "
                    "train from the start"
                )
        return saved["trainer"]

    def check_saved(self) -> None:
        """Raise what ``load_checkpoint`` and ``keep_metrics`` would, as far as it shows without ``sources``.

        So a damaged file is told before any data is read.
        """
        saved = self._saved()
        if saved is not None:
            self._metrics_of(saved["trainer"]["epoch"])

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "last.pt"

    def _saved(self) -> dict[str, Any] | None:
        """What ``save_checkpoint`` has written, the trainer's state and the sources; None if nothing."""
        import torch

        path = self._checkpoint
        raw = read_whole(path)
        if raw is None:
            return None
        if not is_sealed(raw):
            raise CheckpointError(
                f"{path}: found no checksum at its end that fits, expected that of what was written; it is "
                f"damaged, or of an earlier version; {START_ANEW}"
            )
        try:
            saved = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds, and its advice is to load it all the same
            raise CheckpointError(
                f"{path}: cannot be read by this version of PyTorch ({type(error).__name__}); {START_ANEW}"
            ) from error
        if (
            not isinstance(saved, dict)
            or {"sources", "trainer"} - saved.keys()
            or saved.get("digest") != self.digest
            or "epoch" not in saved["trainer"]
        ):
            raise CheckpointError(f"{path}: is not this run's checkpoint; {START_ANEW}")
        return saved

    def finish(
        self, weights: Mapping[str, Any], result: Mapping[str, Any], best: "BestWeights | None" = None
    ) -> dict[str, Any]:
        """Store the student's weights, and those of its best epoch, then the result, which marks the run as
        finished.

        Returns the result with the weights' checksums.
        """
        from safetensors.torch import save

        from sakd.networks.described import described  # here, since the package needs torch

        is_network = "pretrains" not in self.config["distiller"]
        network = configuration.product_node(self.config)
        about = described(network, self.config, result).metadata() if is_network else None

        def stored(path: Path, weights: Mapping[str, Any]) -> str:
            own = {name: tensor.contiguous() for name, tensor in weights.items()}
            write_whole(path, save(own, about))
            return configuration.sha256_of(path)

        result = {**result, "student_sha256": stored(self.weights, weights)}
        if best is not None:
            result["best"] = best.about() | {"sha256": stored(self.best_weights, best.weights)}
        text = json.dumps(with_checksum(result), indent=2) + "\n"
        write_whole(self.folder / "result.json", text.encode())
        return result


def _line(metrics: Metrics) -> str:
    return json.dumps(with_checksum(metrics))


def is_locked(path: Path) -> bool:
    """True if a living process holds this lock.

    Looking takes nothing from anybody, also where only reading is allowed.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or none of ours
        return False
    return False


def last_words(folder: Path) -> str | None:
    """The reason why a run's last start ended early, as its run.log has it.

    None where it did not, or had no time to say so.
    """
    try:
        with (folder / "run.log").open("rb") as file:
            file.seek(max(0, (folder / "run.log").stat().st_size - LAST_BYTES))
            written = file.read().decode(errors="replace")
    except OSError:  # none, or none that can be read
        return None
    messages = re.findall(r"^\d{4}-\S+ \S+ [A-Z]+ (.*)$", written, flags=re.MULTILINE)
    return (
        messages[-1].removeprefix(ENDED_EARLY) if messages and messages[-1].startswith(ENDED_EARLY) else None
    )
