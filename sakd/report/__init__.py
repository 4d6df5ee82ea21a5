"""Runs as one page that travels: a file with all that it shows in itself, for a browser without a network."""

from sakd.report.page import write_report
from sakd.report.selection import Selection, of_cells, of_folder, of_sweep

__all__ = ["Selection", "of_cells", "of_folder", "of_sweep", "write_report"]
