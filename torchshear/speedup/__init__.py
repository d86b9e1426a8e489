"""What makes a plan real: shrink, fold, recalibrate, verify, ONNX export, latency, and alignment to hardware."""

from torchshear.speedup._apply import shrink, shrink_to_form
from torchshear.speedup._fold import fold_constants
from torchshear.speedup._fold_record import Fold, FoldedConstants, SkippedConstants
from torchshear.speedup._kept_scale import KeptScale
from torchshear.speedup._leaving import Leave
from torchshear.speedup._load import load_checkpoint
from torchshear.speedup._recalibrate import check_recalibration, recalibrate
from torchshear.speedup._shrunk import Shrunk
from torchshear.speedup._stream import ShrunkCheckpoint, shrink_checkpoint
from torchshear.speedup._traced import TracedModule
from torchshear.speedup.alignment import detect_profile, profiles, resolve_alignment
from torchshear.speedup.latency import LatencyComparison, LatencyResult, compare_latency
from torchshear.speedup.onnx import OnnxFile, export_onnx
from torchshear.speedup.verification import Verification, verify

__all__ = [
    "Fold",
    "FoldedConstants",
    "KeptScale",
    "LatencyComparison",
    "LatencyResult",
    "Leave",
    "OnnxFile",
    "Shrunk",
    "ShrunkCheckpoint",
    "SkippedConstants",
    "TracedModule",
    "Verification",
    "check_recalibration",
    "compare_latency",
    "detect_profile",
    "export_onnx",
    "fold_constants",
    "load_checkpoint",
    "profiles",
    "recalibrate",
    "resolve_alignment",
    "shrink",
    "shrink_checkpoint",
    "shrink_to_form",
    "verify",
]
