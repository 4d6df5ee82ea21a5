"""Finished runs as the table of a paper.

Spot modes stand side by side, with how each differs from ``fixed``, paired by seed.
"""

from sakd.compare.finished import Finished, read, select
from sakd.compare.table import Comparison, compare

__all__ = ["Comparison", "Finished", "compare", "read", "select"]
