"""Batches of a loader as arguments of a model."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchshear.calibration._loader import first_batches
from torchshear.errors import DataError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_FORMS = (
    "expected a tensor, a tuple of the positional arguments that forward needs with or without a target behind them, a "
    "pair (arguments, target), or a dictionary with keyword arguments"
)


def arguments_of(
    loader: Iterable[Any], count: int, signature: inspect.Signature, device: torch.device
) -> Iterator[Arguments]:
    """The first batches of a loader as arguments of a model, without their targets.

    Args:
        loader: gives batches.
        count: how many to take.
        signature: of the model's forward.
        device: where the model is.

    Raises:
        DataError: the loader is empty or gives fewer batches, or a batch cannot be told apart into arguments.
    """
    for number, batch in first_batches(loader, count):
        given: Arguments = pytree.tree_map_only(Tensor, lambda t: t.to(device), _split(batch, signature, number))
        yield given


def _split(batch: Any, signature: inspect.Signature, number: int) -> Arguments:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), _by_name(batch, signature, number)
    if isinstance(batch, tuple | list):
        if len(batch) == 2 and isinstance(batch[0], Mapping):
            return (), _by_name(batch[0], signature, number)
        if len(batch) == 2 and type(batch[0]) in (tuple, list):
            return tuple(batch[0]), {}
        needed = max(1, _n_required(signature))
        if len(batch) in (needed, needed + 1):
            return tuple(batch[:needed]), {}
        raise DataError(
            f"batch {number} is a {type(batch).__name__} of {len(batch)}, but forward{signature} needs {needed}; "
            f"{_FORMS}. To give more, write ((first, second), target)."
        )
    raise DataError(f"batch {number} is {type(batch).__name__}; {_FORMS}.")


def _by_name(batch: Mapping[str, Any], signature: inspect.Signature, number: int) -> dict[str, Any]:
    """What forward takes of a dictionary; the rest is for the loss."""
    parameters = signature.parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    given = {name: value for name, value in batch.items() if takes_any or name in signature.parameters}
    missing = [p.name for p in parameters if _is_required(p) and p.name not in given]
    if missing or not given:
        what = ", ".join(missing) or "anything that forward takes"
        raise DataError(f"batch {number} is a dictionary with {', '.join(map(str, batch))}; {what} missing: {_FORMS}.")
    return given


def _n_required(signature: inspect.Signature) -> int:
    return sum(_is_required(p) and p.kind is not inspect.Parameter.KEYWORD_ONLY for p in signature.parameters.values())


def _is_required(parameter: inspect.Parameter) -> bool:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in kinds
