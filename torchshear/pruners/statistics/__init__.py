"""Data run through a model, and what it shows of each unit: activations, gradients, gates."""

from torchshear.pruners.statistics._collect import collect
from torchshear.pruners.statistics._statistics import GateSums, RowSums, Statistics, ValueSums, WeightSums
from torchshear.pruners.statistics._taps import GroupTaps, Layer, Tap, find_layers, find_taps

__all__ = [
    "GateSums",
    "GroupTaps",
    "Layer",
    "RowSums",
    "Statistics",
    "Tap",
    "ValueSums",
    "WeightSums",
    "collect",
    "find_layers",
    "find_taps",
]
