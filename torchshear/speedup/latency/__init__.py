"""Latency in onnxruntime, and the widths that a device runs well."""
