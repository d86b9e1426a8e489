"""Batches of a loader as arguments of a captured model, and what is left of them for the loss."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchshear.calibration._loader import first_batches
from torchshear.errors import DataError
from torchshear.graph import ExampleInputs, Graph

_FORMS = (
    "expected inputs as the model was captured with: a tensor, a tuple of the positional arguments with or without a "
    "target behind them, a pair (inputs, target), or a dictionary with the keyword arguments"
)


def batches_of(loader: Iterable[Any], count: int, graph: Graph) -> Iterator[tuple[list[Any], Any]]:
    """The first batches of a loader as flat inputs of a graph, each with its target.

    Args:
        loader: gives batches.
        count: how many to take.
        graph: the captured model.

    Raises:
        DataError: the loader is empty or gives fewer batches, or a batch does not fit the model.
    """
    device = next((t.device for t in graph.inputs.tensors()), torch.device("cpu"))
    for number, batch in first_batches(loader, count):
        given, target = _split(batch, graph.inputs, number)
        moved, target = pytree.tree_map_only(Tensor, lambda t: _moved(t, device), (given, target))
        yield _checked(moved, graph, number), target


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one that was made in inference mode as one that gradients can be taken through."""
    moved = tensor.to(device)
    return moved.clone() if moved.is_inference() else moved


def _split(batch: Any, inputs: ExampleInputs, number: int) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """Arguments and target of a batch."""
    if isinstance(batch, Mapping):
        known = {key: batch[key] for key in inputs.kwargs if key in batch}
        if not inputs.args and known.keys() == inputs.kwargs.keys():
            return ((), known), batch
        missing = ", ".join(sorted(inputs.kwargs.keys() - known.keys())) or f"{len(inputs.args)} positional arguments"
        raise DataError(
            f"batch {number} is a dictionary with {', '.join(map(str, batch))}; {missing} missing: {_FORMS}."
        )
    n_args = len(inputs.args)
    if isinstance(batch, tuple | list) and n_args and not inputs.kwargs:
        if len(batch) == 2 and type(batch[0]) in (tuple, list) and not isinstance(inputs.args[0], tuple | list):
            return (tuple(batch[0]), {}), batch[1]
        if len(batch) == n_args + 1:
            return (tuple(batch[:n_args]), {}), batch[n_args]
        if len(batch) == n_args:
            return (tuple(batch), {}), batch
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Mapping):
        return _split(batch[0], inputs, number)[0], batch[1]
    if isinstance(batch, Tensor) and n_args == 1 and not inputs.kwargs:
        return ((batch,), {}), batch
    raise DataError(f"batch {number} is {described(batch)}; {_FORMS}: {described(inputs.args, inputs.kwargs)}.")


def _checked(given: tuple[tuple[Any, ...], dict[str, Any]], graph: Graph, number: int) -> list[Any]:
    """Flat inputs, of the structure and sizes of the capture."""
    leaves, spec = pytree.tree_flatten(given)
    if spec != graph.in_spec:
        raise DataError(
            f"batch {number} is {described(*given)}; the model was captured with "
            f"{described(graph.inputs.args, graph.inputs.kwargs)}."
        )
    examples = pytree.tree_leaves((graph.inputs.args, graph.inputs.kwargs))
    is_free = graph.batch_hint is not None
    for leaf, example in zip(leaves, examples, strict=True):
        if isinstance(example, Tensor):
            _check_tensor(leaf, example, is_free, number)
    if any(isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()) for leaf in leaves):
        raise DataError(f"batch {number} holds NaN; expected numbers. Check the data.")
    return [_like(leaf, example) for leaf, example in zip(leaves, examples, strict=True)]


def _check_tensor(leaf: Any, example: Tensor, is_free: bool, number: int) -> None:
    """Refuse what cannot stand in the place of a tensor that the model was captured with."""
    if not isinstance(leaf, Tensor):
        raise DataError(
            f"batch {number} holds {type(leaf).__name__}; the model was captured with {_described_one(example)} there."
        )
    skipped = 1 if is_free and example.ndim else 0
    if leaf.ndim != example.ndim or leaf.shape[skipped:] != example.shape[skipped:]:
        any_batch = " with any batch" if is_free else ", whose batch is fixed (use drop_last=True)"
        raise DataError(
            f"batch {number} holds a tensor of shape {tuple(leaf.shape)}; the model was captured for "
            f"{tuple(example.shape)}{any_batch}."
        )
    if leaf.is_floating_point() != example.is_floating_point():
        raise DataError(
            f"batch {number} holds a tensor of dtype {leaf.dtype}; the model was captured for {example.dtype}."
        )


def _like(leaf: Any, example: Any) -> Any:
    """A floating input in the dtype of the capture."""
    is_floating = isinstance(leaf, Tensor) and isinstance(example, Tensor) and example.is_floating_point()
    return leaf.to(example.dtype) if is_floating else leaf


def described(*values: Any) -> str:
    """Structure, shapes and dtypes of nested values, in short."""
    if len(values) == 2 and isinstance(values[0], tuple) and isinstance(values[1], dict):
        values = (*values[0], values[1]) if values[1] else values[0]
    return ", ".join(_described_one(value) for value in values) or "nothing"


def _described_one(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_described_one(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(_described_one(item) for item in value)})"
    return type(value).__name__
