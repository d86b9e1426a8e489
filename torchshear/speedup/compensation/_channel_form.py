"""Channels that a convolution read, expressed by those that are left: for kernels with too many taps for one system."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torchshear.calibration._samples import SampleSplit, sample_numbers
from torchshear.speedup.compensation._least_squares import LinearFit, fit_linear, sum_apart
from torchshear.speedup.compensation._linear_layer import draw_positions

_MIN_POSITIONS: Final = 32768
_POSITIONS_PER_CHANNEL: Final = 8


def fit_channels(
    dense: Sequence[Any],
    small: Sequence[Any],
    kept: Tensor,
    split: SampleSplit,
    n_dims: int,
    generator: torch.Generator,
) -> LinearFit | None:
    """Fit what a layer read in the original to what it reads now, at single positions.

        x = A u + a

    where x are all channels of the original and u those that are left, by ridge regression around the selection of the
    kept ones.

    Args:
        dense: what the layer reads in the original in each batch, shape (batch, C, *space) or (C, *space).
        small: the same in the smaller network, with C' channels.
        kept: mask of the channels that are left, shape (C,).
        split: samples of the batches.
        n_dims: spatial dimensions.
        generator: draws positions.

    Returns:
        A as `weight`, shape (1, C, C'), and a as `bias`, shape (1, C); None where no position has finite values.

    Reference: GRAIL, arXiv:2602.23795, which expresses the removed channels of the original by its kept ones; here by
    those of the smaller network, so that errors of earlier layers are corrected as well.
    """
    n_channels, n_left = len(kept), int(kept.sum())
    device = small[0].device
    share = -(-max(_MIN_POSITIONS, _POSITIONS_PER_CHANNEL * n_left) // len(split.sizes))

    def rows(number: int) -> tuple[Tensor, Tensor, Tensor]:
        x, u = (value if value.ndim > n_dims + 1 else value.unsqueeze(0) for value in (dense[number], small[number]))
        places = x.shape[2:].numel()
        chosen = draw_positions(len(x) * places, share, generator)
        is_held_out = split.is_held_out(sample_numbers(len(x), split.sizes[number])[chosen // places], number)
        found = [v.movedim(1, -1).flatten(0, -2)[chosen.to(device)].unsqueeze(0) for v in (u, x)]
        return found[0], found[1], is_held_out

    both = sum_apart(map(rows, range(len(split.sizes))), (1, n_left, n_channels))
    if not both[0].n or not both[1].n:
        return None
    selection = torch.eye(n_channels, dtype=small[0].dtype, device=device)[:, kept.to(device)].unsqueeze(0)
    return fit_linear(*both, selection, selection.new_zeros(1, n_channels), has_bias=True)


def expand_weight(dense: Tensor, channels: LinearFit) -> tuple[Tensor, Tensor]:
    """Fold channels into a weight, tap by tap.

    Args:
        dense: weight of the original at the outputs that are kept, shape (O, C * taps).
        channels: channels of the original by those that are left.

    Returns:
        The weight for the channels that are left, shape (1, O, C' * taps), and what its bias gets more, shape (1, O).
        At borders that are padded that is only near.
    """
    expressed, offset = channels.weight[0], channels.bias[0]
    taps = dense.double().reshape(len(dense), len(expressed), -1)
    weight = torch.einsum("oct,ck->okt", taps, expressed)
    return weight.flatten(1).unsqueeze(0), torch.einsum("oct,c->o", taps, offset).unsqueeze(0)
