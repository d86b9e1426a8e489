"""Example inputs of a model: checked, rebatched, described as JSON and made again from the description."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError
from torchshear.graph._contract import register_dataclasses
from torchshear.graph._input_values import InputMaker, Json, describe_input
from torchshear.graph.model._checks import unusual_format


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
            ArgumentError: `args` is not a tuple or list, or `kwargs` not a mapping; or one of them holds itself.
        """
        if isinstance(args, Tensor):
            raise ArgumentError("args is a tensor; expected a tuple of positional arguments: write args=(x,).")
        if not isinstance(args, Sequence) or isinstance(args, str):
            raise ArgumentError(f"args is {type(args).__name__}; expected a tuple of positional arguments.")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ArgumentError(f"kwargs is {type(kwargs).__name__}; expected a dictionary of keyword arguments.")
        try:
            register_dataclasses((args, kwargs))
            found = cls(tuple(args), dict(kwargs or {}))
            tensors = found.tensors()
        except RecursionError as error:
            raise ArgumentError("args or kwargs hold themselves, or are nested too deeply.") from error
        for number, tensor in enumerate(tensors):
            if unusual_format(tensor):
                raise ArgumentError(
                    f"tensor {number} of the example inputs is {unusual_format(tensor)}, with which few operators "
                    f"compute; expected a dense one of 16 bits or more."
                )
        return found

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

    def without_values(self, size: int) -> "ExampleInputs":
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
        """Describe structure, shapes, dtypes and the values of integers; None if an argument is not plain data."""
        try:
            return {"args": [describe_input(value) for value in self.args], "kwargs": describe_input(self.kwargs)}
        except TypeError:
            return None

    @classmethod
    def from_json(cls, description: Json, device: torch.device | str = "cpu") -> "ExampleInputs":
        """Make inputs as described: integers and truth values as they were, other numbers at random, each time alike.

        Raises:
            KeyError, TypeError, ValueError: the description is damaged.
        """
        maker = InputMaker(device)
        args, kwargs = tuple(maker.make(value) for value in description["args"]), maker.make(description["kwargs"])
        if not isinstance(kwargs, dict):
            raise TypeError(f"kwargs of kind {type(kwargs).__name__}")
        return cls(args, kwargs)


def _unfilled(tensor: Tensor, size: int) -> Tensor:
    outermost_first = sorted(range(1, tensor.ndim), key=lambda dim: -tensor.stride()[dim])
    shape = (size, *tensor.shape[1:])
    return torch.empty_permuted(shape, (0, *outermost_first), dtype=tensor.dtype, device=tensor.device)
