"""Distillers: *what* a student learns from its teacher. One file per paper."""

from sakd.distillers.afd import AFD
from sakd.distillers.at import AT
from sakd.distillers.base import (
    Distiller,
    Features,
    Seen,
    at_least_float32,
    distinct_spots,
    distinct_views,
    is_kept,
    kept_count,
    kept_mean,
    kept_pair_mean,
    kept_pairs,
    weighed,
)
from sakd.distillers.catkd import CATKD
from sakd.distillers.cc import CC
from sakd.distillers.classifier import Classifier
from sakd.distillers.crd import CRD
from sakd.distillers.ctkd import CTKD
from sakd.distillers.dist import DIST
from sakd.distillers.dkd import DKD
from sakd.distillers.fitnet import FitNet
from sakd.distillers.fsp import FSP
from sakd.distillers.ft import FT
from sakd.distillers.kd import KD
from sakd.distillers.matched import Matched
from sakd.distillers.mlkd import MLKD
from sakd.distillers.nkd import NKD
from sakd.distillers.nst import NST
from sakd.distillers.ofa import OFA
from sakd.distillers.ofd import OFD
from sakd.distillers.pkt import PKT
from sakd.distillers.reviewkd import ReviewKD
from sakd.distillers.rkd import RKD
from sakd.distillers.sdd import SDD
from sakd.distillers.semckd import SemCKD
from sakd.distillers.simkd import SimKD
from sakd.distillers.sp import SP
from sakd.distillers.vid import VID
from sakd.distillers.vkd import VkD
from sakd.distillers.wttm import WTTM

__all__ = [
    "AFD",
    "AT",
    "CATKD",
    "CC",
    "CRD",
    "CTKD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "KD",
    "MLKD",
    "NKD",
    "NST",
    "OFA",
    "OFD",
    "PKT",
    "RKD",
    "SDD",
    "SP",
    "VID",
    "WTTM",
    "Classifier",
    "Distiller",
    "Features",
    "FitNet",
    "Matched",
    "ReviewKD",
    "Seen",
    "SemCKD",
    "SimKD",
    "VkD",
    "at_least_float32",
    "distinct_spots",
    "distinct_views",
    "is_kept",
    "kept_count",
    "kept_mean",
    "kept_pair_mean",
    "kept_pairs",
    "weighed",
]
