"""Example inputs of a model: checked, rebatched, described as JSON and made again from the description."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError
from torchshear.graph._contract import register_dataclasses

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExampleInputs:
    """The arguments that a model is called with.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: Any, kwargs: Mapping[str, Any] | None = None) -> "ExampleInputs":
        """Check and wrap what the user gave.

        Raises:
            ArgumentError: `args` is not a tuple or list, or `kwargs` not a mapping.
        """
        if isinstance(args, Tensor):
            raise ArgumentError("args is a tensor; expected a tuple of positional arguments: write args=(x,).")
        if not isinstance(args, Sequence) or isinstance(args, str):
            raise ArgumentError(f"args is {type(args).__name__}; expected a tuple of positional arguments.")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ArgumentError(f"kwargs is {type(kwargs).__name__}; expected a dictionary of keyword arguments.")
        register_dataclasses((args, kwargs))
        return cls(tuple(args), dict(kwargs or {}))

    def tensors(self) -> list[Tensor]:
        """All tensors in the arguments, in the order in which they are flattened."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map(self, function: Any) -> "ExampleInputs":
        """Apply a function to every tensor; everything else is kept."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return ExampleInputs(args, kwargs)

    def copy(self) -> "ExampleInputs":
        """The same values in tensors of their own, also where one tensor was given twice."""
        return self.map(lambda tensor: tensor.detach().clone())

    def batch_size(self) -> int | None:
        """Size of dimension 0 if all tensors with at least one dimension share it, else None."""
        sizes = {tensor.shape[0] for tensor in self.tensors() if tensor.ndim}
        return sizes.pop() if len(sizes) == 1 else None

    def with_batch(self, size: int) -> "ExampleInputs":
        """Repeat or cut every tensor along dimension 0 to `size` rows."""
        return self.map(lambda t: t[torch.arange(size, device=t.device) % t.shape[0]] if t.ndim else t)

    def unfilled(self, size: int) -> "ExampleInputs":
        """Tensors of the same layout with `size` rows and no values, for who only reads shapes."""
        return self.map(lambda t: _unfilled(t, size) if t.ndim else t)

    def signature(self) -> tuple[str, tuple[Any, ...]]:
        """What a capture depends on: structure, shapes and dtypes, and the values of what is no tensor; hashable."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return str(spec), tuple(
            (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))
            for leaf in leaves
        )

    def to_json(self) -> Json | None:
        """Describe structure, shapes and dtypes; None if an argument is not plain data."""
        try:
            return {"args": [_describe(value) for value in self.args], "kwargs": _describe(self.kwargs)}
        except TypeError:
            return None

    @classmethod
    def from_json(cls, description: Json, device: torch.device | str = "cpu") -> "ExampleInputs":
        """Make inputs of the described shapes: zeros, since tracing reads no values.

        Raises:
            KeyError, TypeError, ValueError: the description is damaged.
        """
        args = tuple(_make(value, device) for value in description["args"])
        return cls(args, _make(description["kwargs"], device))


def _unfilled(tensor: Tensor, size: int) -> Tensor:
    outermost_first = sorted(range(1, tensor.ndim), key=lambda dim: -tensor.stride()[dim])
    shape = (size, *tensor.shape[1:])
    return torch.empty_permuted(shape, (0, *outermost_first), dtype=tensor.dtype, device=tensor.device)


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [_describe(item) for item in value]}
    if type(value) in (dict, OrderedDict) and all(isinstance(key, str) for key in value):
        kind = "dict" if type(value) is dict else "ordered_dict"
        return {kind: {key: _describe(item) for key, item in value.items()}}
    raise TypeError(f"cannot describe {type(value).__name__}")


def _make(value: Any, device: torch.device | str) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['dtype']!r} is not a dtype")
        return torch.zeros(value["tensor"], dtype=dtype, device=device)
    if "ordered_dict" in value:
        return OrderedDict((key, _make(item, device)) for key, item in value["ordered_dict"].items())
    if "dict" in value:
        return {key: _make(item, device) for key, item in value["dict"].items()}
    if "tuple" in value:
        return tuple(_make(item, device) for item in value["tuple"])
    return [_make(item, device) for item in value["list"]]
