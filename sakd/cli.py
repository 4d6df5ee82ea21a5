"""`sakd`: what is done with runs besides launching them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sakd.credentials import hidden, remember, remember_typed
from sakd.errors import SakdError
from sakd.signals import ended_in_order

if TYPE_CHECKING:
    from sakd.compare import Finished
    from sakd.sweeps import Plan


class _Commands(click.Group):
    """Commands that an interruption ends in order, and that show no password that was typed."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        return super().parse_args(context, list(map(remember_typed, arguments)))

    def invoke(self, context: click.Context) -> Any:
        with ended_in_order():
            return super().invoke(context)


@click.group(cls=_Commands)
@click.version_option(package_name="sakd")
def main() -> None:
    """Spot-adaptive knowledge distillation."""


@main.command()
@click.argument("runs", type=click.Path(exists=True, file_okay=False, path_type=Path), default="runs")
@click.option("--uri", help="A server that may be sent to, beside the configured one.")
def sync(runs: Path, uri: str | None) -> None:
    """Send to MLflow what it lacks of the runs in RUNS, each epoch exactly once.

    To files, and to the servers that MLFLOW_TRACKING_URI, the configuration or --uri names, the latter with
    its password where it has one: credentials go to no server that the runs alone name.
    """
    from sakd.configuration.compose import compose_one
    from sakd.runs.tracking import synchronise_all
    from sakd.terminal import start_logging

    start_logging()
    remember(uri or "")
    with _errors_told():
        compose_one(())  # the store that the configuration names is known from here on
    outcomes = synchronise_all(runs)
    failures = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Exception)}
    sent = sum(outcome for outcome in outcomes.values() if isinstance(outcome, int))
    click.echo(f"{len(outcomes)} runs, {sent} epochs sent, {len(failures)} runs failed")
    for name, error in failures.items():
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        click.echo(hidden(f"{name}: {told}"), err=True)
    if failures:
        raise SystemExit(1)


@main.command("export-checkpoint")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="By default RUN/student.pth.")
def export(run: Path, output: Path | None) -> None:
    """Write the student of the finished run in the folder RUN for RepDistiller, mdistiller and the like."""
    from sakd.export import export_checkpoint

    output = output or run / "student.pth"
    with _errors_told():
        export_checkpoint(run, output)
    click.echo(str(output))


@main.command()
@click.option(
    "--write",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Replace the tables in this file; in a YAML file, the comments.",
)
def catalogue(write: Path | None) -> None:
    """Print the README's tables, or write them into it, or their like into conf/config.yaml."""
    from sakd import catalogue

    with _errors_told():
        if write is None:
            click.echo("\n".join(catalogue.tables().values()), nl=False)
        else:
            blocks = catalogue.comments() if write.suffix == ".yaml" else catalogue.tables()
            catalogue.write(blocks, write)


def _named_sweep(command: Callable) -> Callable:
    """What names a sweep: the overrides that launch it."""
    return click.argument("overrides", nargs=-1, required=True, metavar="OVERRIDE...")(command)


@main.command()
@_named_sweep
@click.option(
    "--format", "form", type=click.Choice(["terminal", "json"]), default="terminal", show_default=True
)
@click.option("--cells", "each", is_flag=True, help="A line for each cell.")
def status(overrides: tuple[str, ...], form: str, each: bool) -> None:
    """What has become of a sweep's cells: finished, running, queued, failed, lost or missing.

    OVERRIDE... are those that launched it, such as sweeps=digits seed=0,1. A run that was killed without
    warning, and that MLflow still has as running, is marked KILLED there.
    """
    from sakd import sweeps
    from sakd.sweeps import report

    with _errors_told():
        planned = _planned(overrides)
        standings = sweeps.survey(planned.everything, planned.runs)
        sweeps.settle(planned, standings)
        click.echo(report.FORMATS[form](planned, standings, each), nl=False)


@main.command()
@_named_sweep
def retry(overrides: tuple[str, ...]) -> None:
    """Submit a sweep's failed and lost cells again, to where they were last submitted, or by
    hydra/launcher=….

    hydra.launcher.KEY=VALUE changes what they were submitted with.
    """
    from sakd import sweeps
    from sakd.sweeps import report
    from sakd.terminal import start_logging

    start_logging()
    with _errors_told():
        if any(text.startswith("hydra/launcher=") for text in overrides):
            planned = _planned(overrides)
        else:
            changes = [text for text in overrides if text.startswith("hydra.launcher.")]
            planned = sweeps.as_before(
                _planned(tuple(text for text in overrides if text not in changes)), changes
            )
        standings = sweeps.launch(planned, ("failed", "lost"))
        if standings is not None:
            report.conclude_launch(planned, standings)


