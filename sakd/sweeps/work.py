"""What a job of a sweep does: one run, from the configuration that was laid down for it.

    python -m sakd.sweeps.work SUBMISSION RUN

Its exit code, and so SLURM's word, says whether it failed.
"""

import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from sakd.errors import RunError, in_one_line
from sakd.process import set_up
from sakd.runs import Run, code
from sakd.signals import interruptible
from sakd.sweeps.submissions import forget_failure, note_failure
from sakd.terminal import start_logging


class Work:
    """Called by submitit in a job. Requeued after a time limit it is called again, and goes on from the last
    checkpoint."""

    def __init__(self, submission: Path, name: str):
        self.submission, self.name = submission, name

    def __call__(self) -> dict[str, Any]:
        set_up()
        log = start_logging()
        forget_failure(self.submission, self.name)
        log.info("%s: code of %s", self.name, code.of_this_process()[0])
        with interruptible():
            try:
                if code.of_this_process()[0].snapshot is None:
                    raise RunError(
                        f"{code.ROOT}: found code that can change, expected the copy that was made for "
                        "this job"
                    )
                return self._run()
            except SystemExit:  # submitit has put the job back into the queue
                raise
            except BaseException as error:
                note_failure(self.submission, self.name, in_one_line(error), traceback.format_exc())
                raise

    def _run(self) -> dict[str, Any]:
        from sakd.runs.job import execute
        from sakd.runs.tracking import catch_up

        run = Run(json.loads((self.submission / "cells" / f"{self.name}.json").read_text()))
        if run.result() is not None:
            catch_up(run)
        return execute(run.config, leave_failure=True)

    def checkpoint(self) -> Any:
        """submitit's: what is to be called when the job comes to its next turn. SLURM, asked for that turn,
        ends this one with SIGTERM, which must not count as an interruption."""
        from submitit.helpers import DelayedSubmission

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return DelayedSubmission(Work(self.submission, self.name))


if __name__ == "__main__":
    try:
        Work(Path(sys.argv[1]), sys.argv[2])()
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        sys.exit(1)
