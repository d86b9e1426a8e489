"""Copying a model, also one that keeps computed tensors."""

import copy
from typing import Any

from torch import Tensor, nn


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Deep-copy a model. Tensors that were computed with gradients, which torch refuses to copy, are copied detached.

    Modules keep such tensors when a hook computes a weight before each forward, as `torch.nn.utils.weight_norm` does.

    Args:
        model: the model; not changed.
        memo: id of an object -> what the copy has in its place.
    """
    known = dict(memo or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in known:
                known[id(value)] = value.detach().clone()
    return copy.deepcopy(model, known)
