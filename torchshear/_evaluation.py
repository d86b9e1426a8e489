"""Scores of models by a function of the user."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.errors import ArgumentError, first_line

Evaluate = Callable[[nn.Module], float]


def score_model(evaluate: Evaluate, model: nn.Module, what: str) -> float:
    """Score a model in eval mode; the state of random numbers is as before after it.

    Args:
        evaluate: called as `evaluate(model)`; gives a number, the higher the better.
        model: the model, which the function may change.
        what: the model in words.

    Raises:
        ArgumentError: the function fails, or gives no number.
    """
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            found: Any = evaluate(model)
    except Exception as error:  # code of the user
        raise ArgumentError(
            f"evaluate fails on {what}: {type(error).__name__}: {first_line(error)}. Expected a function of a "
            f"model that gives a number, the higher the better."
        ) from error
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, Real):
        raise ArgumentError(
            f"evaluate gave {found!r:.60} of type {type(found).__name__} for {what}; expected a number, the higher "
            f"the better."
        )
    return float(found)
