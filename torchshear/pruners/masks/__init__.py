"""Masks of weights: single ones, blocks, N:M, channels and heads, for training and for what removes them."""

from torchshear.pruners.masks._choose import choose_masks, pattern_lock
from torchshear.pruners.masks._layers import LayerWeight, layer_type
from torchshear.pruners.masks._masks import Masks
from torchshear.pruners.masks._parametrization import Mask, applied_masks, apply, make_permanent, remove
from torchshear.pruners.masks._removal import plan_from_masks
from torchshear.pruners.masks._report import report
from torchshear.pruners.masks._semi_structured import SemiStructured, to_semi_structured

__all__ = [
    "LayerWeight",
    "Mask",
    "Masks",
    "SemiStructured",
    "applied_masks",
    "apply",
    "choose_masks",
    "layer_type",
    "make_permanent",
    "pattern_lock",
    "plan_from_masks",
    "remove",
    "report",
    "to_semi_structured",
]
