"""Families: one model pruned for several latencies, with one table, one set of statistics and one measurement."""

from torchshear.family._record import PrunedFamily

__all__ = ["PrunedFamily"]
