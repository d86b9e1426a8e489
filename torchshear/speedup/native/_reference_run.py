"""Judging a native form: run beside what it should compute, until the first module that goes wrong is known."""

import copy
import math
import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear.errors import first_line
from torchshear.graph import ExampleInputs, output_leaves, set_exporting_flag
from torchshear.graph.model._process import record_export_queries
from torchshear.graph.model._state import in_mode
from torchshear.graph.numerics._float64 import compute_in
from torchshear.speedup.comparing._random_weights import SharedWeights
from torchshear.speedup.comparing._relative_error import relative_error, tolerance
from torchshear.speedup.native._attention_scale import KeptScale

Fingerprint = tuple[float, float]
_INNER = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[2]}{os.sep}", "<")
_ROW = 4096  # elements that are summed with one row of weights
_SAME = {torch.float64: 1e-11}  # relative difference of the fingerprints of equal values
_SAME_IN_NARROWER = 1e-6


class RefusedDtypeError(Exception):
    """The rewritten graph does not run in a dtype; says what torch says."""


class Expected:
    """What the rewritten graph computes on some inputs: run when it is asked for, and once more for fingerprints.

    Args:
        inputs: what to run on, in the dtype to compute in.
        dtype: dtype to compute in.
        values: gives the values of the graph's nodes on flat inputs; the last is the output.
        weights: what the graph computes with.
        seed: of the draw of these weights; None for the model's own.
    """

    def __init__(
        self,
        inputs: ExampleInputs,
        dtype: torch.dtype,
        values: Callable[[list[Any]], Iterator[Any]],
        weights: SharedWeights,
        seed: int | None,
    ) -> None:
        self.inputs = inputs
        self.dtype = dtype
        self.weights = weights
        self.seed = seed
        self._values = values
        self._outputs: list[Any] | None = None
        self._seen: dict[tuple[int, ...], list[Fingerprint]] | None = None

    @property
    def outputs(self) -> list[Any]:
        """Flat outputs."""
        if self._outputs is None:
            self._outputs = self._run(lambda value: None)
        return self._outputs

    @property
    def seen(self) -> Mapping[tuple[int, ...], Sequence[Fingerprint]]:
        """Shape -> fingerprints of all values of that shape."""
        if self._seen is None:
            seen: dict[tuple[int, ...], list[Fingerprint]] = defaultdict(list)

            def note(value: Any) -> None:
                for tensor in pytree.tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        seen[tuple(tensor.shape)].append(_fingerprint(tensor))

            self._outputs = self._run(note)
            self._seen = seen
        return self._seen

    def _run(self, note: Callable[[Any], None]) -> list[Any]:
        given, value = self.inputs.copy(), None
        self.weights.set_values(self.seed)
        try:
            with torch.no_grad(), compute_in(self.dtype), torch.random.fork_rng(devices=[]):
                for value in self._values(pytree.tree_leaves((given.args, given.kwargs))):
                    note(value)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise RefusedDtypeError(f"{type(error).__name__}: {first_line(error)[:160]}") from error
        return output_leaves(value)


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """What a native form is run on, and what it should give.

    Attributes:
        expected: what the rewritten graph gives.
        is_searched: whether all values are compared, to find out which module goes wrong; else the outputs only.
        exporting: whether the code is to believe that it is being exported.
        factors: numbers that values may be multiplied with inside, where a factor keeps the scale of attention.
        questions: whether the code asked if it is being exported, in any run that was not to be taken for one.
    """

    expected: Expected
    is_searched: bool = False
    exporting: bool = False
    factors: tuple[float, ...] = ()
    questions: list[str] = field(default_factory=list)

    def varied(self, **changes: Any) -> "Trial":
        """The same with other attributes; what the graph gives is computed once for both."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call of one module in a run, which can be made again without the rest of the model.

    Attributes:
        module: name of the module.
        progress: number of modules that were entered and left well before.
        args: what it was given.
        kwargs: likewise, by name.
    """

    module: str
    progress: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Where a native form goes wrong.

    Attributes:
        modules: the module that goes wrong and those around it, innermost first.
        progress: number of modules that were entered and left well before.
        message: what is wrong.
        check: name of the check that failed, to be skipped if the check is what is wrong; "" if it did not run.
        calls: the calls of `modules` that did not end.
        passed: modules of which a call ended well before.
    """

    modules: tuple[str, ...]
    progress: int
    message: str
    check: str = ""
    calls: tuple[Call, ...] = field(default=(), compare=False)
    passed: frozenset[str] = field(default=frozenset(), compare=False)

    def is_like(self, other: "Fault | None") -> bool:
        """Whether the same is wrong at the same place, in a run of which more or less lies around it."""
        return other is not None and (self.progress, self.message) == (other.progress, other.message)


def _fingerprint(tensor: Tensor) -> Fingerprint:
    """Two sums that tell values apart, whatever the order in which they lie in memory."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.detach().reshape(-1).to(torch.float64)
    if not flat.numel():
        return 0.0, 0.0
    wave, size = _sums(flat)
    if not math.isfinite(size):  # masks of -inf, rows of NaN: worth a look at each number
        wave, size = _sums(flat.nan_to_num(0.0, 1e3, -1e3))
    return wave / flat.numel(), size / flat.numel()


def _sums(flat: Tensor) -> Fingerprint:
    """Sum with weights, and sum of magnitudes; few calls, since every value of a network passes here."""
    rows, rest = flat.numel() // _ROW, flat.numel() % _ROW
    wave = _wave(_ROW, flat.device, math.sqrt(6))
    total = float(flat[-rest:].dot(wave[:rest])) if rest else 0.0
    if rows:
        each = flat[: rows * _ROW].view(rows, _ROW).mv(wave)
        total += float(each.dot(_wave(1 << (rows - 1).bit_length(), flat.device, math.sqrt(2))[:rows]))
    return total, float(torch.linalg.vector_norm(flat, 1))


