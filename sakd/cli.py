"""`sakd`: what is done with runs besides launching them."""

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import BashComplete

from sakd.commands import folder as of_folder
from sakd.commands import trained as of_trained
from sakd.commands.shared import FOLDER, FORM, check_output, check_outputs, errors_told, from_folder
from sakd.credentials import hidden, remember, remember_typed
from sakd.errors import ConfigError, SakdError, did_you_mean
from sakd.names import BEST, HEADLINE
from sakd.signals import ended_in_order

if TYPE_CHECKING:
    from sakd.compare import Finished
    from sakd.decisions import Recorded, Together
    from sakd.sweeps import Plan

LAST = 5  # epochs of which `sakd spots` tells how a run decided in the end


LAUNCHES = "sakd.launches"
# A key or a folder goes on, what else is completed does not.
WITHOUT_SPACE = """
_sakd_without_space() {
    _sakd_completion "$@"
    [[ ${COMPREPLY[0]} != *[=./] ]] || compopt -o nospace
}
complete -o nosort -F _sakd_without_space sakd
"""


class _Commands(click.Group):
    """Commands that an interruption ends in order, and that show no password that was typed."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        context.meta[LAUNCHES] = arguments[:1] == ["launch"]
        return super().parse_args(context, list(map(remember_typed, arguments)))

    def invoke(self, context: click.Context) -> Any:
        with nullcontext() if context.meta[LAUNCHES] else ended_in_order():  # a launch says more of its end
            return super().invoke(context)


@click.group(cls=_Commands)
@click.version_option(package_name="sakd")
def main() -> None:
    """Spot-adaptive knowledge distillation."""


def _as_hydra_completes(context: click.Context, _: click.Parameter, begun: str) -> list[str]:
    from sakd.configuration.compose import completions

    return completions(next(iter(context.params.values())) or (), begun)


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument(
    "overrides",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[OVERRIDE]...",
    shell_complete=_as_hydra_completes,
)
def launch(overrides: tuple[str, ...]) -> None:
    """Carry out a run, or with -m a sweep's: `python launch.py`, from wherever it is called.

    `sakd launch --help` is Hydra's.
    """
    from sakd.launch import run

    sys.argv = ["sakd launch", *overrides]
    run()


@main.command()
def completion() -> None:
    """Print what bash needs to complete `sakd`, its overrides, and `python launch.py` at the tab key.

    To be evaluated: eval "$(sakd completion)". zsh and fish complete `sakd` by
    _SAKD_COMPLETE=zsh_source sakd and _SAKD_COMPLETE=fish_source sakd.
    """
    from sakd.launch import run

    click.echo(BashComplete(main, {}, "sakd", "_SAKD_COMPLETE").source() + WITHOUT_SPACE)
    sys.argv = ["launch.py", "-sc", "install=bash"]
    run()


@main.command()
@click.argument("runs", type=FOLDER, default="runs", metavar="[RUNS]")
@click.option("--uri", help="A server that may be sent to, beside the configured one.")
@click.option("--untracked", is_flag=True, help="Runs that finished with tracking=none, too.")
def sync(runs: Path, uri: str | None, untracked: bool) -> None:
    """Send to MLflow what it lacks of the runs in RUNS, each epoch exactly once.

    To files, and to the servers that MLFLOW_TRACKING_URI, the configuration or --uri names, the latter with
    its password where it has one: credentials go to no server that the runs alone name.
    """
    from sakd import sweep_page
    from sakd.configuration.compose import compose_one
    from sakd.runs.tracking import adopt, synchronise_all
    from sakd.terminal import start_logging

    start_logging()
    remember(uri or "")
    with errors_told():
        if not runs.is_dir():
            raise ConfigError(f"{runs}: found no such folder, expected a folder of runs")
        tracking = compose_one(("tracking=mlflow",))["tracking"]  # its store is known from here on
    if untracked:
        adopt(runs, tracking)
    sweep_page.settle(runs)
    outcomes = synchronise_all(runs)
    failures = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Exception)}
    sent = sum(outcome for outcome in outcomes.values() if isinstance(outcome, int))
    click.echo(f"{len(outcomes)} runs, {sent} epochs sent, {len(failures)} runs failed")
    for name, error in failures.items():
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        click.echo(hidden(f"{name}: {told}"), err=True)
    if failures:
        raise SystemExit(1)


@main.command()
@click.option(
    "--write",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Replace the tables that this file has; in a YAML file, the comments. May be given again.",
)
def catalogue(write: tuple[Path, ...]) -> None:
    """Print the tables of docs/, or write them into its pages, or their like into conf/config.yaml."""
    from sakd import catalogue

    with errors_told():
        if not write:
            click.echo("\n".join(catalogue.tables().values()), nl=False)
        for path in write:
            blocks = catalogue.comments() if path.suffix == ".yaml" else catalogue.tables()
            catalogue.write(blocks, path)


def _named_sweep(command: Callable) -> Callable:
    """What names a sweep: the overrides that launch it."""
    return click.argument(
        "overrides", nargs=-1, required=True, metavar="OVERRIDE...", shell_complete=_as_hydra_completes
    )(command)


@main.command()
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=_as_hydra_completes)
@click.option("--format", "form", type=FORM, default="terminal", show_default=True)
@click.option("--cells", "each", is_flag=True, help="A line for each cell.")
@click.option(
    "--from",
    "folder",
    type=click.Path(path_type=Path),
    help="A folder of runs, without OVERRIDE. By default runs.",
)
def status(overrides: tuple[str, ...], form: str, each: bool, folder: Path | None) -> None:
    """What has become of a sweep's cells: finished, running, queued, failed, lost or missing.

    OVERRIDE... are those that launched it, such as sweeps=digits seed=0,1. A run that was killed without
    warning, and that MLflow still has as running, is marked KILLED there. Without any: how all sweeps of the
    folder stand.
    """
    from sakd import sweep_page, sweeps
    from sakd.sweeps import report

    with errors_told():
        if not overrides:
            if each:
                raise ConfigError(
                    "--cells: found no sweep, expected beside it the overrides that launched one"
                )
            click.echo(of_folder.all_sweeps(folder or Path("runs"), form), nl=False)
            return
        if folder is not None:
            raise ConfigError(f"--from: found {folder} beside a sweep, whose folder is its key runs=…")
        planned = _planned(overrides)
        standings = sweeps.survey(planned.everything, planned.runs)
        sweeps.settle(planned, standings)
        sweep_page.update(planned.cells, report.states_of(planned, standings))
        click.echo(report.FORMATS[form](planned, standings, each), nl=False)


@main.command()
@_named_sweep
def retry(overrides: tuple[str, ...]) -> None:
    """Submit a sweep's failed and lost cells again, to where they were last submitted, or by
    hydra/launcher=….

    hydra.launcher.KEY=VALUE changes what they were submitted with.
    """
    from sakd import sweep_page, sweeps
    from sakd.sweeps import report
    from sakd.terminal import start_logging

    start_logging()
    with errors_told():
        if any(text.startswith("hydra/launcher=") for text in overrides):
            planned = _planned(overrides)
        else:
            changes = [text for text in overrides if text.startswith("hydra.launcher.")]
            planned = sweeps.as_before(
                _planned(tuple(text for text in overrides if text not in changes)), changes
            )
        standings = sweeps.launch(planned, ("failed", "lost"))
        if standings is not None:
            shown = sweep_page.update(planned.cells, report.states_of(planned, standings))
            report.conclude_launch(planned, standings, shown)


@main.command()
@_named_sweep
def cancel(overrides: tuple[str, ...]) -> None:
    """End a sweep's cells, running and waiting; others that train beside them go on. What they have trained
    stays, and goes on when launched again."""
    from sakd import sweeps

    with errors_told():
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


@main.command()
@click.argument("filters", nargs=-1, metavar="[KEY=VALUE[,VALUE...]]...")
@click.option(
    "--from",
    "sources",
    multiple=True,
    default=["runs"],
    show_default=True,
    help="A folder of runs, an MLflow store's URI, mlflow, or a file of --keep; may be given again.",
)
@click.option(
    "--metric",
    default=HEADLINE,
    show_default=True,
    help=f"Of the last epoch; {BEST}, loss/task.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "markdown", "latex", "csv", "json"]),
    default="terminal",
    show_default=True,
)
@click.option("--runs", "with_runs", is_flag=True, help="Name the runs behind each group.")
@click.option("--cost", "with_costs", is_flag=True, help="Show what the networks cost.")
@click.option(
    "--published",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Other published figures.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the differences, as SVG or PNG."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file for the table.")
@click.option(
    "--keep",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A JSON file for the runs that are compared: --from makes the same table of it.",
)
def compare(
    filters: tuple[str, ...],
    sources: tuple[str, ...],
    metric: str,
    form: str,
    with_runs: bool,
    with_costs: bool,
    published: Path | None,
    plot: Path | None,
    output: Path | None,
    keep: Path | None,
) -> None:
    """Compare the spot modes of finished runs, seed by seed.

    KEY is any key of the configuration, such as optimizer.lr, or dataset, teacher, student, distiller,
    spot_mode, seed. With sweeps=NAME the arguments are a sweep's, as they launch it: its cells are compared,
    and those that are not finished are missing.
    """
    from sakd import compare
    from sakd.compare import formats, kept, plots
    from sakd.compare.published import FIGURES, read_published
    from sakd.files import write_whole

    with errors_told():
        if plot is not None:
            plots.check_plot(plot)
        outputs = {"--plot": plot, "--keep": keep, "--output": output}
        asked = {option: path for option, path in outputs.items() if path is not None}
        check_outputs(asked, map(compare.file_of, sources))
        figures = read_published(published or FIGURES)
        runs, expected = _compared(sources, filters)
        comparison = compare.compare(runs, metric, figures, expected, with_costs)
        text = formats.FORMATS[form](comparison, with_runs)
        if plot is not None:
            write_whole(plot, plots.plot(comparison, plot.suffix))
        if keep is not None:
            kept.write(runs, keep)
        if output is not None:
            write_whole(output, text.encode())
        else:
            click.echo(text, nl=False)


def _compared(
    sources: tuple[str, ...], filters: tuple[str, ...]
) -> "tuple[list[Finished], list[dict[str, str]] | None]":
    """The runs to compare, and, of a sweep, the names of all cells that there should be."""
    from sakd.compare import read, select
    from sakd.configuration import short_names

    if not any(text.startswith("sweeps=") for text in filters):
        return select(read(*sources), filters), None
    cells = {job.name: short_names(job.run.config) for job in _planned(filters).cells}
    return [run for run in read(*sources) if run.name in cells], list(cells.values())


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@from_folder
@click.option("--last", type=click.IntRange(min=1), help="Epochs that count as the last.  [default: 5]")
@click.option("--epochs", help="Look at these alone: 1-5, or 7.")
@click.option("--across-spots", "across", is_flag=True, help="Compare different spots, too.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder for pictures, each as PNG and SVG.",
)
@click.option("--split", type=click.Choice(["train", "test"]), help="List images of this split.")
@click.option("--spot", help="The spot of the list.")
@click.option("--skipped/--kept", "skipped", default=None, help="Those sent past the spot, or the others.")
@click.option("--never/--always", "never", default=None, help="Those distilled in no epoch, or in all.")
@click.option("--format", "form", type=click.Choice(["terminal", "csv", "json"]), help="Of the list.")
def spots(
    runs: tuple[str, ...],
    folder: Path,
    last: int | None,
    epochs: str | None,
    across: bool,
    output: Path | None,
    split: str | None,
    spot: str | None,
    skipped: bool | None,
    never: bool | None,
    form: str | None,
) -> None:
    """See where runs distil: for whom, when, and beside what random would.

    RUN is a run's folder, its name in the folder of runs, or the beginning of its name. Of several runs it is
    told whether they agree on samples beyond chance. With --split, --spot and --skipped or --kept the images
    are listed that the policy of one finished run, without noise, sends past a spot or does not; with --spot
    and --never or --always the training images that one run distilled there in no epoch, or in all.
    """
    from sakd.configuration import find_run
    from sakd.decisions import beside, chosen, text
    from sakd.runs.find import read_recorded

    with errors_told():
        asked = chosen.wanted(split, spot, skipped, never, form)
        if asked is not None:
            if len(runs) > 1:
                raise ConfigError(f"--spot: found {len(runs)} runs, expected one, whose images are listed")
            others = {"--output": output, "--last": last, "--across-spots": across or None}
            _refuse_beside(f"--{asked.which}", others | {"--epochs": epochs if asked.by_policy else None})
        last = last or LAST
        found = [read_recorded(find_run(called, folder)) for called in runs]
        if epochs is not None:
            found = [run.within(*_span(epochs)) for run in found]
        if asked is not None:
            listed = chosen.choose(found[0], asked)
            click.echo(chosen.FORMATS[form or "terminal"](listed, _files(found[0], asked.split)), nl=False)
        elif len(found) == 1 and not across:
            click.echo(text.of_one(found[0], last), nl=False)
            if output is not None:
                _draw(found[0], output)
        else:
            together = beside(found, last, across)
            click.echo(text.of_several(together), nl=False)
            if output is not None:
                _draw_together(together, output)


def _span(epochs: str) -> tuple[int, int]:
    """The first and the last of the epochs that are asked for, of ``"1-5"`` or ``"7"``."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", epochs)
    if found is None:
        raise ConfigError(f"--epochs: found {epochs!r}, expected the number of an epoch, or two such as 1-5")
    return int(found[1]), int(found[2] or found[1])


