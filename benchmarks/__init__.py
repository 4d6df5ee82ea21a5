"""Measurements of what training costs."""

from sakd.process import set_up

set_up()  # as launch.py does; here, since the modules import torch before they do anything
