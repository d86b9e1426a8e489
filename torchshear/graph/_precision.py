"""Computing in float64 throughout, also where code casts to narrower types or weights are narrower."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchshear.graph._inputs import ExampleInputs

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}

# Functions that refuse operands of two dtypes before they come down to single operators.
_STRICT = frozenset(
    {"batch_norm", "bilinear", "conv1d", "conv2d", "conv3d", "convolution", "gru", "lstm", "prelu", "rnn_relu"}
    | {"rnn_tanh"}
)


class _Claimed(TorchFunctionMode):
    """Narrow tensors say that they are in float64, so that code which compares dtypes takes them for what they become.

    Operands of functions that refuse two dtypes are widened before the call.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "").partition(".")[0] in _STRICT:
            args, kwargs = pytree.tree_map_only(Tensor, _wide, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        return _WIDER.get(result, result) if isinstance(result, torch.dtype) else result


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in float64, itself if it is no narrow one."""
    return tensor.to(_WIDER[tensor.dtype]) if tensor.dtype in _WIDER else tensor


class _Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operator that is asked for a narrow floating dtype gets the wide one, and so does every new constant.

    Narrow operands are computed with in float64, and stay as they are: weights are widened where they are used, one
    call at a time, so that no copy of the model is needed. What is written to a narrow tensor is rounded to it;
    statistics of batch norms, whose operators do not say that they write, are then not updated.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # dtypes are what they are here
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._current_graph_task_id() < 0:  # in a backward the engine asks for the dtype of each parameter
            args, kwargs = pytree.tree_map_only(torch.dtype, lambda dtype: _WIDER.get(dtype, dtype), (args, kwargs))
        if func is torch.ops.aten.lift_fresh.default:  # what torch.tensor(number, dtype=...) gives
            return _wide(args[0])
        if _is_view(func) or func.overloadpacket is torch.ops.aten.set_:
            return func(*args, **kwargs)
        written: list[tuple[Tensor, Tensor]] = []
        wide_args, wide_kwargs = _widened(func, args, kwargs, written)
        result = func(*wide_args, **wide_kwargs)
        for narrow, wide in written:
            narrow.copy_(wide)
        own = {id(wide): narrow for narrow, wide in written}
        return pytree.tree_map_only(Tensor, lambda tensor: own.get(id(tensor), tensor), result)


def _is_view(func: Any) -> bool:
    """Whether an operator gives its operand in another shape, and computes and writes nothing."""
    infos = [one.alias_info for one in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _widened(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[tuple[Tensor, Tensor]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with narrow tensors in float64; those that the operator writes to are noted, with their wide twins."""
    arguments = func._schema.arguments
    writes = {argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write}

    def wide(value: Any, name: str) -> Any:
        def convert(tensor: Tensor) -> Tensor:
            twin = _wide(tensor)
            if twin is not tensor and name in writes:
                written.append((tensor, twin))
            return twin

        return pytree.tree_map_only(Tensor, convert, value)

    names = [argument.name for argument in arguments]
    return (
        tuple(wide(value, name) for value, name in zip(args, names, strict=False)),
        {name: wide(value, name) for name, value in kwargs.items()},
    )


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """In float64, compute everything in float64, whatever casts the code has; in another dtype, leave it as it is.

    Language models compute norms, softmax and rotary tables in float32 whatever their weights are; without this, two
    equal models agree to float32's last digits only. The weights need not be in float64: see `_Widened`.
    """
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Claimed(), _Widened():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


def to_float64(inputs: ExampleInputs) -> ExampleInputs:
    """Copies of the inputs, floating tensors in float64."""
    return inputs.map(lambda t: t.detach().to(torch.float64, copy=True) if t.is_floating_point() else t.clone())
