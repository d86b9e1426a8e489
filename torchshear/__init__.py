"""Structured pruning that ends in a smaller, provably equal and measurably faster model."""

from typing import TYPE_CHECKING

from torchshear._other_tools import answering
from torchshear.api import PruneResult, plan, prune
from torchshear.compensation import compensate
from torchshear.dependency import PruningPlan, analyze
from torchshear.errors import TorchshearError
from torchshear.graph import trace
from torchshear.pruners import collect
from torchshear.speedup import (
    compare_latency,
    export_onnx,
    load_checkpoint,
    recalibrate,
    shrink,
    shrink_checkpoint,
    verify,
)

__all__ = [
    "PruneResult",
    "PruningPlan",
    "TorchshearError",
    "analyze",
    "collect",
    "compare_latency",
    "compensate",
    "export_onnx",
    "load_checkpoint",
    "plan",
    "prune",
    "recalibrate",
    "shrink",
    "shrink_checkpoint",
    "trace",
    "verify",
]

if not TYPE_CHECKING:
    __getattr__ = answering(__name__)
