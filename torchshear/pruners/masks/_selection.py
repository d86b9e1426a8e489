"""Exact choice of the units that are masked, within what each layer may lose at most and must lose at least."""

from collections.abc import Sequence

import torch
from torch import Tensor


def count_of(n_units: float, ratio: float) -> int:
    """How many of `n_units` a share `ratio` is: floor(n_units * ratio + 1e-9).

    The small number undoes the rounding of products such as 100 * 0.29 = 28.999999999999996.
    """
    return int(n_units * ratio + 1e-9)


def lowest_first(scores: Tensor) -> Tensor:
    """Order of the last dimension by score, the lowest first; among equal scores the later one comes first."""
    return scores.shape[-1] - 1 - scores.flip(-1).argsort(dim=-1, stable=True)


def ranks(scores: Tensor) -> Tensor:
    """Place of each entry of the last dimension in `lowest_first`."""
    order = lowest_first(scores)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def keep_highest(
    scores: Sequence[Tensor], now: int, final: int, least: Sequence[int], most: Sequence[int]
) -> list[Tensor]:
    """Choose the units that stay, of several layers that are ranked against one another.

    The `now` lowest units go, as far as these hold: layer l loses at most most[l] units; and what goes beyond
    least[l] in all layers together leaves enough of the final number for every layer to lose least[l] in the end:

        sum over l of max(0, n_l - least[l])  <=  final - sum over l of least[l]

    So `least` is a reserved budget. A layer may have lost fewer while now < final, and has lost as many at now = final.

    Args:
        scores: for each layer a tensor of one dimension, finite or -inf, the lowest go first; among equal scores the
            later one in the row of all layers.
        now: number of units to remove.
        final: number of units that will be removed in the end, at least `now`.
        least: units that each layer loses at least in the end.
        most: units that each layer may lose at most.

    Returns:
        For each layer a bool tensor, True = kept; fewer than `now` units go only if the limits forbid more.
    """
    pool = torch.cat(list(scores))
    order = lowest_first(pool)
    rank = torch.cat([ranks(one) for one in scores])
    sizes = torch.tensor([len(one) for one in scores], device=pool.device)
    at_least, at_most = (
        torch.tensor(list(limit), device=pool.device).repeat_interleave(sizes) for limit in (least, most)
    )
    may_go = (rank < at_most)[order]
    is_beyond = (rank >= at_least)[order] & may_go
    may_go &= ~is_beyond | (is_beyond.cumsum(0) <= max(0, final - sum(least)))
    goes = order[may_go][:now]
    kept = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
    kept[goes] = False
    return list(torch.split(kept, sizes.tolist()))
