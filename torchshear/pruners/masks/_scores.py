"""Scores of single weights, from which patterns make scores of their units."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from torchshear._arguments import close_names
from torchshear.errors import ArgumentError, WeightError
from torchshear.pruners.masks._layers import MaskableLayer, dense_values

WeightScore = Callable[[str, Tensor], Tensor]
Score = str | Mapping[str, Tensor] | WeightScore
Scorer = Callable[[MaskableLayer], Tensor]


def _magnitude(layer: MaskableLayer) -> Tensor:
    return dense_values(layer).abs()


def _gradient(layer: MaskableLayer) -> Tensor:
    return _gradient_of(layer).abs()


def _snip(layer: MaskableLayer) -> Tensor:
    return (dense_values(layer) * _gradient_of(layer)).abs()


def _gradient_of(layer: MaskableLayer) -> Tensor:
    """The gradient that lies at the weight; zeros where no loss reached it."""
    values = dense_values(layer)
    return torch.zeros_like(values) if layer.tensor.grad is None else layer.tensor.grad.detach().to(values.dtype)


_NAMED: Final[Mapping[str, Scorer]] = MappingProxyType({"magnitude": _magnitude, "gradient": _gradient, "snip": _snip})
_OF_GRADIENTS: Final = frozenset({"gradient", "snip"})


def find_scorer(score: Score, layers: list[MaskableLayer]) -> Scorer:
    """A function that scores the weights of a layer, from what the user gave.

    Args:
        score: see `choose_masks`.
        layers: the layers that will be scored.

    Raises:
        ArgumentError: the name is unknown, it is no name, mapping or function, or none of the layers has a gradient
            that the score is made of.
    """
    if isinstance(score, str):
        if score not in _NAMED:
            raise ArgumentError(
                f"score={score!r}; expected one of {', '.join(_NAMED)}, a mapping from layers to tensors, or a "
                f"function.{close_names(score, _NAMED)}"
            )
        if score in _OF_GRADIENTS and all(layer.tensor.grad is None for layer in layers):
            raise ArgumentError(
                f"score={score!r} is made of gradients, and no weight has one; call backward on a loss first."
            )
        return _with_checks(_NAMED[score])
    if isinstance(score, Mapping) and all(isinstance(name, str) for name in score):
        return _with_checks(lambda layer: _look_up(score, layer))
    if callable(score):
        return _with_checks(lambda layer: score(layer.name, dense_values(layer)))
    raise ArgumentError(
        f"score is {type(score).__name__}; expected a name, a mapping from layers to tensors, or a function."
    )


def _look_up(scores: Mapping[str, Tensor], layer: MaskableLayer) -> Tensor:
    layer.require_values()
    if layer.name not in scores:
        raise ArgumentError(
            f"the scores hold nothing for layer {layer.name!r}; expected a tensor of shape "
            f"{tuple(layer.tensor.shape)} for every layer that is masked.{close_names(layer.name, scores)}"
        )
    return scores[layer.name]


def _with_checks(scorer: Scorer) -> Scorer:
    def scores(layer: MaskableLayer) -> Tensor:
        found = scorer(layer)
        if not isinstance(found, Tensor) or found.shape != layer.tensor.shape:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
            raise WeightError(
                f"the scores of layer {layer.name!r} have {what}; expected a tensor of the shape of its weight, "
                f"{tuple(layer.tensor.shape)}."
            )
        if found.is_meta or found.is_complex() or found.layout is not torch.strided:
            raise WeightError(
                f"the scores of layer {layer.name!r} are {found.dtype} on {found.device} in the layout {found.layout}; "
                f"expected real numbers in a plain tensor."
            )
        found = found.detach().to(layer.tensor.device)
        found = found if found.dtype == torch.float64 else found.float()
        if not bool(torch.isfinite(found).all()):
            raise WeightError(
                f"the scores of layer {layer.name!r} are NaN or infinite in {int((~torch.isfinite(found)).sum())} "
                f"places; expected finite numbers, the higher the more a weight matters."
            )
        return found

    return scores
