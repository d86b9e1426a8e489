"""Targets of latency: widths within a budget of measured time, corrected by measuring what they give."""

from torchshear.latency_target._record import LatencyAllocation, LatencyRound

__all__ = ["LatencyAllocation", "LatencyRound"]
