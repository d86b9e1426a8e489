"""Structured pruning that ends in a smaller, provably equal and measurably faster model."""

from typing import TYPE_CHECKING

from torchshear._making import PruneResult
from torchshear._other_tools import answering
from torchshear.api import plan, prune
from torchshear.compensation import compensate
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.distillation._distill import distill
from torchshear.errors import TorchshearError
from torchshear.family._prune_family import prune_family
from torchshear.graph.capture._trace import trace
from torchshear.pruners import regularizers, schedules
from torchshear.pruners._collecting import collect
from torchshear.searching._search import search
from torchshear.speedup._shrink import shrink
from torchshear.speedup.checkpoints._load import load_checkpoint
from torchshear.speedup.checkpoints._stream import shrink_checkpoint
from torchshear.speedup.compensation._recalibrate import recalibrate
from torchshear.speedup.latency._compare import compare_latency
from torchshear.speedup.onnx._export import export_onnx
from torchshear.speedup.verification._verify import verify
from torchshear.training._session import PruningSession

__all__ = [
    "PruneResult",
    "PruningPlan",
    "PruningSession",
    "TorchshearError",
    "analyze",
    "collect",
    "compare_latency",
    "compensate",
    "distill",
    "export_onnx",
    "load_checkpoint",
    "plan",
    "prune",
    "prune_family",
    "recalibrate",
    "regularizers",
    "schedules",
    "search",
    "shrink",
    "shrink_checkpoint",
    "trace",
    "verify",
]

if not TYPE_CHECKING:
    __getattr__ = answering(__name__)
