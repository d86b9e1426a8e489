"""Weights handed on from a model at some widths to one at narrower widths."""

import torch
from torch import nn

from torchshear.dependency.plans._plan import PruningPlan


def carry_state(before: PruningPlan, trained: nn.Module, after: PruningPlan, small: nn.Module) -> None:
    """Give a model the weights of one that was cut less, at the positions that it keeps.

    Both plans are of the same dense model. What the second keeps and the first does not stays as it is, as do buffers
    that hold numbers of positions.

    Args:
        before: plan of the model that was trained.
        trained: this model.
        after: plan of the model that is changed.
        small: this model; changed in place.
    """
    source, target = trained.state_dict(), small.state_dict()
    with torch.no_grad():
        for name, value in target.items():
            canonical = after.aliases.get(name, name)
            old, new = before.state.get(canonical), after.state.get(canonical)
            is_renumbered = any(one is not None and one.numbers is not None for one in (old, new))
            if name not in source or is_renumbered:
                continue
            if old is None and new is None:
                value.copy_(source[name])
                continue
            described = old if old is not None else new
            assert described is not None
            mask = torch.ones(described.shape, dtype=torch.bool)
            had = (old.mask() if old is not None else mask).to(value.device)
            kept = (new.mask() if new is not None else mask).to(value.device)
            full = torch.zeros(described.shape, dtype=value.dtype, device=value.device)
            full[had] = source[name].reshape(-1).to(value)
            is_known = had[kept].reshape(value.shape)
            value.copy_(torch.where(is_known, full[kept].reshape(value.shape), value))
