"""Latency in onnxruntime or torch: measured, as a table over widths, and the widths that a device runs well."""

from torchshear.speedup.latency._device import Device
from torchshear.speedup.latency._measure_table import measure_table
from torchshear.speedup.latency._staircase import Staircase, measure_staircase
from torchshear.speedup.latency._table import LatencyTable, TablePoint

__all__ = ["Device", "LatencyTable", "Staircase", "TablePoint", "measure_staircase", "measure_table"]
