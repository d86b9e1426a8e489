"""Latency in onnxruntime: measured, as a table over widths, and the widths that a device runs well."""

from torchshear.speedup.latency._device import Device
from torchshear.speedup.latency._measure_table import measure_table
from torchshear.speedup.latency._table import LatencyTable, TablePoint

__all__ = ["Device", "LatencyTable", "TablePoint", "measure_table"]