def _refuse_beside(what: str, options: "dict[str, object]") -> None:
    """Raise ConfigError for an option that is given beside what takes none such."""
    for name, value in options.items():
        if value is not None:
            given = "" if value is True else f"={value}"
            raise ConfigError(f"{name}: found {name}{given} beside {what}, expected it without")


def _files(run: "Recorded", split: str) -> list[str] | None:
    """The files of a run's images; a line tells where they are not at hand."""
    from sakd.decisions import samples

    try:
        return samples.file_names(run, split)
    except SakdError as error:
        click.echo(hidden(f"files are not named: {error}"), err=True)
        return None


def _draw(run: "Recorded", output: Path) -> None:
    from sakd.decisions import pictures, samples

    try:
        images = samples.images_of(run, "train")
    except SakdError as error:
        click.echo(hidden(f"no image is shown: {error}"), err=True)
        images = None
    _write(output, pictures.contents(pictures.draw(run.record, run.name, images)))


def _draw_together(together: "Together", output: Path) -> None:
    from sakd.decisions import pictures

    tables = {"agreement": together.pairs.drop(columns=["left", "right"]), "random": together.random}
    figures = {
        "agreement": pictures.draw_agreement(together),
        "random": pictures.draw_beside_random(together),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    written = {f"{name}.csv": table.to_csv(index=False).encode() for name, table in tables.items()}
    _write(output, written | pictures.contents(drawn))


def _write(output: Path, contents: "dict[str, bytes]") -> None:
    """Write files, which are all there is to write, into a folder."""
    from sakd.files import explained, write_whole

    with explained(output):
        output.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(output / name, content)
    click.echo(f"\n{output}: {', '.join(contents)}")


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
    "--from", "source", type=click.Path(path_type=Path), help="The folder of runs.  [default: runs]"
)
def report(words: tuple[str, ...], output: Path, source: Path | None) -> None:
    """Write a page about runs that opens without a network and can be sent: comparison, curves, spots,
    configurations, teachers, and what went wrong.

    RUN is a run's folder, its name, or the beginning of it; KEY=VALUE chooses as in `sakd compare`. With
    sweeps=NAME the arguments are a sweep's, as they launch it.
    """
    from sakd.report import of_folder, of_sweep, write_report

    with errors_told():
        check_output(output)
        if any(word.startswith("sweeps=") for word in words):
            _refuse_beside("sweeps=…, whose runs are where runs=… says", {"--from": source})
            write_report(of_sweep(_planned(words)), output)
        else:
            write_report(of_folder(source or Path("runs"), words), output)
    click.echo(str(output))


