"""What a proof compares: a model, what a plan made of it, and inputs and weights that exercise both."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchshear.dependency import ChannelGroups, Cut, PruningPlan, dense_cost
from torchshear.errors import VerificationError, first_line
from torchshear.graph import ExampleInputs, Graph, Mode, caches_of, failure_of, output_leaves, zeros_are_exact
from torchshear.graph._run import graph_output
from torchshear.graph.numerics._ties import Choices
from torchshear.speedup.comparing._compare import relative_error, tolerance
from torchshear.speedup.comparing._small_inputs import smaller_inputs
from torchshear.speedup.comparing._varied_inputs import (
    check_examples,
    gives_numbers,
    n_outputs_with_nan,
    table_sizes,
    varied_inputs,
)
from torchshear.speedup.native._attention_scale import share_names
from torchshear.speedup.rewriting._traced import TracedModule
from torchshear.speedup.shrinking._whole_model import TrainingCut
from torchshear.speedup.verification._runs import (
    Run,
    as_it_is,
    conditions,
    given,
    in_dtype,
    leaves_of,
    own_dtype,
    run_module,
    twin_of,
)
from torchshear.speedup.verification._weights import State, Values

_LARGE = 2e9  # multiply-accumulate operations of a sample
_CHOOSING = frozenset({"topk", "sort", "argsort", "max", "min", "argmax", "argmin", "median", "kthvalue"})
_SAMPLES = (3, 2)  # of trials, and of the last, where the batch is free: one number hides wrong sizes, one sample more

Mixing = Literal["no", "exactly", "yes"]


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Inputs, and weights of the original to run them with.

    Attributes:
        inputs: what to run on.
        state: canonical name -> tensor of the original; None for its own.
        dtype: dtype to compute in.
        dense: outputs of the original, uncut; known of the last trial, if operators mix positions.
        is_captured: whether the graph is known to give those.
    """

    inputs: ExampleInputs
    state: State | None
    dtype: torch.dtype
    dense: list[Any] | None = None
    is_captured: bool = False


