"""What training costs, measured: runs with torch and PyYAML alone."""

from sakd.process import set_up

set_up()  # as launch.py does; here, since the modules import torch before they do anything
