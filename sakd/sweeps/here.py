"""A sweep's cells in this process, cohort after cohort."""

import logging
from collections.abc import Callable, Mapping, Sequence

from sakd.configuration.compose import Sweep
from sakd.errors import SakdError, in_one_line
from sakd.runs import Run
from sakd.runs.tracking import Delivery, concluded, note_sweep, under_way
from sakd.sweeps import report
from sakd.sweeps.cohorts import cohorts
from sakd.sweeps.plan import PlannedRun, check_parts

log = logging.getLogger("sakd")


Shown = Callable[[Sequence[PlannedRun], Mapping[str, str]], Mapping[str, str]]


def train(sweep: Sweep, show: Shown = lambda cells, states: {}) -> None:
    """Train the cells that are not finished, and what they need first; then show all of them in one table.
    SystemExit with an error line for each cell that failed, which did not stop the others.

    ``show(cells, states)`` brings the sweep's page up to date once all are over, and returns what shows it,
    by what that is called.
    """
    cells = {cell.name: cell for cell in (PlannedRun(Run(config), (), line) for line, config in sweep.cells)}
    errors: dict[str, str] = {}

    def ended(name: str, outcome: object) -> None:
        if isinstance(outcome, Exception):
            errors[name] = in_one_line(outcome)
            if not isinstance(outcome, SakdError):
                errors[name] += f" (traceback in {cells[name].run.folder / 'run.log'})"
            log.error("%s failed: %s", " ".join(cells[name].overrides), errors[name])

    check_parts(cells.values())
    folder = note_sweep({name: cell.run.config for name, cell in cells.items()}, sweep.overrides)
    with under_way(folder):
        waiting, delivery = [], Delivery()
        for cell in cells.values():
            try:
                if cell.run.result() is None:
                    waiting.append(cell)
            except SakdError as error:
                ended(cell.name, error)
        if waiting:
            from sakd.runs.job import (
                execute_together,  # torch and the rest load only for what is not finished
            )

            with concluded(delivery, sweep=folder):
                for cohort in cohorts(waiting):
                    configs = [cell.run.config for cell in cohort]
                    execute_together(configs, leave_failures=True, ended=ended, delivery=delivery)
        delivery.catch_up(*(cell.run for cell in cells.values()))
        states = {name: "failed" if name in errors else "finished" for name in cells}
        shown = show(list(cells.values()), states)
    report.conclude(list(cells.values()), sweep.overrides, states, errors, shown)
