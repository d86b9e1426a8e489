"""Making a plan real: shrinking, proof, compensation, ONNX export, latency, alignment to devices."""

from torchshear.speedup._shrink import Shrunk, shrink_to_form
from torchshear.speedup.checkpoints._stream import ShrunkCheckpoint
from torchshear.speedup.compensation._fold import fold_constants
from torchshear.speedup.compensation._fold_record import Fold
from torchshear.speedup.compensation._refit import refit
from torchshear.speedup.compensation._refit_record import Refit
from torchshear.speedup.latency._alignment_profiles import profiles
from torchshear.speedup.latency._comparison import LatencyComparison
from torchshear.speedup.native._attention_scale import OutputFactor
from torchshear.speedup.onnx._export import OnnxFile
from torchshear.speedup.rewriting._traced import TracedModule
from torchshear.speedup.shrinking._optimizer_state import shrink_average, shrink_optimizer
from torchshear.speedup.verification._verify import Verification

__all__ = [
    "Fold",
    "LatencyComparison",
    "OnnxFile",
    "OutputFactor",
    "Refit",
    "Shrunk",
    "ShrunkCheckpoint",
    "TracedModule",
    "Verification",
    "fold_constants",
    "profiles",
    "refit",
    "shrink_average",
    "shrink_optimizer",
    "shrink_to_form",
]
