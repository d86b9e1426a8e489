"""Making a plan real: shrinking, proof, compensation, ONNX export, latency, alignment to devices."""

from torchshear.speedup._result import Shrunk
from torchshear.speedup._shrink import shrink_to_form
from torchshear.speedup.checkpoints._stream import ShrunkCheckpoint
from torchshear.speedup.compensation._fold import fold_constants
from torchshear.speedup.compensation._fold_record import Fold, FoldedConstants, SkippedConstants
from torchshear.speedup.compensation._refit import refit
from torchshear.speedup.compensation._refit_record import Refit, RefittedLayer, SkippedLayer
from torchshear.speedup.latency._compare import LatencyComparison, LatencyResult
from torchshear.speedup.latency._profiles import detect_profile, profiles, resolve_alignment
from torchshear.speedup.native._attention_scale import OutputFactor
from torchshear.speedup.onnx._export import OnnxFile
from torchshear.speedup.rewriting._traced import TracedModule
from torchshear.speedup.verification._verify import Verification

__all__ = [
    "Fold",
    "FoldedConstants",
    "LatencyComparison",
    "LatencyResult",
    "OnnxFile",
    "OutputFactor",
    "Refit",
    "RefittedLayer",
    "Shrunk",
    "ShrunkCheckpoint",
    "SkippedConstants",
    "SkippedLayer",
    "TracedModule",
    "Verification",
    "detect_profile",
    "fold_constants",
    "profiles",
    "refit",
    "resolve_alignment",
    "shrink_to_form",
]
