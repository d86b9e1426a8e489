"""Reference runs: what the rewritten graph computes on some inputs, and a native form has to compute as well."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.errors import first_line
from torchshear.graph import ExampleInputs
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import graph_values
from torchshear.graph.model._copy import copy_model
from torchshear.graph.numerics._float64 import compute_in, to_float64
from torchshear.speedup.comparing._random_inputs import gives_numbers, random_inputs, smaller_inputs, table_sizes
from torchshear.speedup.comparing._random_weights import SharedWeights
from torchshear.speedup.native._original import Original

Fingerprint = tuple[float, float]  # mean of weighted elements, mean magnitude
_ROW = 4096  # elements that are summed with one row of weights


class RefusedDtypeError(Exception):
    """The rewritten graph does not run in a dtype; says what torch says."""


class ExpectedValues:
    """Values of the rewritten graph on some inputs; it is run when they are first read, once more for fingerprints.

    Args:
        inputs: inputs of the run, in the dtype to compute in.
        dtype: dtype to compute in.
        rewritten: the graph after the cut.
        weights: tensors that the graph computes with.
        seed: seed of random values of these weights; None for the model's own.
    """

    def __init__(
        self, inputs: ExampleInputs, dtype: torch.dtype, rewritten: fx.Graph, weights: SharedWeights, seed: int | None
    ) -> None:
        self.inputs = inputs
        self.dtype = dtype
        self.weights = weights
        self.seed = seed
        self._rewritten = rewritten
        self._outputs: list[Any] | None = None
        self._fingerprints: dict[tuple[int, ...], list[Fingerprint]] | None = None

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
                for _, value in graph_values(self._rewritten, self.weights.tensors, leaves):
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
            self._on_random = self._make_random()
        yield self._on_random

    def _make_random(self) -> ReferenceRun:
        """Make a run with random inputs and weights; with the model's own weights if others give no numbers."""
        model, graph, example = self._original.model, self._original.graph, self._original.example
        inputs, batch = smaller_inputs(graph, model), example.batch_size()
        inputs = inputs.with_batch(batch + 1) if graph.batch_hint is not None and batch else inputs
        inputs = random_inputs(inputs, table_sizes(graph), partial(gives_numbers, model, example=example), seed=1)
        run = self._make(inputs, 1)
        is_finite = all(bool(out.isfinite().all()) for out in run.expected.outputs if isinstance(out, Tensor))
        return run if is_finite else self._make(inputs, None)

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
