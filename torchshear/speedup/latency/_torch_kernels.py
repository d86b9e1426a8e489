"""Times of the operators of a module, as torch runs them one after another."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchshear.speedup.latency._kernels import KernelTime, Shape

_WARMUP: Final = 2  # runs that are not kept
_TINY_RUNS: Final = 300
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 15, 100, 1.0


def profile_operators(run: Callable[[], object], gpu: torch.device | None = None) -> tuple[KernelTime, ...]:
    """Time every operator that a function calls, with the shapes of what it reads and writes.

    Operators are seen by a dispatch mode of torch, below modules and functions of Python: that takes any code, needs no
    capture, and has the tensors themselves at hand. (torch's profiler has no shapes of results, and nests operators.)
    In inference mode those that are made of others, as `linear`, come whole. What the mode itself takes, a few
    microseconds a call, is measured and subtracted. On a GPU a time is that between two events of the stream.

    Args:
        run: runs the module once, in inference mode.
        gpu: the GPU that operators run on; None for the CPU.

    Returns:
        The operators in their order, each with the least of its times over some runs. Those of one name are told apart
        by their place among these.
    """
    known: dict[str, KernelTime] = {}
    own_ms = 0.0 if gpu is not None else _own_ms()
    start = time.perf_counter()
    for number in range(_WARMUP + _MOST_RUNS):
        if number >= _WARMUP + _LEAST_RUNS and time.perf_counter() - start > _SECONDS:
            break
        calls: list[_Call] = []
        with _RecordingCalls(calls, gpu):
            run()
        if gpu is not None:
            torch.cuda.synchronize(gpu)
        if number < _WARMUP:
            continue
        seen: dict[str, int] = defaultdict(int)
        for call in calls:
            place = seen[call.operator]
            seen[call.operator] += 1
            name = f"{call.operator}#{place}" if place else call.operator
            ms = max(call.ms - own_ms, 0.0)
            if name in known:
                ms = min(ms, known[name].ms)
            known[name] = KernelTime(name, call.operator, call.inputs, call.outputs, ms)
    return tuple(known.values())


def _own_ms() -> float:
    """Return what the mode takes of the time of a call on the CPU: that of a tiny one, seen by it and not."""
    one, calls, plain = torch.zeros(1), list[_Call](), list[float]()
    for _ in range(_TINY_RUNS):
        begin = time.perf_counter()
        torch.relu(one)
        plain.append((time.perf_counter() - begin) * 1e3)
    with _RecordingCalls(calls, None):
        for _ in range(_TINY_RUNS):
            torch.relu(one)
    return max(min(call.ms for call in calls) - min(plain), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of an operator.

    Attributes:
        operator: its name, as "aten.linear".
        inputs: type and shape of each tensor that it read.
        outputs: the same of what it wrote.
        begin: seconds on the clock, or an event of the GPU's stream.
        end: likewise.
    """

    operator: str
    inputs: tuple[tuple[str, Shape], ...]
    outputs: tuple[tuple[str, Shape], ...]
    begin: Any
    end: Any

    @property
    def ms(self) -> float:
        """Milliseconds from beginning to end."""
        if isinstance(self.end, float):
            return float(self.end - self.begin) * 1e3
        return float(self.begin.elapsed_time(self.end))


class _RecordingCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every call of an operator."""

    def __init__(self, calls: list[_Call], gpu: torch.device | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls
        self._gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        inputs = _described((args, given))  # before the call, which may change a shape in place
        begin = self._now()
        made = func(*args, **given)
        end = self._now()
        self._calls.append(_Call(str(func.overloadpacket), inputs, _described(made), begin, end))
        return made

    def _now(self) -> Any:
        if self._gpu is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._gpu))
        return event


def _described(values: object) -> tuple[tuple[str, Shape], ...]:
    """Return type and shape of each tensor in nested containers."""
    tensors = (value for value in pytree.tree_leaves(values) if isinstance(value, Tensor))
    return tuple((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in tensors)
