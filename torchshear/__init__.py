"""Structured pruning that ends in a smaller, provably equal and measurably faster model."""

from torchshear.api import PruneResult, plan, prune
from torchshear.dependency import PruningPlan, analyze
from torchshear.errors import TorchshearError
from torchshear.graph import trace
from torchshear.speedup import compare_latency, export_onnx, shrink, verify

__all__ = [
    "PruneResult",
    "PruningPlan",
    "TorchshearError",
    "analyze",
    "compare_latency",
    "export_onnx",
    "plan",
    "prune",
    "shrink",
    "trace",
    "verify",
]
