"""`sakd evaluate` and `export`: what is done with a finished run's network."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sakd.commands.shared import FORM, check_output, errors_told, from_folder
from sakd.credentials import hidden
from sakd.errors import ConfigError, SakdError

if TYPE_CHECKING:
    from sakd.trained import Trained

_overrides = click.argument("overrides", nargs=-1, metavar="[dataset=NAME | dataset.KEY=VALUE]...")


_best = click.option(
    "--best", is_flag=True, help="The weights of the best epoch, of a run with keep_best=true."
)


@click.command()
@click.argument("run", metavar="RUN|FILE")
@_overrides
@from_folder
@_best
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), help="The images to look at.  [default: test]"
)
@click.option("--linear-probe", "probes", is_flag=True, help="Learn a linear classifier on frozen features.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--format", "form", type=FORM, default="terminal", show_default=True)
def evaluate(
    run: str,
    overrides: tuple[str, ...],
    folder: Path,
    best: bool,
    split: str | None,
    probes: bool,
    device: str,
    form: str,
) -> None:
    """Measure a trained network: top-1, top-5, loss, calibration, agreement with its teacher, each class.

    On its run's own data, or with dataset=NAME on another with the same classes; the network normalises as
    it was trained to. RUN is a run's folder, its name, or the beginning of its name; FILE, a
    student.safetensors, needs dataset=NAME. With --linear-probe a linear classifier learns the data set's
    classes from the frozen embedding, and is tested: the transfer protocol of CRD.
    """
    from sakd import trained
    from sakd.configuration import build
    from sakd.trained import evaluate, images, probe

    with errors_told():
        if probes and split is not None:
            raise ConfigError(f"--split: found {split} beside --linear-probe, which trains and tests")
        network = trained.read(run, folder, best=best)
        on = build.device(device)
        dataset = images.dataset_of(network, overrides)
        about = " ".join(overrides) or network.about.dataset
        if probes:
            text = probe.FORMATS[form](network.name, about, probe.probe(network, dataset, on))
        else:
            shown = images.part(dataset, split or "test")
            images.check_fits(network, dataset, shown)
            teacher = _of_teacher(network)
            beside = None if teacher is None else teacher.module()
            found = evaluate.evaluate(network.module(), shown, on, beside)
            text = evaluate.FORMATS[form](network.name, f"{about}, {split or 'test'}", found)
        click.echo(text, nl=False)


@click.command()
@click.argument("run", metavar="RUN|FILE")
@_overrides
@from_folder
@_best
@click.option(
    "--to",
    type=click.Choice(["torch.export", "onnx", "checkpoint", "safetensors"]),
    required=True,
    help="checkpoint: for RepDistiller, mdistiller and the like.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="By default beside the weights: student.pt2, .onnx, .pth, or exported.safetensors.",
)
@click.option(
    "--normalise/--no-normalise",
    "normalises",
    default=None,
    help="Take images as they are stored, 0 to 255 (the default), or normalised: torch.export, onnx.",
)
def export(
    run: str,
    overrides: tuple[str, ...],
    folder: Path,
    best: bool,
    to: str,
    output: Path | None,
    normalises: bool | None,
) -> None:
    """Write a trained network in another format, and say what it costs beside its teacher.

    What is written is read back first and run on the whole test set: it must have the same accuracy, and
    logits that differ by at most 0.0001 of the largest. dataset.root=… says where the images lie now; a FILE
    needs dataset=NAME.
    """
    from sakd import trained
    from sakd.trained import cost, images
    from sakd.trained import export as exporting

    with errors_told():
        if output is not None:
            check_output(output)
        network = trained.read(run, folder, best=best)
        output = output or exporting.default_output(network, to)
        dataset = images.dataset_of(network, overrides)
        images.check_fits(network, dataset, dataset.test)
        found = exporting.export(network, to, output, normalises, dataset.test)
        click.echo(f"{output}: {found.accuracy:.2f} % of {found.images:,} test images, as the network itself")
        click.echo(f"logits differ by at most {found.difference:.2g}, the largest is {found.largest:.3g}\n")
        teacher = _of_teacher(network)
        own = None if teacher is None else cost.costs(teacher)
        click.echo(cost.as_text(cost.costs(network), own), nl=False)


def _of_teacher(network: "Trained") -> "Trained | None":
    """The teacher, if the run had one; a line tells where it is not at hand."""
    from sakd.trained import teacher_of

    try:
        return teacher_of(network)
    except SakdError as error:
        click.echo(hidden(f"nothing of the teacher: {error}"), err=True)
        return None


COMMANDS = (evaluate, export)