@main.command()
@_named_sweep
def cancel(overrides: tuple[str, ...]) -> None:
    """End a sweep's cells, running and waiting; others that train beside them go on. What they have trained
    stays, and goes on when launched again."""
    from sakd import sweeps

    with _errors_told():
        number, others = sweeps.cancel(_planned(overrides))
        click.echo(f"{sweeps.number_of(number, 'cell')} cancelled")
        for name in others:
            click.echo(f"{name} runs by another way than a launch of this machine, and goes on", err=True)


def _planned(overrides: tuple[str, ...]) -> "Plan":
    from sakd.configuration.compose import sweep
    from sakd.process import set_up
    from sakd.sweeps import plan

    set_up()  # planning may build networks, with torch
    return plan(sweep(overrides))


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except SakdError as error:
        raise click.ClickException(hidden(str(error))) from error


@main.command()
@click.argument("filters", nargs=-1, metavar="[KEY=VALUE[,VALUE...]]...")
@click.option(
    "--from",
    "source",
    default="runs",
    show_default=True,
    help="A folder of runs, an MLflow store's URI, or mlflow.",
)
@click.option(
    "--metric",
    default="test/accuracy",
    show_default=True,
    help="Of the last epoch; test/best_accuracy, loss/task.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "markdown", "latex", "csv", "json"]),
    default="terminal",
    show_default=True,
)
@click.option("--runs", "with_runs", is_flag=True, help="Name the runs behind each group.")
@click.option(
    "--published",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Other published figures.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the differences, as SVG or PNG."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file for the table.")
def compare(
    filters: tuple[str, ...],
    source: str,
    metric: str,
    form: str,
    with_runs: bool,
    published: Path | None,
    plot: Path | None,
    output: Path | None,
) -> None:
    """Compare the spot modes of finished runs, seed by seed.

    KEY is any key of the configuration, such as optimizer.lr, or dataset, teacher, student, distiller,
    spot_mode, seed. With sweeps=NAME the arguments are a sweep's, as they launch it: its cells are compared,
    and those that are not finished are missing.
    """
    from sakd import compare
    from sakd.compare import formats, plots
    from sakd.compare.published import FIGURES, read_published
    from sakd.files import write_whole

    with _errors_told():
        if plot is not None:
            plots.check_plot(plot)
        figures = read_published(published or FIGURES)
        runs, expected = _compared(source, filters)
        comparison = compare.compare(runs, metric, figures, expected)
        text = formats.FORMATS[form](comparison, with_runs)
        if plot is not None:
            write_whole(plot, plots.plot(comparison, plot.suffix))
        if output is not None:
            write_whole(output, text.encode())
        else:
            click.echo(text, nl=False)


def _compared(source: str, filters: tuple[str, ...]) -> "tuple[list[Finished], list[dict[str, str]] | None]":
    """The runs to compare, and, of a sweep, the names of all cells that there should be."""
    from sakd.compare import read, select
    from sakd.configuration import short_names

    if not any(text.startswith("sweeps=") for text in filters):
        return select(read(source), filters), None
    cells = {job.name: short_names(job.run.config) for job in _planned(filters).cells}
    return [run for run in read(source) if run.name in cells], list(cells.values())


@main.command()
@click.argument("words", nargs=-1, metavar="[RUN | KEY=VALUE[,VALUE...]]...")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="The file for the page.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    default="runs",
    show_default=True,
    help="The folder of runs.",
)
def report(words: tuple[str, ...], output: Path, source: Path) -> None:
    """Write a page about runs that opens without a network and can be sent: comparison, curves, spots,
    configurations, teachers, and what went wrong.

    RUN is a run's folder, its name, or the beginning of it; KEY=VALUE chooses as in `sakd compare`. With
    sweeps=NAME the arguments are a sweep's, as they launch it.
    """
    from sakd.report import check_output, of_folder, of_sweep, write_report

    with _errors_told():
        check_output(output)
        is_sweep = any(word.startswith("sweeps=") for word in words)
        write_report(of_sweep(_planned(words)) if is_sweep else of_folder(source, words), output)
    click.echo(str(output))


if __name__ == "__main__":
    main()
