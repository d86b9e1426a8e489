"""Finding the first module at which a native form diverges from the rewritten graph."""

import copy
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.dependency.plans._form import OutputFactors
from torchshear.errors import first_line
from torchshear.graph._outputs import output_leaves
from torchshear.graph.model._process import record_export_queries, set_exporting_flag
from torchshear.graph.model._state import in_mode
from torchshear.graph.numerics._float64 import compute_in
from torchshear.speedup._relative_error import relative_error, tolerance
from torchshear.speedup.native._attention_scale import OutputFactor, multiply_outputs
from torchshear.speedup.native._reference_run import ReferenceRun, fingerprint

# Beginnings of the names of files that are not the user's.
_INNER = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[2]}{os.sep}", "<")
_SAME = {torch.float64: 1e-11}  # relative difference of the fingerprints of equal values
_SAME_IN_NARROWER = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class ModuleCall:
    """A call of one module in a run, which can be repeated without the rest of the model.

    Attributes:
        module: name of the module.
        progress: number of values that were right before it.
        args: its arguments.
        kwargs: its keyword arguments.
    """

    module: str
    progress: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Divergence:
    """First place at which a native form goes wrong.

    Attributes:
        modules: the module that goes wrong and those around it, innermost first.
        progress: number of inputs and outputs of modules that were right before.
        message: what is wrong.
        check: name of the value that differs, to be skipped if the graph need not have it; "" if the code failed.
        calls: the calls of `modules` that did not end.
        passed: modules of which a call ended with a right output before.
    """

    modules: tuple[str, ...]
    progress: int
    message: str
    check: str = ""
    calls: tuple[ModuleCall, ...] = field(default=(), compare=False)
    passed: frozenset[str] = field(default=frozenset(), compare=False)

    def is_same_as(self, other: "Divergence | None") -> bool:
        """Check that another run, with more or less around the module, goes wrong at the same place."""
        return other is not None and (self.progress, self.message) == (other.progress, other.message)


class _StopError(BaseException):
    """Ends a run that is known to go wrong; code of the model that catches exceptions does not catch it."""


@dataclass(slots=True)
class _ModuleWatch:
    """Hooks that compare inputs and outputs of all modules of a run with the values of the graph.

    Attributes:
        run: the reference.
        skipped: names of values that are not compared.
        n_trusted: number of values, from the first on, that are not compared either.
        running: calls that have not ended.
        progress: number of values so far.
        passed: modules of which a call has ended.
    """

    run: ReferenceRun
    skipped: frozenset[str]
    n_trusted: int
    running: list[ModuleCall] = field(default_factory=list)
    progress: int = 0
    passed: set[str] = field(default_factory=set)

    @contextmanager
    def watch(self, model: nn.Module, inside: str) -> Iterator[None]:
        """Register the hooks on a module of a model, and on every module in it, for a while."""
        handles: list[Any] = []

        def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = ModuleCall(name, self.progress, args, kwargs)
            self._compare(f"input of {name}", args)  # if it is wrong, so is the module that makes the call
            self.running.append(call)

        def leave(name: str, output: Any) -> None:
            self._compare(f"output of {name}", output)
            self.passed.add(self.running.pop().module)

        try:
            for name, module in model.get_submodule(inside).named_modules(prefix=inside):
                before: Any = lambda _, args, kwargs, name=name: enter(name, args, kwargs)  # noqa: E731
                after: Any = lambda _, __, output, name=name: leave(name, output)  # noqa: E731
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                has_factor = any(isinstance(hook, OutputFactor) for hook in module._forward_hooks.values())
                handles.append(module.register_forward_hook(after, prepend=has_factor))  # the output without the factor
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, check: str, value: Any) -> None:
        """See that the graph has a value, too.

        Raises:
            _StopError: it has not.
        """
        expected = self.run.expected
        if self.run.compares_inside and self.progress >= self.n_trusted and check not in self.skipped:
            factors = (1.0, *self.run.factors)
            for leaf in output_leaves(value):
                if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                    continue
                wave, size = fingerprint(leaf)
                limit = _SAME.get(expected.dtype, _SAME_IN_NARROWER) * (size + 1e-12)
                known = expected.fingerprints.get(tuple(leaf.shape), ())
                if not any(
                    abs(a * c - wave) <= limit and abs(b * c - size) <= limit for a, b in known for c in factors
                ):
                    raise _StopError(check)
        self.progress += 1

    def divergence(self, message: str, check: str = "") -> Divergence:
        """Return the divergence in the modules that are running, or in the model itself if none is."""
        calls = tuple(reversed(self.running))
        names = tuple(call.module for call in calls) or ("",)
        return Divergence(names, self.progress, message, check, calls, frozenset(self.passed))


def find_divergence(
    model: nn.Module,
    run: ReferenceRun,
    skipped: frozenset[str] = frozenset(),
    n_trusted: int = 0,
    inside: ModuleCall | None = None,
) -> Divergence | None:
    """Run a model beside a reference; return where it goes wrong first, or None if it agrees.

    Args:
        model: the model, with parameters in the dtype of the run; run in eval mode.
        run: the reference.
        skipped: names of values that are not compared.
        n_trusted: number of values, from the first on, that are not compared either.
        inside: a call to make in place of the whole run; None then means that this call agrees.
    """
    expected, name = run.expected, "" if inside is None else inside.module
    if run.compares_inside:
        _ = expected.fingerprints  # computed before the model runs, not in the middle of it
    watch = _ModuleWatch(run, skipped, n_trusted, progress=0 if inside is None else inside.progress)
    module = model.get_submodule(name)
    expected.weights.set_values(expected.seed, model)
    exporting = set_exporting_flag() if run.exporting else record_export_queries(run.export_queries)
    try:
        with (
            watch.watch(model, name),
            torch.no_grad(),
            compute_in(expected.dtype),
            in_mode(module, "eval"),
            exporting,
        ):
            if inside is None:
                inputs = expected.inputs.copy()
                args, kwargs = inputs.args, inputs.kwargs
            else:
                args, kwargs = copy.deepcopy((inside.args, inside.kwargs))  # the call may write to them
            actual = output_leaves(module(*args, **kwargs))
    except _StopError as stop:
        return watch.divergence(f"its own forward gives other results on the smaller tensors ({stop})", str(stop))
    except Exception as error:  # the module's own code may fail in any way on sizes that it did not expect
        what = f"{type(error).__name__}: {_describe_error(error)}"
        return watch.divergence(f"its own forward does not run on the smaller tensors ({what})")
    if inside is not None:
        return None
    difference = relative_error(expected.outputs, actual)
    if difference <= tolerance(expected.outputs):
        return None
    message = f"its own forward gives other results on the smaller tensors (relative difference {difference:.2g})"
    return Divergence(("",), watch.progress, message, "output of the model")


def first_divergence(model: nn.Module, runs: Iterable[ReferenceRun], factors: OutputFactors) -> Divergence | None:
    """Return the divergence in the first run in which a model, with factors on some outputs, does not agree."""
    distinct = tuple(set(factors.values()))
    with multiply_outputs(model, factors):
        found = (find_divergence(model, replace(run, factors=distinct)) for run in runs)
        return next((divergence for divergence in found if divergence is not None), None)


def _describe_error(error: Exception) -> str:
    """Return the first words of an error, and the innermost line of the user's code that raised it."""
    line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith(_INNER):
            line = f", {Path(frame.f_code.co_filename).name}:{number}"
    return f"{first_line(error)[:160]}{line}"
