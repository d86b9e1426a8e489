"""Data run through a model, and what it shows of each unit: activations, gradients, gates."""

from torchshear.calibration._dense_loss import Loss
from torchshear.calibration._progress import Progress
from torchshear.calibration._statistics import Statistics

__all__ = [
    "Loss",
    "Progress",
    "Statistics",
]
