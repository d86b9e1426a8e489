"""Example inputs of a model: checked, given another batch, described as JSON and made again from the description."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError
from torchshear.graph._outputs import register_dataclasses
from torchshear.graph.model._checks import unusual_format

Json = dict[str, Any]
_MAX_LISTED = 4096  # integers of one tensor that are listed in a description; of larger ones the range is noted
_MAX_ELEMENTS = 1 << 62  # of one tensor on the meta device
_MAX_RANDOM = 1 << 28  # elements of all tensors that are made from a description
_SEED = 0


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
        """Check and wrap the arguments that a user gave; a tensor counts as one positional argument.

        Raises:
            ArgumentError: `args` is not a tensor, tuple or list, `kwargs` is not a mapping, one of them contains
                itself, or a tensor is sparse or of an 8-bit type.
        """
        args = (args,) if isinstance(args, Tensor) else args
        if not isinstance(args, Sequence) or isinstance(args, str):
            raise ArgumentError(f"args is {type(args).__name__}; expected a tensor or a tuple of positional arguments.")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ArgumentError(f"kwargs is {type(kwargs).__name__}; expected a dictionary of keyword arguments.")
        try:
            register_dataclasses((args, kwargs))
            inputs = cls(tuple(args), dict(kwargs or {}))
            tensors = inputs.tensors()
        except RecursionError as error:
            raise ArgumentError("args or kwargs contain themselves, or are nested too deeply.") from error
        for number, tensor in enumerate(tensors):
            if unusual_format(tensor):
                raise ArgumentError(
                    f"tensor {number} of the example inputs is {unusual_format(tensor)}, with which few operators "
                    f"compute; expected a dense one of 16 bits or more."
                )
        return inputs

    def tensors(self) -> list[Tensor]:
        """Return all tensors in the arguments, in the order in which they are flattened."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map(self, function: Any) -> "ExampleInputs":
        """Apply a function to every tensor and keep everything else."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return ExampleInputs(args, kwargs)

    def copy(self) -> "ExampleInputs":
        """Return the same values in new tensors, one for each place, also where one tensor was given twice."""
        return self.map(lambda tensor: tensor.detach().clone())

    def batch_size(self) -> int | None:
        """Return the size of dimension 0 if all tensors with at least one dimension share it, else None."""
        sizes = {tensor.shape[0] for tensor in self.tensors() if tensor.ndim}
        return sizes.pop() if len(sizes) == 1 else None

    def with_batch(self, size: int) -> "ExampleInputs":
        """Repeat or cut every tensor along dimension 0 to `size` rows."""
        return self.map(lambda t: t[torch.arange(size, device=t.device) % t.shape[0]] if t.ndim else t)

    def without_values(self, size: int) -> "ExampleInputs":
        """Return uninitialized tensors with `size` rows and the same memory layout, where only shapes are read."""

        def empty(tensor: Tensor) -> Tensor:
            if not tensor.ndim:
                return tensor
            outermost_first = sorted(range(1, tensor.ndim), key=lambda dim: -tensor.stride()[dim])
            shape = (size, *tensor.shape[1:])
            return torch.empty_permuted(shape, (0, *outermost_first), dtype=tensor.dtype, device=tensor.device)

        return self.map(empty)

    def signature(self) -> tuple[str, tuple[Any, ...]]:
        """Return what a capture depends on: structure, shapes, dtypes, devices and values of other leaves; hashable."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return str(spec), tuple(
            (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))
            for leaf in leaves
        )

    def to_json(self) -> Json | None:
        """Describe structure, shapes, dtypes and the values of integers.

        Zeros in the place of integers would prove nothing: they read one row of a table, or are a mask that hides all.

        Returns:
            The description; None if an argument is not plain data.
        """
        try:
            return {"args": [_describe(value) for value in self.args], "kwargs": _describe(self.kwargs)}
        except TypeError:
            return None

    @classmethod
    def from_json(cls, description: Json, device: torch.device | str = "cpu") -> "ExampleInputs":
        """Make inputs from a description, the same each time.

        Integers and truth values are as they were where they are listed; other numbers are drawn from one seed.

        Raises:
            KeyError, TypeError, ValueError: the description is damaged.
            ArgumentError: it describes more values than should be drawn.
        """
        builder = _InputBuilder(device)
        args = tuple(builder.build(value) for value in description["args"])
        kwargs = builder.build(description["kwargs"])
        if not isinstance(kwargs, dict):
            raise TypeError(f"kwargs of kind {type(kwargs).__name__}")
        return cls(args, kwargs)


