"""Measurements of what training costs."""

from benchmarks.bare import stand_in_for_missing
from sakd.process import set_up

stand_in_for_missing()
set_up()  # as launch.py does; here, since the modules import torch before they do anything
