"""Arguments as plain data: structure and shapes of all, values of integers and truth values; and made again of it.

Zeros would prove nothing: a table that is read at one place only, a mask that hides everything.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from torchshear.errors import ArgumentError

Json = dict[str, Any]
_MOST_VALUES = 4096  # of one tensor; of larger ones the range is described
_MOST_ELEMENTS = 1 << 62  # of one tensor without values
_MOST_DRAWN = 1 << 28  # of all tensors that are given values
_SEED = 0


def describe_input(value: Any) -> Any:
    """Describe an argument.

    Raises:
        TypeError: it is not made of tensors, numbers, text, lists, tuples and dictionaries.
    """
    if isinstance(value, Tensor):
        entry = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return entry | (_describe_values(value) if _is_counted(value.dtype) else {})
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe_input(item) for item in value]}
    if type(value) in (dict, OrderedDict) and all(isinstance(key, str) for key in value):
        kind = "dict" if type(value) is dict else "ordered_dict"
        return {kind: {key: describe_input(item) for key, item in value.items()}}
    raise TypeError(f"cannot describe {type(value).__name__}")


def _is_counted(dtype: torch.dtype) -> bool:
    """Whether values of a dtype are integers or truth values."""
    return not (dtype.is_floating_point or dtype.is_complex)


def _describe_values(tensor: Tensor) -> Json:
    """The values of a tensor of integers, as text for a line of its own; or from which to which they go."""
    if tensor.is_meta or not tensor.numel():
        return {}
    numbers = tensor.detach().to("cpu", torch.int64).flatten()
    if len(numbers) <= _MOST_VALUES:
        return {"values": " ".join(map(str, numbers.tolist()))}
    return {"low": int(numbers.min()), "high": int(numbers.max())}


class InputMaker:
    """Makes arguments of their descriptions; what has no values is drawn at random, in one order and from one seed."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._generator = torch.Generator().manual_seed(_SEED)
        self._n_left = _MOST_DRAWN

    def make(self, value: Any) -> Any:
        """An argument as described.

        Raises:
            KeyError, TypeError, ValueError: the description is damaged.
            ArgumentError: it describes more values than should be drawn.
        """
        if not isinstance(value, dict):
            if value is not None and not isinstance(value, bool | int | float | str):
                raise TypeError(f"an input of kind {type(value).__name__}")
            return value
        if "tensor" in value:
            return self._tensor(value)
        if "float" in value:
            return float(value["float"])
        if "ordered_dict" in value:
            return OrderedDict((key, self.make(item)) for key, item in value["ordered_dict"].items())
        if "dict" in value:
            return {key: self.make(item) for key, item in value["dict"].items()}
        if "tuple" in value:
            return tuple(self.make(item) for item in value["tuple"])
        return [self.make(item) for item in value["list"]]

    def _tensor(self, entry: Json) -> Tensor:
        shape, dtype = _read_shape(entry["tensor"]), getattr(torch, str(entry["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{entry['dtype']!r} is not a dtype")
        self._n_left -= 0 if self._device.type == "meta" else shape.numel()
        if self._n_left < 0:
            raise ArgumentError(
                f"the example inputs that are described have more than {_MOST_DRAWN} values; give inputs of your own "
                f"as args and kwargs."
            )
        if not _is_counted(dtype):
            return self._random(shape, dtype)
        if "values" not in entry:
            return self._between(*_read_range(entry, dtype), shape).to(dtype)
        numbers = [int(text) for text in entry["values"].split()]
        if len(numbers) != shape.numel():
            raise ValueError(f"{len(numbers)} values in an input of shape {list(shape)}")
        _check_range(min(numbers), max(numbers), dtype)
        return torch.tensor(numbers).reshape(shape).to(self._device, dtype)

    def _random(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Values of a standard normal distribution, in a type that is drawn in everywhere."""
        if self._device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        drawn = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=self._generator, dtype=drawn).to(self._device, dtype)

    def _between(self, low: int, high: int, shape: torch.Size) -> Tensor:
        """Integers from `low` to `high`, both included."""
        if self._device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(low, min(high + 1, 2**63 - 1), shape, generator=self._generator).to(self._device)


def _read_shape(sizes: Any) -> torch.Size:
    is_shape = isinstance(sizes, list) and all(_is_integer(size) and size >= 0 for size in sizes)
    if not is_shape or math.prod(size for size in sizes if size) >= _MOST_ELEMENTS:
        raise ValueError(f"{str(sizes)[:40]} is not a shape")
    return torch.Size(sizes)


def _read_range(entry: Json, dtype: torch.dtype) -> tuple[int, int]:
    """From which to which number values go; zeros where there were no values to tell."""
    low, high = entry.get("low", 0), entry.get("high", 0)
    if not (_is_integer(low) and _is_integer(high)):
        raise TypeError(f"range {low!r} to {high!r}")
    _check_range(low, high, dtype)
    return low, high


def _check_range(low: int, high: int, dtype: torch.dtype) -> None:
    """Raise ValueError if numbers are none of a dtype, or in the wrong order."""
    least, most = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not least <= low <= high <= min(most, 2**63 - 1):
        raise ValueError(f"numbers from {low} to {high} in an input of dtype {dtype}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
