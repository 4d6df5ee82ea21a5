"""`python -m sakd` is `sakd`."""

from sakd.cli import main

main(prog_name="sakd")
