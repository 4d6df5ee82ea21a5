"""`sakd list`, `show`, `reproduce` and `gc`: what lies in a folder of runs."""

from pathlib import Path

import click

from sakd.commands.shared import FOLDER, FORM, errors_told, from_folder
from sakd.credentials import hidden


@click.command("list")
@click.argument("filters", nargs=-1, metavar="[KEY=VALUE[,VALUE...]]...")
@from_folder
@click.option(
    "--sort",
    "order",
    type=click.Choice(["age", "name", "state", "epochs", "accuracy"]),
    default="age",
    show_default=True,
    help="The youngest, or the best, first.",
)
@click.option("--format", "form", type=FORM, default="terminal", show_default=True)
def list_runs(filters: tuple[str, ...], folder: Path, order: str, form: str) -> None:
    """List the runs of a folder: state, epochs, accuracy in percent, age.

    KEY=VALUE chooses as in `sakd compare`.
    """
    from sakd import listing

    with errors_told():
        runs, unreadable = listing.listed(folder, filters, order)
    click.echo(listing.FORMATS[form](runs), nl=False)
    for line in unreadable:
        click.echo(hidden(line), err=True)
    if unreadable:
        raise SystemExit(1)


@click.command()
@click.argument("run", metavar="RUN")
@from_folder
@click.option("--format", "form", type=FORM, default="terminal", show_default=True)
def show(run: str, folder: Path, form: str) -> None:
    """Show all that is known of a run.

    RUN is a run's folder, its name in the folder of runs, or the beginning of its name.
    """
    from sakd import listing
    from sakd.configuration import find_run

    with errors_told():
        click.echo(listing.SHOWN_FORMATS[form](listing.shown(find_run(run, folder))), nl=False)


def all_sweeps(folder: Path, form: str) -> str:
    """How all sweeps of a folder of runs stand, as `sakd status` says it. Raises a SakdError."""
    from sakd import listing
    from sakd.sweeps.found import sweeps_of

    return listing.SWEEPS_FORMATS[form](sweeps_of(folder))


@click.command()
@click.argument("run", metavar="RUN")
@from_folder
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Percentage points of accuracy by which it may differ; by default 1 on a GPU, and on the CPU none: "
    "weights are to be the same bit for bit.",
)
def reproduce(run: str, folder: Path, tolerance: float | None) -> None:
    """Train a finished run again, by the code that it was trained by, and compare the two.

    Its commit and code.diff are checked out in .reproduced beside it, with the teacher that it found. Says
    which packages have other versions now; the exit code is 1 if it is not reproduced.
    """
    from sakd import reproduce
    from sakd.configuration import find_run

    with errors_told():
        found = reproduce.reproduce(find_run(run, folder))
        if tolerance is None and "cuda" in found.devices:
            tolerance = reproduce.ON_A_GPU
        click.echo(reproduce.as_text(found, tolerance), nl=False)
        if not found.holds(tolerance):
            raise SystemExit(1)


@click.command()
@click.argument("folder", type=FOLDER, default="runs", metavar="[RUNS]")
@click.option("--dry-run", is_flag=True, help="Say what would go, and leave it.")
@click.option(
    "--older-than",
    "days",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Days; what is younger stays.",
)
def gc(folder: Path, dry_run: bool, days: float) -> None:
    """Remove what nobody needs in the folder RUNS: old copies of the code, submissions, leftovers of kills.

    A submission stays while it has a job, or is the last that has a run which is not finished, and so does
    the code that its jobs run. Nothing in a run's folder goes but what a kill cut short.
    """
    from sakd import upkeep

    with errors_told():
        click.echo(upkeep.as_text(upkeep.collect(folder, days, dry_run), dry_run), nl=False)


COMMANDS = (list_runs, show, reproduce, gc)
