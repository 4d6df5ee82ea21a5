"""Published figures, to stand beside measured ones.

They are percent on the test images, at the best epoch, of one run.
"""

from pathlib import Path

import pandas as pd

from sakd.errors import DataError
from sakd.names import BEST, HEADLINE

FIGURES = Path(__file__).with_name("published_results.csv")
COLUMNS = ["source", "dataset", "teacher", "student", "row", "mode", "top1"]
NETWORKS = {"MobileNetV2_w0.5": "MobileNetV2_half"}  # called otherwise under conf/network
METRICS = (HEADLINE, BEST)  # what the figures may stand beside


def read_published(path: Path) -> pd.DataFrame:
    """Read figures: a table of source, dataset, teacher, student, distiller, spot_mode, top1.

    Networks alone are the distillers ``teacher`` and ``student``, with mode ``none``. Raises DataError for
    any other table.
    """
    try:
        figures = pd.read_csv(
            path, keep_default_na=False, dtype=dict.fromkeys(COLUMNS[:-1], str) | {"top1": float}
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected CSV with the columns {', '.join(COLUMNS)}"
        ) from error
    if list(figures) != COLUMNS:
        raise DataError(f"{path}: found the columns {', '.join(figures)}, expected {', '.join(COLUMNS)}")
    figures[["teacher", "student"]] = figures[["teacher", "student"]].replace(NETWORKS)
    figures = figures.rename(columns={"row": "distiller", "mode": "spot_mode"})
    twice = figures[figures.duplicated(subset=list(figures)[:-1])]
    if len(twice):
        raise DataError(f"{path}: found two figures for {', '.join(twice.iloc[0][:-1])}, expected one")
    return figures
