"""Spot-adaptive knowledge distillation.

Where, not only what, a student learns from its teacher.
"""

__version__ = "0.1.0"
