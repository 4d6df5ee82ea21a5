"""What a job of a sweep does: train a cohort, from the configurations that were laid down for its runs.

    python -m sakd.sweeps.work SUBMISSION RUN...

Its exit code, and so SLURM's word, says whether one of them failed.
"""

import logging
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sakd.errors import RunError, WithdrawnError, in_one_line
from sakd.process import set_up
from sakd.runs import code
from sakd.signals import interruptible
from sakd.sweeps import submissions
from sakd.sweeps.submissions import Submission, failed_before, forget_failure, note_failure
from sakd.terminal import start_logging

log = logging.getLogger("sakd")

SECONDS_BETWEEN_LOOKS = 1.0  # at what is cancelled


class Work:
    """A job, as submitit calls it. Requeued after a time limit it is called again, and goes on from the last
    checkpoints of those runs that are neither finished nor failed nor cancelled."""

    def __init__(self, submission: Path, names: Sequence[str]):
        self.submission, self.names = submission, list(names)

    def __call__(self) -> None:
        """Train the cohort. Raises RunError at the end where runs failed, in this turn or before."""
        set_up()
        start_logging()
        log.info("%s: code of %s", ", ".join(self.names), code.of_this_process()[0])
        submission = Submission.read(self.submission)
        for name in self.names:
            failure = submission.failure(name)
            if failure is not None and failure["interrupted"]:
                forget_failure(self.submission, name)
        self.failed = {name for name in self.names if name in Submission.read(self.submission).failures}
        self.over = {*self.failed, *submission.cancelled}
        self._leave_out_what_lacks_a_need(submission)
        with interruptible():
            try:
                self._train([name for name in self.names if name not in self.over])
            except SystemExit:  # submitit has put the job back into the queue
                raise
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt)
                for name in self.names:
                    if name not in self.over:
                        note_failure(
                            self.submission, name, in_one_line(error), traceback.format_exc(), interrupted
                        )
                raise
        if self.failed:
            told = ", ".join(sorted(self.failed))
            raise RunError(f"{len(self.failed)} of {len(self.names)} failed: {told}")

    def _leave_out_what_lacks_a_need(self, submission: Submission) -> None:
        last = submissions.latest(submissions.read(submission.runs))
        for name in self.names:
            found = None if name in self.over else failed_before(submission.needs.get(name, ()), last)
            if found is not None:
                needed, where = found
                error = where.failure(needed)["error"]
                self._ended(name, RunError(f"{needed}, which it needs, failed: {error}"))

    def _train(self, names: Sequence[str]) -> None:
        if not names:
            return
        if code.of_this_process()[0].snapshot is None:
            raise RunError(
                f"{code.ROOT}: found code that can change, expected the copy that was made for this job"
            )
        from sakd.runs.job import execute_together

        configs = []
        for name in names:
            try:
                configs.append(submissions.config_of(self.submission, name))
            except RunError as error:
                self._ended(name, error)
        self.cancelled, self.last_look = set(), 0.0
        execute_together(configs, leave_failures=True, withdrawn=self._withdrawn, ended=self._ended)

    def _withdrawn(self, name: str) -> bool:
        """Tell whether the run was cancelled, as of the last look at the notes."""
        if time.monotonic() - self.last_look >= SECONDS_BETWEEN_LOOKS:
            self.last_look = time.monotonic()
            self.cancelled = {*submissions.cancelled(self.submission)}
        return name in self.cancelled

    def _ended(self, name: str, outcome: dict[str, Any] | Exception) -> None:
        """Note a failure at once: the job may go on for long, or be killed."""
        self.over.add(name)
        if isinstance(outcome, WithdrawnError):
            log.info("%s: cancelled", name)
        elif isinstance(outcome, Exception):
            self.failed.add(name)
            told = "".join(traceback.format_exception(outcome))
            log.error("%s failed\n%s", name, told.rstrip())
            try:
                note_failure(self.submission, name, in_one_line(outcome), told)
            except RunError as error:  # a full disk, which the others must not suffer from
                log.error("%s", error)

    def checkpoint(self) -> Any:
        """Give submitit what it calls when the job comes to its next turn. SLURM, asked for that turn,
        ends this one with SIGTERM, which must not count as an interruption."""
        from submitit.helpers import DelayedSubmission

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return DelayedSubmission(Work(self.submission, self.names))


if __name__ == "__main__":
    try:
        Work(Path(sys.argv[1]), sys.argv[2:])()
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        sys.exit(1)
