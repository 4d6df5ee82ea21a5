"""Distillers: *what* a student learns from its teacher. One file per paper."""

from sakd.distillers.at import AT
from sakd.distillers.base import Distiller, distinct_spots
from sakd.distillers.fitnet import FitNet
from sakd.distillers.kd import KD
from sakd.distillers.pkt import PKT
from sakd.distillers.sp import SP

__all__ = ["AT", "KD", "PKT", "SP", "Distiller", "FitNet", "distinct_spots"]
