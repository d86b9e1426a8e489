"""Record of a fold: layers that took constants of removed channels, and layers that did not."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class FoldedConstants:
    """Constants that were folded into one layer.

    Attributes:
        layer: name of the module that reads the channels.
        into: name of the tensor that changed: its bias, or the running mean of the batch norm behind it.
        n_channels: number of removed channels with a constant other than zero.
    """

    layer: str
    into: str
    n_channels: int


@dataclass(frozen=True, slots=True)
class SkippedConstants:
    """Removed channels that one layer sees as zeros, as without folding.

    Attributes:
        layer: name of the module that reads the channels.
        n_channels: number of these channels, without those that are zero anyway.
        reason: why they are not folded.
    """

    layer: str
    n_channels: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fold:
    """Result of folding the constants of removed channels.

    Attributes:
        kind: "constants" that channels hold without any input, or "means" of what they held over data.
        folded: layers whose bias, or whose batch norm's running mean, holds them now.
        skipped: layers that see zeros in their place, with reasons.
        max_error: largest difference of any output from the original network with constants on the removed channels,
            relative to the output's largest absolute value.
        dtype: dtype in which both were computed.
    """

    kind: Literal["constants", "means"]
    folded: tuple[FoldedConstants, ...]
    skipped: tuple[SkippedConstants, ...]
    max_error: float
    dtype: torch.dtype
