"""Spots: *where* a student learns from its teacher, and the modes that decide it."""

from sakd.spots.grafts import Grafts, adapter, frozen_alias, mixed
from sakd.spots.modes import (
    Adaptive,
    Anti,
    Fixed,
    Random,
    Soft,
    SpotMode,
    router_loss,
    straight_through_gumbel,
)
from sakd.spots.spot import KINDS, Spot, all_spots, spots_at

__all__ = [
    "KINDS",
    "Adaptive",
    "Anti",
    "Fixed",
    "Grafts",
    "Random",
    "Soft",
    "Spot",
    "SpotMode",
    "adapter",
    "all_spots",
    "frozen_alias",
    "mixed",
    "router_loss",
    "spots_at",
    "straight_through_gumbel",
]
