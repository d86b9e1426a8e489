"""A short distillation of a shrunk model, without labels."""

from torchshear.distillation._distill import Distilled

__all__ = ["Distilled"]
