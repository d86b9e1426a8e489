"""Running a model in float64 throughout, also where its code casts to narrower types."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchshear.graph import ExampleInputs

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


class _Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operator that is asked for a narrow floating dtype gets the wide one, and so does every new constant."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wide = {name: _WIDER.get(v, v) if isinstance(v, torch.dtype) else v for name, v in (kwargs or {}).items()}
        result = func(*(_WIDER.get(v, v) if isinstance(v, torch.dtype) else v for v in args), **wide)
        if func is torch.ops.aten.lift_fresh.default:  # what torch.tensor(number, dtype=...) gives
            return result.to(_WIDER.get(result.dtype, result.dtype))
        return result


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """In float64, compute everything in float64, whatever casts the code has; in another dtype, leave it as it is.

    Language models compute norms, softmax and rotary tables in float32 whatever their weights are; without this, two
    equal models agree to float32's last digits only.
    """
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


class InDtype(Mapping[str, Tensor]):
    """Tensors by name, floating ones in another dtype, converted one by one when they are read.

    Args:
        tensors: what to convert; not held twice.
        dtype: the dtype.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def to_float64(inputs: ExampleInputs) -> ExampleInputs:
    """Copies of the inputs, floating tensors in float64."""
    return inputs.map(lambda t: t.detach().to(torch.float64, copy=True) if t.is_floating_point() else t.clone())
