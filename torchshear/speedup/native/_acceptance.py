"""The trials that a native form has to pass, each made when the one before is passed."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn

from torchshear.graph import ExampleInputs, copy_model
from torchshear.graph._run import graph_values
from torchshear.graph.numerics._float64 import to_float64
from torchshear.speedup.comparing._random_inputs import gives_numbers, random_inputs, smaller_inputs, table_sizes
from torchshear.speedup.comparing._random_weights import SharedWeights
from torchshear.speedup.native._original import Original
from torchshear.speedup.native._reference_run import Expected, Trial


class Trials:
    """The example, also as if it were exported, and random inputs, with one sample more where the batch is free.

    One input is not enough: an activation may be saturated throughout, a size may fit one batch by accident. Nor are
    the weights that the model has; the random inputs meet others. Of images, these have few pixels where the graph
    takes them. What the graph gives is computed once for each.

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
        drawn = [n for n, t in sliced.items() if kinds[n].kind == "parameter" and t.is_floating_point() and t.ndim]
        self._weights = SharedWeights(sliced, dtype, drawn, original.caches)
        self._example = self._trial(original.example, None)
        self._random: Trial | None = None

    def twin(self, work: nn.Module) -> nn.Module:
        """A copy of a native form that computes in the dtype of the trials, with the parameters that the graph has."""
        memo = {id(t): self._weights.tensors[n] for n, t in self._sliced.items() if isinstance(t, nn.Parameter)}
        twin = copy_model(work, memo)
        return twin.to(torch.float64) if self.dtype is torch.float64 else twin

    def __iter__(self) -> Iterator[Trial]:
        """Give the trials. Whether that of an export is needed is known once the first one has been run."""
        yield self._example
        if self._example.questions and self._original.runs_as_exported:
            yield self._example.varied(exporting=True)
        if self._random is None:
            self._random = self._with_other_weights()
        yield self._random

    def _with_other_weights(self) -> Trial:
        """A trial with other weights; with the model's own where the network does not compute numbers with others."""
        model, graph, example = self._original.model, self._original.graph, self._original.example
        inputs = smaller_inputs(graph, model)
        batch = example.batch_size()
        more = inputs.with_batch(batch + 1) if graph.batch_hint is not None and batch else inputs
        takes = partial(gives_numbers, model, example=example)
        inputs = random_inputs(more, table_sizes(graph), takes, seed=1)
        trial = self._trial(inputs, 1)
        outputs = trial.expected.outputs
        if all(bool(out.isfinite().all()) for out in outputs if isinstance(out, Tensor)):
            return trial
        return self._trial(inputs, None)

    def _trial(self, inputs: ExampleInputs, seed: int | None) -> Trial:
        def values(leaves: list[object]) -> Iterator[object]:
            for _, value in graph_values(self._rewritten, self._weights.tensors, leaves):
                yield value

        own = to_float64(inputs) if self.dtype is torch.float64 else inputs.copy()
        return Trial(Expected(own, self.dtype, values, self._weights, seed))
