"""Reference runs: values of the rewritten graph on some inputs of the original, which a native form must give, too."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.errors import first_line
from torchshear.graph import ExampleInputs, Graph
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import graph_values, run_failure
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import set_exporting_flag
from torchshear.graph.model._state import Cache, find_caches
from torchshear.graph.numerics._float64 import compute_in, to_float64
from torchshear.speedup._random_values import (
    SharedWeights,
    gives_numbers,
    random_inputs,
    smaller_inputs,
    table_sizes,
)

Fingerprint = tuple[float, float]  # mean of weighted elements, mean magnitude
_ROW = 4096  # elements that are summed with one row of weights


@dataclass(frozen=True, eq=False)
class Original:
    """A model as it is before a cut, with facts that hold for all cuts of it.

    Attributes:
        model: the model, or the calls of its parts; not changed.
        graph: its capture.
    """

    model: nn.Module
    graph: Graph

    @cached_property
    def example(self) -> ExampleInputs:
        """The example; at most four samples of it where the batch is free, which the graph is known to run on."""
        inputs = self.graph.inputs
        batch = inputs.batch_size()
        return inputs.with_batch(4) if self.graph.batch_hint is not None and batch and batch > 4 else inputs

    @cached_property
    def example_in_training(self) -> ExampleInputs:
        """The example, with two samples where it has one and the batch is free: batch norms need two values each."""
        is_single = self.graph.batch_hint is not None and self.example.batch_size() == 1
        return self.example.with_batch(2) if is_single else self.example

    @cached_property
    def caches(self) -> tuple[Cache, ...]:
        """Attributes in which the model keeps values computed from its weights."""
        return find_caches(self.model, self.graph.inputs)

    @cached_property
    def runs_as_exported(self) -> bool:
        """True if it runs when it believes that it is being exported."""
        with set_exporting_flag():
            return run_failure(self.model, self.example, "eval") is None

    @cached_property
    def refuses_float64(self) -> bool:
        """True if it runs in its own dtype but not in float64, which some fast kernels do not take."""
        wide, inputs = copy_model(self.model, {}).to(torch.float64), to_float64(self.example)
        for branch in (nullcontext, set_exporting_flag):
            with branch():
                if run_failure(self.model, self.example, "eval") is None:
                    with compute_in(torch.float64):
                        if run_failure(wide, inputs, "eval") is not None:
                            return True
        return False


class RefusedDtypeError(Exception):
    """The rewritten graph does not run in a dtype; says what torch says."""


@dataclass(slots=True, eq=False)
class ExpectedValues:
    """Values of the rewritten graph on some inputs; it is run when they are first read, once more for fingerprints.

    Attributes:
        inputs: inputs of the run, in the dtype to compute in.
        dtype: dtype to compute in.
        rewritten: the graph after the cut.
        weights: tensors that the graph computes with.
        seed: seed of random values of these weights; None for the model's own.
    """

    inputs: ExampleInputs
    dtype: torch.dtype
    rewritten: fx.Graph
    weights: SharedWeights
    seed: int | None
    _outputs: list[Any] | None = field(default=None, init=False)
    _fingerprints: dict[tuple[int, ...], list[Fingerprint]] | None = field(default=None, init=False)

    @property
    def outputs(self) -> list[Any]:
        """Flat outputs."""
        if self._outputs is None:
            self._outputs = self._run(lambda value: None)
        return self._outputs

    @property
    def fingerprints(self) -> Mapping[tuple[int, ...], Sequence[Fingerprint]]:
        """Shape -> fingerprints of all values of that shape."""
        if self._fingerprints is None:
            found: dict[tuple[int, ...], list[Fingerprint]] = defaultdict(list)

            def note(value: Any) -> None:
                for tensor in pytree.tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        found[tuple(tensor.shape)].append(fingerprint(tensor))

            self._outputs = self._run(note)
            self._fingerprints = found
        return self._fingerprints

    def _run(self, note: Callable[[Any], None]) -> list[Any]:
        """Run the graph, pass each value to `note`, and return the flat outputs."""
        copied, value = self.inputs.copy(), None
        leaves = pytree.tree_leaves((copied.args, copied.kwargs))
        self.weights.set_values(self.seed)
        try:
            with torch.no_grad(), compute_in(self.dtype), torch.random.fork_rng(devices=[]):
                for _, value in graph_values(self.rewritten, self.weights.tensors, leaves):
                    note(value)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise RefusedDtypeError(f"{type(error).__name__}: {first_line(error)[:160]}") from error
        return output_leaves(value)


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceRun:
    """A run that a native form has to agree with.

    Attributes:
        expected: values of the rewritten graph.
        compares_inside: whether inputs and outputs of all modules are compared, to find the one that goes wrong; else
            the outputs of the model only.
        exporting: whether the code is to believe that it is being exported.
        factors: numbers that values inside may be multiplied with, where a factor keeps the scale of attention.
        export_queries: calls by which the code asked whether it is being exported, in runs that are none; added to.
    """

    expected: ExpectedValues
    compares_inside: bool = False
    exporting: bool = False
    factors: tuple[float, ...] = ()
    export_queries: list[str] = field(default_factory=list)


class ReferenceRuns:
    """All runs that a native form has to agree with, each made when the one before has been passed.

    They are the example, the example as if the model were exported, and random inputs with random weights and one
    sample more where the batch is dynamic. One input is not enough: an activation may be saturated throughout, and a
    size may fit one batch by accident; nor are the weights of the model. Random images have few pixels where the graph
    takes them. The graph is run once for each.

    Args:
        original: the captured original.
        rewritten: the graph after the cut.
        sliced: canonical name -> shrunk tensor.
        dtype: dtype to compute in.
    """

    def __init__(
        self, original: Original, rewritten: fx.Graph, sliced: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self._original = original
        self._rewritten = rewritten
        self._sliced = sliced
        kinds = original.graph.state
        random = [n for n, t in sliced.items() if kinds[n].kind == "parameter" and t.is_floating_point() and t.ndim]
        self._weights = SharedWeights(sliced, dtype, random, original.caches)
        self._on_example = self._make(original.example, None)
        self._on_random: ReferenceRun | None = None

    def twin(self, native: nn.Module) -> nn.Module:
        """Copy a native form in eval mode, in the dtype of the runs, with the parameters of the graph."""
        memo = {id(t): self._weights.tensors[n] for n, t in self._sliced.items() if isinstance(t, nn.Parameter)}
        twin = copy_model(native, memo)
        for module in twin.modules():
            module.training = False
        return twin.to(torch.float64) if self.dtype is torch.float64 else twin

    def __iter__(self) -> Iterator[ReferenceRun]:
        """Yield the runs; the one as if exported only if code asked for that in the first, which has been made then."""
        yield self._on_example
        if self._on_example.export_queries and self._original.runs_as_exported:
            yield replace(self._on_example, exporting=True)
        if self._on_random is None:
            model, graph, example = self._original.model, self._original.graph, self._original.example
            inputs, batch = smaller_inputs(graph, model), example.batch_size()
            inputs = inputs.with_batch(batch + 1) if graph.batch_hint is not None and batch else inputs
            inputs = random_inputs(inputs, table_sizes(graph), partial(gives_numbers, model, example=example), seed=1)
            self._on_random = self._make(inputs, 1)
            outputs = [out for out in self._on_random.expected.outputs if isinstance(out, Tensor)]
            if not all(bool(out.isfinite().all()) for out in outputs):  # random weights give no numbers
                self._on_random = self._make(inputs, None)
        yield self._on_random

    def _make(self, inputs: ExampleInputs, seed: int | None) -> ReferenceRun:
        own = to_float64(inputs) if self.dtype is torch.float64 else inputs.copy()
        return ReferenceRun(ExpectedValues(own, self.dtype, self._rewritten, self._weights, seed))


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Return two sums that tell values apart, whatever the order in which they lie in memory."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.detach().reshape(-1).to(torch.float64)
    if not flat.numel():
        return 0.0, 0.0
    wave, magnitude = _sums(flat)
    if not math.isfinite(magnitude):  # masks of -inf, rows of NaN: worth a look at each number
        wave, magnitude = _sums(flat.nan_to_num(0.0, 1e3, -1e3))
    return wave / flat.numel(), magnitude / flat.numel()


def _sums(flat: Tensor) -> Fingerprint:
    """Sum elements with weights, and magnitudes; in few calls, since every value of a network passes here."""
    n_rows, rest = flat.numel() // _ROW, flat.numel() % _ROW
    weights = _cosines(_ROW, flat.device, math.sqrt(6))
    total = float(flat[-rest:].dot(weights[:rest])) if rest else 0.0
    if n_rows:
        sums = flat[: n_rows * _ROW].view(n_rows, _ROW).mv(weights)
        total += float(sums.dot(_cosines(1 << (n_rows - 1).bit_length(), flat.device, math.sqrt(2))[:n_rows]))
    return total, float(torch.linalg.vector_norm(flat, 1))


@lru_cache(maxsize=64)
def _cosines(length: int, device: torch.device, frequency: float) -> Tensor:
    return torch.cos(torch.arange(1, length + 1, dtype=torch.float64, device=device) * frequency)
