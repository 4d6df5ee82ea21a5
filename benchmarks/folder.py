"""Cost of an epoch over a folder of small images: ``python -m benchmarks.folder --help``.

It is explained in benchmarks/README.md. Random images are written as PNG files and read by the data set
``small_images``; the same training steps are fed by them, and by the same images as CIFAR's reader has them.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from benchmarks import parts
from benchmarks.parts import random_images
from benchmarks.step import Timed, as_in_a_run, checked, measure, parser_of, print_table, write_csv
from sakd.data import Dataset, assemble, small_images, train_batches
from sakd.streams import stream
from sakd.training import Cohort

COLUMNS = ("distiller", "mode", "pair", "device", "memory_seconds", "folder_seconds", "ratio")


def write_images(images: Dataset, root: Path) -> None:
    """All training images as PNG files by class, those of the first classes as test images, too."""

    def write(place: int) -> None:
        pixels = Image.fromarray(images.train.images[place].permute(1, 2, 0).numpy())
        for part in ("train", "test") if place < parts.CLASSES else ("train",):
            pixels.save(root / part / f"{int(images.train.labels[place]):03}" / f"{place:06}.png")

    for part in ("train", "test"):
        for label in range(parts.CLASSES):
            (root / part / f"{label:03}").mkdir(parents=True)
    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(len(images.train))))


def read_images(root: Path, alike: Dataset, workers: int) -> Dataset:
    """The images in a folder, held in memory, with what is known of the images ``alike``."""
    shape = {"classes": parts.CLASSES, "channels": parts.CHANNELS, "image_size": parts.IMAGE_SIZE}
    read = small_images(
        "folder", str(root), "train", "test", **shape, in_memory=True, workers=workers, pin_memory=True
    )
    augmentation = {"crop_padding": alike.augmentation.crop_padding, "flip": alike.augmentation.flip}
    dataset = assemble(*read, "folder", **shape, mean=alike.mean, std=alike.std, **augmentation)
    return dataset.ready(root / ".checked", _uncounted)


@contextmanager
def _uncounted(text: str, total: int) -> Iterator:
    yield lambda more: None


def epochs_of(
    distiller: str | None, mode: str, datasets: tuple[Dataset, Dataset], options: argparse.Namespace
) -> list[Timed]:
    """Timings to take of an epoch from memory and from the folder: of the data alone without a distiller."""
    if distiller is None:

        def alone(dataset: Dataset) -> None:
            for _ in train_batches(dataset, options.batch, stream(0, "data")):
                pass

        return [Timed("none", "data", lambda own=dataset: alone(own)) for dataset in datasets]
    config = parts.run_config(options.pair, distiller, mode, options.batch, options.execution)
    cohort = Cohort(*parts.trainers({distiller: config}, options.samples, options.device))
    members = list(cohort.members.values())
    return [
        Timed(distiller, mode, lambda own=dataset: cohort.train_epoch(members, own, options.batch))
        for dataset in datasets
    ]


def row_of(memory: Timed, folder: Timed, options: argparse.Namespace) -> dict[str, object]:
    values = (
        memory.distiller,
        memory.mode,
        "-".join(options.pair),
        options.device_name,
        round(memory.ms / 1000, 3),
        round(folder.ms / 1000, 3),
        round(folder.ratio_to(memory), 3),
    )
    return dict(zip(COLUMNS, values, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("folder", "Time of an epoch over a folder of small images.", ["fitnet"], rounds=5)
    parser.add_argument("--workers", type=int, default=4, help="that read the files, once")
    parser.set_defaults(steps=1, warm_up=1)  # of what is timed: epochs
    options = checked(parser, arguments)
    images = random_images(options.samples)
    with tempfile.TemporaryDirectory() as root:
        write_images(images, Path(root))
        began = time.perf_counter()
        read = read_images(Path(root), images, options.workers)
        seconds = time.perf_counter() - began
        datasets = images.to(options.device), read.to(options.device)
    with as_in_a_run(options):
        timed = [epochs_of(None, "data", datasets, options)]
        timed += [epochs_of(d, mode, datasets, options) for d in options.distillers for mode in options.modes]
        measure([one for both in timed for one in both], options)
    rows = [row_of(*both, options) for both in timed]
    print(
        f"{' to '.join(options.pair)}, batch {options.batch}, {options.device_name}; {options.clock_name} "
        f"time of an epoch of {options.samples} images, medians of {options.rounds} rounds; "
        f"reading the files: {seconds:.1f} s, workers: {options.workers}"
    )
    print_table(rows, [column for column in COLUMNS if column not in ("pair", "device")])
    write_csv(rows, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
