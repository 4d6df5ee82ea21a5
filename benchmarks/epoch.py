"""Cost of a training epoch, with its data: ``python -m benchmarks.epoch --help``.

It is explained in benchmarks/README.md. The same training steps are fed twice: by batches cut from images
that lie on the device, and by torchvision's transforms in the workers of a DataLoader, as the field's scripts
do it.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from benchmarks import parts
from benchmarks.parts import CROP_PADDING, random_images
from benchmarks.step import Timed, as_in_a_run, checked, measure, parser_of, print_table, write_csv
from sakd.data import Batch, Dataset, steps_per_epoch, train_batches
from sakd.streams import stream
from sakd.training import Cohort

COLUMNS = ("distiller", "mode", "pair", "device", "seconds", "images_per_second", "plain_seconds", "ratio")


# ---- the two ways to batches


class PlainImages(TorchDataset):
    """Images one by one, as torchvision's CIFAR gives them.

    Each is a PIL image from an array, then the transforms.
    """

    def __init__(self, dataset: Dataset):
        self.pixels = dataset.train.images.permute(0, 2, 3, 1).numpy()
        self.labels = dataset.train.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(dataset.image_size, padding=CROP_PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(dataset.mean, dataset.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index], index


def plain_loader(dataset: Dataset, options: argparse.Namespace) -> DataLoader:
    """A DataLoader of plain images.

    Its workers live from epoch to epoch: starting them is not timed.
    """
    return DataLoader(
        PlainImages(dataset),
        options.batch,
        shuffle=True,
        num_workers=options.workers,
        pin_memory=options.device.type == "cuda",
        persistent_workers=options.workers > 0,
    )


def plain_batches(loader: DataLoader, device: torch.device) -> Iterator[Batch]:
    for batch in loader:
        yield Batch(*(part.to(device, non_blocking=True) for part in batch))


def plain_epoch(cohort: Cohort, loader: DataLoader) -> None:
    """Train an epoch as ``Cohort.train_epoch`` does, with the loader's batches."""
    members = list(cohort.members.values())
    for member in members:
        member.begin_epoch()
    for batch in plain_batches(loader, cohort.device):
        cohort.take_step(members, batch)
    for member in members:
        member.means.compute()


# ---- measuring


def data_timed(dataset: Dataset, loader: DataLoader, options: argparse.Namespace) -> tuple[Timed, Timed]:
    """Timings to take of batches that nobody trains on: ours, and the plain ones."""
    draws = stream(0, "data")

    def ours() -> None:
        for _ in train_batches(dataset, options.batch, draws):
            pass

    def plain() -> None:
        for _ in plain_batches(loader, options.device):
            pass

    return Timed("none", "data", ours), Timed("none", "data", plain)


def trainer_timed(
    distiller: str, mode: str, dataset: Dataset, loader: DataLoader, options: argparse.Namespace
) -> tuple[Timed, Timed]:
    """Timings to take of an epoch of one trainer: of our batches, and of the plain ones."""
    config = parts.run_config(options.pair, distiller, mode, options.batch, options.execution)
    cohort = Cohort(*parts.trainers({distiller: config}, options.samples, options.device))
    members = list(cohort.members.values())
    return (
        Timed(distiller, mode, lambda: cohort.train_epoch(members, dataset, options.batch)),
        Timed(distiller, mode, lambda: plain_epoch(cohort, loader)),
    )


# ---- reporting


def row_of(ours: Timed, plain: Timed, options: argparse.Namespace) -> dict[str, object]:
    seconds, plain_seconds = (
        one.ms / 1000 * options.all_steps / options.timed_steps for one in (ours, plain)
    )
    values = (
        ours.distiller,
        ours.mode,
        "-".join(options.pair),
        options.device_name,
        round(seconds, 3),
        round(options.samples / seconds, 1),
        round(plain_seconds, 3),
        round(plain.ratio_to(ours), 3),
    )
    return dict(zip(COLUMNS, values, strict=True))


def report(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    whole = options.timed_steps == options.all_steps
    print(
        f"{' to '.join(options.pair)}, batch {options.batch}, {options.device_name}, CPU threads: "
        f"{options.threads}, DataLoader workers: {options.workers}, PyTorch {torch.__version__}; wall time "
        f"of an epoch of {options.samples} images, medians of {options.rounds} rounds"
        + ("" if whole else f", extrapolated from {options.timed_steps} of {options.all_steps} steps")
    )
    print_table(rows, [column for column in COLUMNS if column not in ("pair", "device")])


# ---- options


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("epoch", "Time of a training epoch with its data.", ["fitnet"], rounds=3)
    parser.add_argument(
        "--steps",
        dest="timed_steps",
        type=int,
        default=None if torch.cuda.is_available() else 20,
        help="time so many of an epoch's steps and extrapolate; 0: all, and on a GPU by default",
    )
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the DataLoader")
    parser.set_defaults(steps=1, warm_up=1)  # of what is timed: epochs, or their parts
    options = checked(parser, arguments)
    options.all_steps = steps_per_epoch(options.samples, options.batch)
    options.timed_steps = min(options.timed_steps or options.all_steps, options.all_steps)
    options.clock, options.clock_name = time.perf_counter, "wall"  # the workers' time counts, too
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    images = random_images(min(options.samples, options.timed_steps * options.batch))
    loader = plain_loader(images, options)
    dataset = images.to(options.device)
    with as_in_a_run(options):
        timed = [data_timed(dataset, loader, options)]
        for distiller in options.distillers:
            timed += [trainer_timed(distiller, mode, dataset, loader, options) for mode in options.modes]
        measure([one for both in timed for one in both], options)
    rows = [row_of(ours, plain, options) for ours, plain in timed]
    report(rows, options)
    write_csv(rows, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