@lru_cache(maxsize=64)
def _wave(length: int, device: torch.device, frequency: float) -> Tensor:
    return torch.cos(torch.arange(1, length + 1, dtype=torch.float64, device=device) * frequency)


@dataclass(slots=True)
class _Watch:
    """What hooks see while a module runs."""

    trial: Trial
    skipped: frozenset[str]
    trusted: int
    running: list[Call] = field(default_factory=list)
    progress: int = 0
    passed: set[str] = field(default_factory=set)

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called: what it is given must be right, or the module that calls it is wrong."""
        call = Call(name, self.progress, args, kwargs)
        self._judge(f"input of {name}", args)
        self.running.append(call)

    def leave(self, name: str, output: Any) -> None:
        """A module ends: what it gives must be right."""
        self._judge(f"output of {name}", output)
        self.passed.add(self.running.pop().module)

    def _judge(self, check: str, value: Any) -> None:
        if self.progress >= self.trusted and check not in self.skipped:
            leaves = [leaf for leaf in output_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            if not all(self._was_seen(leaf) for leaf in leaves):
                raise _StopError(check)
        self.progress += 1

    def fault(self, message: str, check: str = "") -> Fault:
        """What goes wrong now: in the modules that are running, in the model itself if none is."""
        calls = tuple(reversed(self.running))
        names = tuple(call.module for call in calls) or ("",)
        return Fault(names, self.progress, message, check, calls, frozenset(self.passed))

    def _was_seen(self, tensor: Tensor) -> bool:
        """Whether the graph has such a value, too."""
        if not self.trial.is_searched:
            return True
        wave, size = _fingerprint(tensor)
        limit = _SAME.get(self.trial.expected.dtype, _SAME_IN_NARROWER) * (size + 1e-12)
        known = self.trial.expected.seen.get(tuple(tensor.shape), ())
        factors = (1.0, *self.trial.factors)
        return any(abs(a * c - wave) <= limit and abs(b * c - size) <= limit for a, b in known for c in factors)


class _StopError(BaseException):
    """Ends a run that is known to go wrong; code of the model that catches exceptions does not catch it."""


def find_fault(
    model: nn.Module,
    trial: Trial,
    skipped: frozenset[str] = frozenset(),
    trusted: int = 0,
    inside: Call | None = None,
) -> Fault | None:
    """Run a model on a trial; say where it goes wrong first, or None if it gives what the graph gives.

    Args:
        model: the model, with parameters in the trial's dtype; run in eval mode.
        trial: what it should give.
        skipped: checks that are left out.
        trusted: number of values, from the first on, that are taken for right without a look.
        inside: a call to make in place of the whole run; None then means that this call gives what it should.
    """
    if trial.is_searched:
        _ = trial.expected.seen  # computed before the model runs, not in the middle of it
    name = "" if inside is None else inside.module
    watch = _Watch(trial, skipped, trusted, progress=0 if inside is None else inside.progress)
    try:
        with _hooked(model, name, watch), _conditions(model, name, trial):
            args, kwargs = _given(trial, inside)
            actual = output_leaves(model.get_submodule(name)(*args, **kwargs))
    except _StopError as stop:
        return watch.fault(f"its own forward gives other results on the smaller tensors ({stop})", str(stop))
    except Exception as error:  # the module's own code may fail in any way on sizes that it did not expect
        what = f"{type(error).__name__}: {_short(error)}"
        return watch.fault(f"its own forward does not run on the smaller tensors ({what})")
    if inside is not None:
        return None
    expected = trial.expected.outputs
    difference = relative_error(expected, actual)
    if difference <= tolerance(expected):
        return None
    message = f"its own forward gives other results on the smaller tensors (relative difference {difference:.2g})"
    return Fault(("",), watch.progress, message, "output of the model")


def _given(trial: Trial, inside: Call | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of their own for a run, which may write to them."""
    if inside is not None:
        return copy.deepcopy((inside.args, inside.kwargs))
    inputs = trial.expected.inputs.copy()
    return inputs.args, inputs.kwargs


@contextmanager
def _conditions(model: nn.Module, name: str, trial: Trial) -> Iterator[None]:
    """Weights, dtype, branches and random numbers of a trial; what a module keeps of a run is forgotten behind it."""
    exporting = set_exporting_flag() if trial.exporting else record_export_queries(trial.questions)
    trial.expected.weights.set_values(trial.expected.seed, model)
    with torch.no_grad(), compute_in(trial.expected.dtype), in_mode(model.get_submodule(name), "eval"), exporting:
        yield


def _short(error: Exception) -> str:
    """First words of an error, and the innermost line outside torch and this package that raised it."""
    line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith(_INNER):
            line = f", {Path(frame.f_code.co_filename).name}:{number}"
    return f"{first_line(error)[:160]}{line}"


@contextmanager
def _hooked(model: nn.Module, inside: str, watch: _Watch) -> Iterator[None]:
    """Watch a module of a model, and every module in it, while it runs."""
    handles: list[Any] = []
    try:
        for name, module in model.get_submodule(inside).named_modules(prefix=inside):
            enter: Any = lambda _, args, kwargs, name=name: watch.enter(name, args, kwargs)  # noqa: E731
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            is_kept = any(isinstance(hook, KeptScale) for hook in module._forward_hooks.values())
            leave: Any = lambda _, __, out, name=name: watch.leave(name, out)  # noqa: E731
            handles.append(module.register_forward_hook(leave, prepend=is_kept))  # what it gives without the factor
        yield
    finally:
        for handle in handles:
            handle.remove()