class Setting:
    """A model and what a plan made of it, and the trials to compare them on.

    Both are run as twins that share their parameters, so that other values can be given to these for a while.

    Attributes:
        original: a twin of the model.
        candidate: a twin of the shrunk model.
        dtype: float64 if both models run in it, else their own.
        mixes: whether operators mix positions of which some are cut: "no", "exactly" where zeros at these do not count
            in any of them, as in a sum, else "yes".
        values: what the cut makes of tensors.
        state: canonical name -> tensor of the original.
        first: the trial with the example.
        second: a trial with other inputs. Of images, these have few pixels where the model takes them.
        is_traced: whether the shrunk model, or a part of it, is traced.
        base: the example, or the like of it that is cheaper to run.
        on_base: what the shrunk model gives on that in float64; None if it does not run in it.
        training: the original in train mode, if it has been captured.
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
        training: TrainingCut | None = None,
    ) -> None:
        check_examples(example)
        self.training = training
        self.plan, self.groups, self.model, self.small = plan, groups, model, small
        self.graph = groups.graph
        self.cut = Cut(groups, plan.kept)
        self.values = Values(groups, self.cut)
        self.caches = caches_of(model, example), caches_of(small, example)
        self.original, self.candidate = twin_of(model, self.caches[0]), twin_of(small, self.caches[1])
        self.state = self.values.of(self.original)
        mixed = [n for n in self.graph if any(self.cut.changes(a) for a in groups.facts.mixed.get(n.name, ()))]
        self.mixes: Mixing = "no" if not mixed else "exactly" if all(map(zeros_are_exact, mixed)) else "yes"
        self.left_out: list[str] = []
        self.is_traced = any(isinstance(module, TracedModule) for module in small.modules())
        self.base = self._base(example)
        self.on_base: Run | None = None
        self.dtype = self._dtype()
        self._seed = seed
        self.first, self.second = self._first_trials(example)

    def _base(self, example: ExampleInputs) -> ExampleInputs:
        """The example with small images, where the graph takes them, and three samples, where the batch is free.

        Of a large model one: three would take three times as long, and the forms of it have been tried with more.
        """
        batch, small = example.batch_size(), example
        if not self.is_traced:  # a traced form has sizes of its own
            small = smaller_inputs(self.graph, self.model, example)
        is_large = small is example and dense_cost(self.graph).macs > _LARGE
        samples = 1 if is_large else _SAMPLES[0]
        if self.graph.batch_hint is None or not batch or batch == samples:
            return small
        few = small.with_batch(samples)
        return small if failure_of(self.model, few, "eval") is not None else few

    def _dtype(self) -> torch.dtype:
        """Float64 if the original runs in it. A native form has its code; a traced one took branches of its own."""
        wide, own = torch.float64, own_dtype(self.small)
        try:
            self.on_base = run_module(self.candidate, self.base, wide)
            if not self.is_traced or self._failure_of_original(wide) is None:
                return wide
            self.on_base = None
        except Exception:  # a forward may raise anything
            if self._failure_of_original(wide) is None:
                return wide
        failure = self._failure_of_original(own)
        if failure is None:
            return own
        raise VerificationError(
            f"{self.plan.model_type} itself does not run on the example inputs in eval mode: {failure}. Give the "
            f"inputs that the plan was made with."
        )

    def _failure_of_original(self, dtype: torch.dtype) -> str | None:
        try:
            run_module(self.original, self.base, dtype)
        except Exception as error:  # a forward may raise anything
            return f"{type(error).__name__}: {first_line(error)[:160]}"
        return None

    def _first_trials(self, example: ExampleInputs) -> tuple[Trial, Trial]:
        first = Trial(self.base, None, self.dtype)
        if self.mixes == "no" and _images(self.base) != _images(example):  # the example itself, once
            first = Trial(example, None, own_dtype(self.small))
        return first, self._varied(None, self._seed)

    @cached_property
    def last(self) -> Trial:
        """A trial with yet other inputs and weights drawn anew, or the model's own if it gives no numbers with others.

        Made when it is asked for: its weights take as much memory as the model's. Where no operator mixes positions,
        what is cut of them is zero.
        """
        seed = self._seed + 1
        for buffers in (True, False):
            drawn = self.values.drawn(self.state, seed, buffers=buffers, whole=share_names(self.model))
            try:
                if self.mixes == "no":
                    trial = self._varied(self.values.masked_drawn(drawn, self.state), seed, _SAMPLES[1])
                    if self._are_numbers(self.shrunk(trial).outputs):
                        return trial
                    continue
                trial = self._varied(drawn, seed, _SAMPLES[1])
                trial = replace(trial, dense=self.dense(trial))
                if self._are_numbers(trial.dense or []) and self.is_captured(trial):
                    return replace(trial, is_captured=True)
            except Exception:  # code of the model may take no other values of what it holds
                continue
        trial = self._varied(None, seed, _SAMPLES[1])
        return trial if self.mixes == "no" else replace(trial, dense=self.dense(trial))

    def masked(self, trial: Trial) -> State:
        """The tensors of a trial with zeros at all that is cut."""
        if trial.state is not None and self.mixes == "no":
            return trial.state
        return self.values.masked(trial.state or self.state)

    def _varied(self, state: State | None, seed: int, samples: int | None = None) -> Trial:
        base = self.base
        if samples is not None and self.graph.batch_hint is not None and base.batch_size() == _SAMPLES[0]:
            base = base.with_batch(samples)
        with given(self.original, self.own(self.original, state), self.caches[0]):
            inputs = varied_inputs(base, table_sizes(self.graph), self._takes, seed)
        return Trial(inputs, state, self.dtype)

    def beside(self, trial: Trial) -> Trial:
        """The last trial with yet other inputs."""
        return replace(trial, inputs=self._varied(trial.state, 7, _SAMPLES[1]).inputs)

    def _takes(self, inputs: ExampleInputs) -> bool:
        return gives_numbers(self.original, inputs, self.base)

    def dense(self, trial: Trial, mode: Mode = "eval") -> list[Any]:
        """Outputs of the original, uncut."""
        with given(self.original, self.own(self.original, trial.state), self.caches[0]):
            return run_module(self.original, trial.inputs, trial.dtype, mode).outputs

    def shrunk(self, trial: Trial, mode: Mode = "eval", *, gradients: bool = False) -> Run:
        """What the shrunk model gives."""
        state = None if trial.state is None else self.values.sliced(trial.state)
        with given(self.candidate, self.own(self.candidate, state), self.caches[1]):
            take = as_it_is if gradients else None
            return run_module(self.candidate, trial.inputs, trial.dtype, mode, take=take)

    def _are_numbers(self, outputs: list[Any]) -> bool:
        """Whether outputs with other weights are numbers, or as many of them as for the example."""
        n_bad = n_outputs_with_nan(outputs)
        return not n_bad or n_bad <= n_outputs_with_nan(self.dense(Trial(self.base, None, self.dtype)))

    def own(self, model: nn.Module, state: State | None) -> dict[str, Tensor] | None:
        """Tensors by the names that a model has for them; None for its own."""
        return None if state is None else self.values.named(model, state)

    def is_captured(self, trial: Trial) -> bool:
        """Whether the graph computes what the model does on a trial, if it chooses alike among equal values."""
        choices = Choices()
        with choices.kept():
            dense = self.dense(trial) if trial.dense is None or _chooses(self.graph) else trial.dense
        limit = tolerance(dense)
        with conditions(trial.dtype), choices.followed(limit):
            leaves = leaves_of(in_dtype(trial.inputs, trial.dtype))
            found = output_leaves(graph_output(self.graph.fx_graph, trial.state or self.state, leaves))
        return relative_error(dense, found) <= limit


def _chooses(graph: Graph) -> bool:
    """Whether positions are chosen by the order of values, as by top-k."""
    names = (str(node.target).split(".") for node in graph if node.op == "call_function")
    return any(len(name) == 3 and name[1] in _CHOOSING for name in names)


def _images(inputs: ExampleInputs) -> list[tuple[int, ...]]:
    """Sizes of the images among the inputs."""
    return [tuple(tensor.shape[-2:]) for tensor in inputs.tensors() if tensor.ndim > 3]