def _describe(value: Any) -> Any:
    """Describe an argument as JSON.

    Raises:
        TypeError: it is not made of tensors, numbers, text, lists, tuples and dictionaries.
    """
    if isinstance(value, Tensor):
        entry: Json = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if value.is_floating_point() or value.is_complex() or value.is_meta or not value.numel():
            return entry
        # The values of integers: all on one line, or their range if they are many.
        numbers = value.detach().to("cpu", torch.int64).flatten()
        if len(numbers) <= _MAX_LISTED:
            return {**entry, "values": " ".join(map(str, numbers.tolist()))}
        return {**entry, "low": int(numbers.min()), "high": int(numbers.max())}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [_describe(item) for item in value]}
    if type(value) in (dict, OrderedDict) and all(isinstance(key, str) for key in value):
        kind = "dict" if type(value) is dict else "ordered_dict"
        return {kind: {key: _describe(item) for key, item in value.items()}}
    raise TypeError(f"cannot describe {type(value).__name__}")


class _InputBuilder:
    """Makes arguments from descriptions; values that are not listed are drawn in one order and from one seed."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._generator = torch.Generator().manual_seed(_SEED)
        self._n_left = _MAX_RANDOM

    def build(self, value: Any) -> Any:
        """Return an argument as described; the errors are those of `ExampleInputs.from_json`."""
        if not isinstance(value, dict):
            if value is not None and not isinstance(value, bool | int | float | str):
                raise TypeError(f"an input of kind {type(value).__name__}")
            return value
        if "tensor" in value:
            return self._build_tensor(value)
        if "float" in value:
            return float(value["float"])
        if "ordered_dict" in value:
            return OrderedDict((key, self.build(item)) for key, item in value["ordered_dict"].items())
        if "dict" in value:
            return {key: self.build(item) for key, item in value["dict"].items()}
        if "tuple" in value:
            return tuple(self.build(item) for item in value["tuple"])
        return [self.build(item) for item in value["list"]]

    def _build_tensor(self, entry: Json) -> Tensor:
        sizes, dtype = entry["tensor"], getattr(torch, str(entry["dtype"]), None)
        is_shape = isinstance(sizes, list) and all(_is_integer(size) and size >= 0 for size in sizes)
        if not is_shape or math.prod(size for size in sizes if size) >= _MAX_ELEMENTS:
            raise ValueError(f"{str(sizes)[:40]} is not a shape")
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{entry['dtype']!r} is not a dtype")
        shape, is_on_meta = torch.Size(sizes), self._device.type == "meta"
        self._n_left -= 0 if is_on_meta else shape.numel()
        if self._n_left < 0:
            raise ArgumentError(
                f"the example inputs that are described have more than {_MAX_RANDOM} values; give inputs of your own "
                f"as args and kwargs."
            )
        if dtype.is_floating_point or dtype.is_complex:
            if is_on_meta:
                return torch.empty(shape, dtype=dtype, device="meta")
            # Drawn in a type that every device and version draws alike in.
            wide = torch.complex128 if dtype.is_complex else torch.float64
            return torch.randn(shape, generator=self._generator, dtype=wide).to(self._device, dtype)
        if "values" in entry:
            numbers = [int(text) for text in entry["values"].split()]
            if len(numbers) != shape.numel():
                raise ValueError(f"{len(numbers)} values in an input of shape {list(shape)}")
            _check_range(min(numbers), max(numbers), dtype)
            return torch.tensor(numbers).reshape(shape).to(self._device, dtype)
        return self._build_integers(entry.get("low", 0), entry.get("high", 0), shape, dtype)

    def _build_integers(self, low: Any, high: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Draw integers from `low` to `high`, both included."""
        if not (_is_integer(low) and _is_integer(high)):
            raise TypeError(f"range {low!r} to {high!r}")
        _check_range(low, high, dtype)
        if self._device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, min(high + 1, 2**63 - 1), shape, generator=self._generator).to(self._device, dtype)


def _check_range(low: int, high: int, dtype: torch.dtype) -> None:
    """Raise ValueError if two numbers are in the wrong order or cannot be of a dtype."""
    smallest, largest = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not smallest <= low <= high <= min(largest, 2**63 - 1):
        raise ValueError(f"numbers from {low} to {high} in an input of dtype {dtype}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
