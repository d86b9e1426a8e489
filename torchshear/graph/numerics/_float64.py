"""Computing in float64 throughout, also where code casts to narrower types or weights are narrower."""

from collections.abc import Callable, Iterator, Sequence
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


@contextmanager
def compute_in(dtype: torch.dtype) -> Iterator[None]:
    """Compute everything in float64 for a block, whatever casts the code has; do nothing for any other dtype.

    Language models compute norms, softmax and rotary tables in float32 whatever the type of their weights. Without
    this, two equal models agree to the last digits of float32 only. The weights may be narrower: see `_WideOperators`.

    Args:
        dtype: float64, or the dtype in which the code computes anyway.
    """
    if dtype is not torch.float64:
        yield
        return
    with run_exclusively():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _WideDtypes(), _WideOperators():  # type: ignore[no-untyped-call]
                yield
        finally:
            torch.set_default_dtype(before)


def to_float64(inputs: ExampleInputs) -> ExampleInputs:
    """Return copies of the inputs, with floating tensors in float64."""
    return inputs.map(lambda t: t.detach().to(torch.float64, copy=True) if t.is_floating_point() else t.clone())


class _Narrow(NamedTuple):
    """Stands for a tensor in float64 that is kept as it was before."""

    tensor: Tensor


class _WideDtypes(TorchFunctionMode):
    """Has narrow tensors say that they are in float64, since code compares dtypes and is to see what they become.

    Operands of functions that refuse two dtypes are widened before the call. For a backward they are saved as they were
    and widened again when it reads them; saved wide, all weights of a network would be there twice more.
    """

    _pairs: Sequence[tuple[Tensor, Tensor]] = ()  # operands of the call under way, and the same in float64

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "").partition(".")[0] in _STRICT:
            return self._call_in_float64(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        return _WIDER.get(result, result) if isinstance(result, torch.dtype) else result

    def _call_in_float64(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        narrow, spec = pytree.tree_flatten((args, kwargs))
        wide = [_widen(leaf) if isinstance(leaf, Tensor) else leaf for leaf in narrow]
        before, self._pairs = self._pairs, [(a, b) for a, b in zip(narrow, wide, strict=True) if a is not b]

        def pack(tensor: Tensor) -> Tensor | _Narrow:
            with torch._C.DisableTorchFunction():
                for one, other in self._pairs:
                    is_same = tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape
                    if is_same and tensor.stride() == other.stride():
                        return _Narrow(one.detach())
            return tensor

        def unpack(saved: Tensor | _Narrow) -> Tensor:
            return _widen(saved.tensor) if isinstance(saved, _Narrow) else saved

        try:
            args, kwargs = pytree.tree_unflatten(wide, spec)
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return func(*args, **kwargs)
        finally:
            self._pairs = before


def _widen(tensor: Tensor) -> Tensor:
    """Return a narrow tensor in float64, another one as it is. The repeated values of an expanded one stay shared."""
    if tensor.dtype not in _WIDER:
        return tensor
    single = tensor
    for dim, size in enumerate(tensor.shape):
        if size > 1 and tensor.stride(dim) == 0:
            single = single.narrow(dim, 0, 1)
    wide = single.to(_WIDER[tensor.dtype])
    return wide if single is tensor else wide.expand(tensor.shape)


class _Effects(NamedTuple):
    """Effects of an operator: whether it only returns views, and positions and names of the arguments it writes to."""

    is_view: bool
    writes: tuple[tuple[int, str], ...]


_EFFECTS: dict[Any, _Effects] = {}  # by operator


class _WideOperators(LeanDispatchMode):  # type: ignore[no-untyped-call]
    """Has every operator and every new constant that is asked for a narrow floating dtype use the wide one.

    Narrow operands are computed with in float64 and stay as they are: weights are widened where they are used, one call
    at a time, so that no copy of the model is needed. Results that are written to a narrow tensor are rounded to it.
    Statistics of batch norms, whose operators do not say that they write, are then not updated.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # which would give other dtypes here
            effects = _EFFECTS.get(func)
            if effects is None:
                effects = _EFFECTS[func] = _effects_of(func)
            # A backward asks for the dtype of each parameter. What checkpoints run again in it is the model itself.
            widens_dtypes = torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled()
            given = kwargs or {}
            if func is torch.ops.aten.lift_fresh.default:  # as of torch.tensor(number, dtype=...)
                return _widen(args[0])
            if effects.is_view:
                return func(*_widen_all(args, False, widens_dtypes), **_widen_all(given, False, widens_dtypes))
            wide_args, wide_kwargs = _widen_all(list(args), True, widens_dtypes), _widen_all(given, True, widens_dtypes)
            written: list[tuple[Tensor, Tensor]] = []
            for position, name in effects.writes:
                if position < len(args):
                    written += _changed_pairs(args[position], wide_args[position])
                elif name in given:
                    written += _changed_pairs(given[name], wide_kwargs[name])
            result = func(*wide_args, **wide_kwargs)
            for narrow, wide in written:
                narrow.copy_(wide)
            own = {id(wide): narrow for narrow, wide in written}
            return pytree.tree_map_only(Tensor, lambda tensor: own.get(id(tensor), tensor), result) if own else result


def _effects_of(func: Any) -> _Effects:
    """Read the effects of an operator from its schema."""
    writes = tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info and argument.alias_info.is_write
    )
    infos = [returned.alias_info for returned in func._schema.returns]
    is_view = bool(infos) and all(info is not None and not info.is_write for info in infos)
    return _Effects(is_view or func.overloadpacket is torch.ops.aten.set_, writes)


def _widen_all(value: Any, widens_tensors: bool, widens_dtypes: bool) -> Any:
    """Return arguments with wide dtypes in place of narrow ones, and narrow tensors in float64, each if asked."""
    if isinstance(value, Tensor):
        return _widen(value) if widens_tensors else value
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value) if widens_dtypes else value
    if isinstance(value, list | tuple):
        return type(value)(_widen_all(item, widens_tensors, widens_dtypes) for item in value)
    if isinstance(value, dict):
        return {name: _widen_all(item, widens_tensors, widens_dtypes) for name, item in value.items()}
    return value


def _changed_pairs(narrow: Any, wide: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors that were widened, each with the wide one."""
    if isinstance(narrow, Tensor):
        return [] if narrow is wide else [(narrow, wide)]
    if isinstance(narrow, list | tuple):
        return [pair for one, other in zip(narrow, wide, strict=True) for pair in _changed_pairs(one, other)]
    return []
