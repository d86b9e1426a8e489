"""Exact choice of the units that are masked, within what each layer may lose at most and must lose at least."""

from collections.abc import Sequence

import torch
from torch import Tensor


def count_of(n_units: float, ratio: float) -> int:
    """Return the number of units in a share: floor(n_units * ratio + 1e-9).

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
    may_go = torch.cat([lowest(one, limit) for one, limit in zip(scores, most, strict=True)])
    is_due = torch.cat([lowest(one, limit) for one, limit in zip(scores, least, strict=True)]) & may_go
    may_go = is_due | _lowest_of(pool, may_go & ~is_due, final - sum(least))
    kept = ~_lowest_of(pool, may_go, now)
    return list(torch.split(kept, [len(one) for one in scores]))


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest entries of a tensor of one dimension, of equal ones the later; without sorting them."""
    if count <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count >= len(scores):
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    threshold = scores.kthvalue(count).values
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    chosen[ties[len(ties) - count + int(chosen.sum()) :]] = True
    return chosen


def _lowest_of(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """As `lowest`, of the entries that are marked only."""
    chosen = lowest(scores.masked_fill(~among, torch.inf), min(count, int(among.sum())))
    return chosen & among
