"""Making a plan real: shrinking, proof, folded constants, recalibration, ONNX export, latency, alignment to devices."""

from torchshear.speedup._result import Shrunk
from torchshear.speedup._shrink import shrink, shrink_to_form
from torchshear.speedup.checkpoints._load import load_checkpoint
from torchshear.speedup.checkpoints._stream import ShrunkCheckpoint, shrink_checkpoint
from torchshear.speedup.compensation._fold import fold_constants
from torchshear.speedup.compensation._fold_record import Fold, FoldedConstants, SkippedConstants
from torchshear.speedup.compensation._recalibrate import check_recalibration, recalibrate
from torchshear.speedup.compensation._refit import refit
from torchshear.speedup.compensation._refit_record import Refit, RefittedLayer, SkippedLayer
from torchshear.speedup.latency import LatencyComparison, LatencyResult, compare_latency
from torchshear.speedup.latency._alignment import detect_profile, profiles, resolve_alignment
from torchshear.speedup.native._attention_scale import KeptScale
from torchshear.speedup.onnx import OnnxFile, export_onnx
from torchshear.speedup.rewriting._traced import TracedModule
from torchshear.speedup.shrinking._whole_groups import NativeTradeoff
from torchshear.speedup.verification import Verification, verify

__all__ = [
    "Fold",
    "FoldedConstants",
    "KeptScale",
    "LatencyComparison",
    "LatencyResult",
    "NativeTradeoff",
    "OnnxFile",
    "Refit",
    "RefittedLayer",
    "Shrunk",
    "ShrunkCheckpoint",
    "SkippedConstants",
    "SkippedLayer",
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
    "refit",
    "resolve_alignment",
    "shrink",
    "shrink_checkpoint",
    "shrink_to_form",
    "verify",
]
