"""Latency in onnxruntime, and the widths that a device runs well."""

from torchshear.speedup.latency._alignment import detect_profile, profiles, resolve_alignment
from torchshear.speedup.latency._compare import LatencyComparison, LatencyResult, compare_latency

__all__ = [
    "LatencyComparison",
    "LatencyResult",
    "compare_latency",
    "detect_profile",
    "profiles",
    "resolve_alignment",
]