@main.command()
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...", shell_complete=_as_hydra_completes)
@click.option("--only", multiple=True, metavar="NAME", help="This check alone; may be given again.")
@click.option("--slurm", "canary", is_flag=True, help="Let a job of one minute examine a node, too.")
@click.option("--format", "form", type=FORM, default="terminal", show_default=True)
def doctor(overrides: tuple[str, ...], only: tuple[str, ...], canary: bool, form: str) -> None:
    """Look whether this machine can do what OVERRIDE... ask for.

    That is Python, packages, GPUs, data, MLflow's store, the folder of runs and, with hydra/launcher=slurm,
    SLURM. Exit code 1 where something cannot be.
    """
    import json
    from dataclasses import asdict

    from sakd.configuration.compose import sweep
    from sakd.doctor import CHECKS, Asked, examine
    from sakd.process import set_up

    set_up()
    with errors_told():
        if unknown := [name for name in only if name not in CHECKS]:
            near = did_you_mean(unknown[0], CHECKS)
            raise ConfigError(f"--only: found {unknown[0]!r}, expected one of {', '.join(CHECKS)}.{near}")
        launched = any(override.startswith("hydra/launcher=") for override in overrides)
        swept = sweep([*overrides, *(["hydra/launcher=slurm"] if canary and not launched else [])])
        findings = []
        for finding in examine(Asked(swept.cells[0][1], swept.launcher, overrides, canary), only):
            findings.append(finding)
            if form == "terminal":
                click.echo(f"{finding.state:<6}{finding.name:<10}{finding.told}")
    if form == "json":
        click.echo(json.dumps(list(map(asdict, findings)), indent=1))
    if any(finding.state == "fail" for finding in findings):
        raise SystemExit(1)


for command in (*of_folder.COMMANDS, *of_trained.COMMANDS):
    main.add_command(command)


if __name__ == "__main__":
    main()
