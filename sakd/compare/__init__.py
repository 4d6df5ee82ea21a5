"""Finished runs as the table of a paper.

Spot modes stand side by side, with how each differs from ``fixed``, paired by seed.
"""

from sakd.compare.described import Described, Finished
from sakd.compare.finished import checksums_of, facts_of, file_of, read, read_folder, select
from sakd.compare.table import Comparison, compare, ordered

__all__ = [
    "Comparison",
    "Described",
    "Finished",
    "checksums_of",
    "compare",
    "facts_of",
    "file_of",
    "ordered",
    "read",
    "read_folder",
    "select",
]
