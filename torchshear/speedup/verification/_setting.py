"""What a proof compares: a model, what a plan made of it, and inputs and weights that exercise both."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchshear.dependency import ChannelGroups, Cut, PruningPlan
from torchshear.errors import VerificationError, first_line
from torchshear.graph import ExampleInputs, caches_of, failure_of, output_leaves
from torchshear.graph._run import graph_output
from torchshear.speedup._compare import relative_error, tolerance
from torchshear.speedup._small_inputs import smaller_inputs
from torchshear.speedup._varied_inputs import check_examples, table_sizes, varied_inputs
from torchshear.speedup.verification._reference import MaskedNetwork
from torchshear.speedup.verification._runs import (
    conditions,
    given,
    in_dtype,
    leaves_of,
    own_dtype,
    run_module,
    twin_of,
)
from torchshear.speedup.verification._weights import State, Values

_SAMPLES = 2  # samples of a trial where the batch is free: one hides how samples are told apart


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Inputs, and weights of the original to run them with.

    Attributes:
        inputs: what to run on.
        state: canonical name -> tensor of the original; None for its own.
        dtype: dtype to compute in.
    """

    inputs: ExampleInputs
    state: State | None
    dtype: torch.dtype


class Setting:
    """A model and what a plan made of it, and the trials to compare them on.

    Both are run as twins that share their parameters, so that other values can be given to these for a while.

    Attributes:
        original: a twin of the model.
        candidate: a twin of the shrunk model.
        dtype: float64 if both models run in it, else their own.
        mixes: whether an operator mixes positions of which some are cut.
        values: what the cut makes of tensors.
        state: canonical name -> tensor of the original.
        trials: the example; other inputs; and yet others, with weights drawn anew where the original takes them. Of
            images, these have few pixels where the model takes them.
        left_out: what could not be compared, and why; added to.

    Raises:
        ArgumentError: the example inputs are empty or on the meta device.
        VerificationError: the original itself does not run on the example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        small: nn.Module,
        plan: PruningPlan,
        groups: ChannelGroups,
        example: ExampleInputs,
        seed: int,
    ) -> None:
        check_examples(example)
        self.plan, self.groups, self.model, self.small = plan, groups, model, small
        self.graph = groups.graph
        self.cut = Cut(groups, plan.kept)
        self.values = Values(groups, self.cut)
        self.caches = caches_of(model, example), caches_of(small, example)
        self.original, self.candidate = twin_of(model, self.caches[0]), twin_of(small, self.caches[1])
        self.state = self.values.of(self.original)
        network = MaskedNetwork(self.graph.fx_graph, groups.facts, self.cut, {})
        self.mixes = any(network.is_mixed(node) for node in self.graph)
        self.left_out: list[str] = []
        self.base = self._base(example)
        self.dtype = self._dtype()
        self.trials = self._trials(example, seed)

    def _base(self, example: ExampleInputs) -> ExampleInputs:
        """The example with two samples, where the batch is free, and small images, where the graph takes them."""
        batch, small = example.batch_size(), smaller_inputs(self.graph, self.model, example)
        if self.graph.batch_hint is None or not batch or batch == _SAMPLES:
            return small
        few = small.with_batch(_SAMPLES)
        return small if failure_of(self.model, few, "eval") is not None else few

    def _dtype(self) -> torch.dtype:
        own = own_dtype(self.small)
        failure: str | None = None
        for dtype in dict.fromkeys((torch.float64, own)):
            failure = self._failure_of(self.original, dtype)
            if failure is None and (dtype is own or self._failure_of(self.candidate, dtype) is None):
                return dtype
        raise VerificationError(
            f"{self.plan.model_type} itself does not run on the example inputs in eval mode: {failure}. Give the "
            f"inputs that the plan was made with."
        )

    def _failure_of(self, model: nn.Module, dtype: torch.dtype) -> str | None:
        try:
            run_module(model, self.base, dtype)
        except Exception as error:  # a forward may raise anything
            return f"{type(error).__name__}: {first_line(error)[:160]}"
        return None

    def _trials(self, example: ExampleInputs, seed: int) -> list[Trial]:
        tables = table_sizes(self.graph)
        first = Trial(self.base, None, self.dtype)
        if _shapes(self.base) != _shapes(example) and not self.mixes and self.base.batch_size() == _SAMPLES:
            is_small = _shapes(self.base.with_batch(1)) != _shapes(example.with_batch(1))
            first = Trial(example, None, own_dtype(self.small)) if is_small else first
        return [first, self._varied(tables, None, seed), self._drawn(tables, seed + 1)]

    def _drawn(self, tables: dict[int, int], seed: int) -> Trial:
        """A trial with weights drawn anew; with the model's own if it does not give numbers with others."""
        for buffers in (True, False):
            trial = self._varied(tables, self.values.drawn(self.state, seed, buffers=buffers), seed)
            try:
                if self._gives_numbers(trial) and (not self.mixes or self.is_captured(trial)):
                    return trial
            except Exception:  # code of the model may take no other values of what it holds
                continue
        return self._varied(tables, None, seed)

    def _varied(self, tables: dict[int, int], state: State | None, seed: int) -> Trial:
        with given(self.original, self.own(self.original, state), self.caches[0]):
            inputs = varied_inputs(self.base, tables, self._takes, seed)
        return Trial(inputs, state, self.dtype)

    def _takes(self, inputs: ExampleInputs) -> bool:
        return failure_of(self.original, inputs, "eval") is None

    def _gives_numbers(self, trial: Trial) -> bool:
        """Whether the original gives numbers for a trial, or as many of them as for the example."""
        with given(self.original, self.own(self.original, trial.state), self.caches[0]):
            found = _n_bad(run_module(self.original, trial.inputs, trial.dtype).outputs)
        return not found or found <= _n_bad(run_module(self.original, self.base, self.dtype).outputs)

    def own(self, model: nn.Module, state: State | None) -> dict[str, Tensor] | None:
        """Tensors by the names that a model has for them; None for its own."""
        return None if state is None else self.values.named(model, state)

    def is_captured(self, trial: Trial) -> bool:
        """Whether the graph computes what the model does on a trial."""
        with given(self.original, self.own(self.original, trial.state), self.caches[0]):
            dense = run_module(self.original, trial.inputs, trial.dtype).outputs
        with conditions(trial.dtype):
            leaves = leaves_of(in_dtype(trial.inputs, trial.dtype))
            found = output_leaves(graph_output(self.graph.fx_graph, trial.state or self.state, leaves))
        return relative_error(dense, found) <= tolerance(dense)


def _shapes(inputs: ExampleInputs) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in inputs.tensors()]


def _n_bad(outputs: list[object]) -> int:
    """Number of outputs with NaN."""
    return sum(bool(v.isnan().any()) for v in outputs if isinstance(v, Tensor) and v.is_floating_point())
