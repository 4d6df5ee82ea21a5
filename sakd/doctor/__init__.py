"""Whether this machine can do what a command line asks for: checks that each say one line."""

from sakd.doctor.checks import CHECKS, Asked, Finding, examine

__all__ = ["CHECKS", "Asked", "Finding", "examine"]
