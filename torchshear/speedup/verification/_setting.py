"""What a proof compares: copies of both models in one dtype, and inputs and weights that exercise them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchshear.dependency import ChannelGroups, Cut, PruningPlan
from torchshear.errors import VerificationError, first_line
from torchshear.graph import ExampleInputs, Graph, caches_of, failure_of, output_leaves
from torchshear.graph._run import graph_output
from torchshear.speedup._compare import relative_error, tolerance
from torchshear.speedup._varied_inputs import check_examples, table_sizes, varied_inputs
from torchshear.speedup.verification._runs import (
    Run,
    conditions,
    fresh_copy,
    given,
    in_dtype,
    leaves_of,
    own_dtype,
    run_module,
)
from torchshear.speedup.verification._weights import State, Values

_MOST_SAMPLES = 2  # samples of a trial where the batch is free


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Inputs, and weights of the original to run them with.

    Attributes:
        inputs: what to run on.
        state: canonical name -> tensor of the original; None for its own.
        dense: what the original gives, uncut.
    """

    inputs: ExampleInputs
    state: State | None
    dense: Run


class Setting:
    """Copies of a model and of what a plan made of it, and the trials to compare them on.

    Attributes:
        original: a copy of the model, in `dtype`.
        candidate: a copy of the shrunk model, in `dtype`.
        dtype: float64 if both models run in it, else their own.
        values: what the cut makes of tensors.
        state: canonical name -> tensor of the original.
        trials: the example; other inputs; and yet others, with weights drawn anew where the original takes them.
        has_gradients: whether the original can be run with gradients.
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
        self.cut = Cut(groups, plan.kept)
        self.values = Values(groups, self.cut)
        self.graph = groups.graph
        self.example = _few_samples(model, example, groups.graph)
        self.caches = caches_of(model, self.example), caches_of(small, self.example)
        self._choose_dtype()
        self.state = self.values.of(self.original, self.dtype)
        self.left_out: list[str] = []
        self.trials = self._trials(seed)
        self.has_gradients = self._has_gradients()

    def _choose_dtype(self) -> None:
        """Copies in float64 if both models run in it, else in their own dtype."""
        own = own_dtype(self.small)
        for dtype in dict.fromkeys((torch.float64, own)):
            self.dtype = dtype
            self.original = fresh_copy(self.model, self.example, dtype)
            self.candidate = fresh_copy(self.small, self.example, dtype)
            failure = self._failure_of(self.original) or self._failure_of(self.candidate)
            if failure is None:
                return
        failure = self._failure_of(self.original)
        if failure is not None:
            raise VerificationError(
                f"{self.plan.model_type} itself does not run on the example inputs in eval mode: {failure}. Give the "
                f"inputs that the plan was made with."
            )

    def _failure_of(self, model: nn.Module) -> str | None:
        try:
            run_module(model, self.example, self.dtype)
        except Exception as error:  # a forward may raise anything
            return f"{type(error).__name__}: {first_line(error)[:160]}"
        return None

    def _trials(self, seed: int) -> list[Trial]:
        """The example; other inputs; and yet others with weights drawn anew, where the original gives numbers."""
        tables = table_sizes(self.graph)
        trials = [Trial(self.example, None, run_module(self.original, self.example, self.dtype))]
        trials.append(self._varied(tables, None, seed))
        for buffers in (True, False):
            try:
                drawn = self._varied(tables, self.values.drawn(self.state, seed + 1, buffers=buffers), seed + 1)
            except Exception:  # code of the model may take no other values of what it holds
                continue
            if n_bad(drawn.dense) <= n_bad(trials[0].dense) and self.is_captured(drawn):
                return [*trials, drawn]
        return [*trials, self._varied(tables, None, seed + 1)]

    def _varied(self, tables: dict[int, int], state: State | None, seed: int) -> Trial:
        with given(self.original, self.own(self.original, state), self.caches[0]):
            inputs = varied_inputs(self.example, tables, self._gives_numbers, seed)
            return Trial(inputs, state, run_module(self.original, inputs, self.dtype))

    def _gives_numbers(self, inputs: ExampleInputs) -> bool:
        """Whether the original takes some inputs and gives numbers for them."""
        try:
            return n_bad(run_module(self.original, inputs, self.dtype)) == 0
        except Exception:  # a forward may raise anything
            return False

    def own(self, model: nn.Module, state: State | None) -> dict[str, Tensor] | None:
        """Tensors by the names that a model has for them; None for its own."""
        return None if state is None else self.values.named(model, state)

    def _has_gradients(self) -> bool:
        """Whether the original can be run with gradients; an operator of the user's need not have a derivative."""
        try:
            return run_module(self.original, self.trials[-1].inputs, self.dtype, gradients=True).gradients is not None
        except Exception as error:  # a forward may raise anything
            self.left_out.append(f"gradients: the original has none: {first_line(error)[:160]}")
            return False

    def is_captured(self, trial: Trial) -> bool:
        """Whether the graph computes what the model does on a trial."""
        state = trial.state or self.state
        with conditions(self.dtype):
            output = graph_output(self.graph.fx_graph, state, leaves_of(in_dtype(trial.inputs, self.dtype)))
        return relative_error(trial.dense.outputs, output_leaves(output)) <= tolerance(trial.dense.outputs)


def _few_samples(model: nn.Module, example: ExampleInputs, graph: Graph) -> ExampleInputs:
    """The example with two samples where the batch is free: fewer hide how samples are told apart."""
    batch = example.batch_size()
    if graph.batch_hint is None or not batch or batch == _MOST_SAMPLES:
        return example
    few = example.with_batch(_MOST_SAMPLES)
    return example if failure_of(model, few, "eval") is not None else few


def n_bad(run: Run) -> int:
    """Number of outputs with NaN."""
    return sum(bool(v.isnan().any()) for v in run.outputs if isinstance(v, Tensor) and v.is_floating_point())
