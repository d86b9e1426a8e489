"""Computing in float64 throughout, also where code casts to narrower types or weights are narrower."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchshear.graph._inputs import ExampleInputs
from torchshear.graph.model._process import run_exclusively
from torchshear.graph.numerics._dispatch import LeanDispatchMode

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

    Operands of functions that refuse two dtypes are widened before the call. For a backward they are kept as they were,
    and widened again when it comes to them: kept wide, all weights of a network would be there twice more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._widened: list[tuple[Tensor, Tensor]] = []  # of the call under way: what was given, and that in float64

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "").partition(".")[0] in _STRICT:
            return self._strict(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        return _WIDER.get(result, result) if isinstance(result, torch.dtype) else result

    def _strict(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = self._widened
        narrow, spec = pytree.tree_flatten((args, kwargs))
        wide = [_wide(leaf) if isinstance(leaf, Tensor) else leaf for leaf in narrow]
        self._widened = [(a, b) for a, b in zip(narrow, wide, strict=True) if a is not b]
        try:
            args, kwargs = pytree.tree_unflatten(wide, spec)
            with torch.autograd.graph.saved_tensors_hooks(self._packed, _unpacked):
                return func(*args, **kwargs)
        finally:
            self._widened = before

    def _packed(self, tensor: Tensor) -> Any:
        """What is kept of a tensor for the backward: of a widened one, where it came from."""
        with torch._C.DisableTorchFunction():
            for narrow, wide in self._widened:
                is_same = tensor.data_ptr() == wide.data_ptr() and tensor.shape == wide.shape
                if is_same and tensor.stride() == wide.stride():
                    return _Narrow(narrow.detach())
        return tensor


class _Narrow(NamedTuple):
    """Stands for a tensor in float64."""

    tensor: Tensor


def _unpacked(kept: Any) -> Tensor:
    return _wide(kept.tensor) if isinstance(kept, _Narrow) else kept


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in float64, itself if it is no narrow one. What an expanded one repeats is widened once."""
    if tensor.dtype not in _WIDER:
        return tensor
    repeated = [dim for dim, size in enumerate(tensor.shape) if size > 1 and tensor.stride(dim) == 0]
    if not repeated:
        return tensor.to(_WIDER[tensor.dtype])
    single = tensor
    for dim in repeated:
        single = single.narrow(dim, 0, 1)
    return single.to(_WIDER[tensor.dtype]).expand(tensor.shape)


class _Widened(LeanDispatchMode):  # type: ignore[no-untyped-call]
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
        plan = _WRITES.get(func)
        if plan is None:
            plan = _WRITES[func] = _plan_of(func)
        # A backward asks for the dtype of each parameter; what checkpoints run anew in it is the model itself.
        widens_dtypes = torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled()
        if func is torch.ops.aten.lift_fresh.default:  # what torch.tensor(number, dtype=...) gives
            return _wide(args[0])
        if plan.is_view:
            return func(*_mapped(args, False, widens_dtypes), **_mapped(kwargs, False, widens_dtypes))
        written: list[tuple[Tensor, Tensor]] = []
        wide_args = [_mapped(value, True, widens_dtypes) for value in args]
        wide_kwargs = {name: _mapped(value, True, widens_dtypes) for name, value in kwargs.items()}
        for place, name in plan.writes:
            if place < len(args):
                written += _changed(args[place], wide_args[place])
            elif name in kwargs:
                written += _changed(kwargs[name], wide_kwargs[name])
        result = func(*wide_args, **wide_kwargs)
        if not written:
            return result
        for narrow, wide in written:
            narrow.copy_(wide)
        own = {id(wide): narrow for narrow, wide in written}
        return pytree.tree_map_only(Tensor, lambda tensor: own.get(id(tensor), tensor), result)


class _Plan(NamedTuple):
    """What is known of an operator: whether it gives views only, and places and names of what it writes to."""

    is_view: bool
    writes: tuple[tuple[int, str], ...]


_WRITES: dict[Any, _Plan] = {}


def _plan_of(func: Any) -> _Plan:
    writes = tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info and argument.alias_info.is_write
    )
    return _Plan(_is_view(func) or func.overloadpacket is torch.ops.aten.set_, writes)


def _mapped(value: Any, is_wide: bool, widens_dtypes: bool) -> Any:
    """An argument with wide dtypes for narrow ones, and if asked narrow tensors in float64."""
    if isinstance(value, Tensor):
        return _wide(value) if is_wide else value
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value) if widens_dtypes else value
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, is_wide, widens_dtypes) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(item, is_wide, widens_dtypes) for name, item in value.items()}
    return value


def _changed(narrow: Any, wide: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors of which the second is another one than the first."""
    if isinstance(narrow, Tensor):
        return [] if narrow is wide else [(narrow, wide)]
    if isinstance(narrow, list | tuple):
        return [pair for one, other in zip(narrow, wide, strict=True) for pair in _changed(one, other)]
    return []


def _is_view(func: Any) -> bool:
    """Whether an operator gives its operand in another shape, and computes and writes nothing."""
    infos = [one.alias_info for one in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


@contextmanager
def compute_in(dtype: torch.dtype) -> Iterator[None]:
    """In float64, compute everything in float64, whatever casts the code has; in another dtype, leave it as it is.

    Language models compute norms, softmax and rotary tables in float32 whatever their weights are; without this, two
    equal models agree to float32's last digits only. The weights need not be in float64: see `_Widened`.
    """
    if dtype is not torch.float64:
        yield
        return
    with run_exclusively():
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
