"""Criteria compared: one model at the same budget by each of them, against random channels and narrower layers."""

from torchshear.comparison._compare import compare
from torchshear.comparison._record import Comparison

__all__ = ["Comparison", "compare"]
