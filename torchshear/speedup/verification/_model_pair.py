"""A model and its shrunk version, with inputs and weights on which a difference between them shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import VerificationError, WeightError, first_line
from torchshear.graph import ExampleInputs
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import graph_output, run_failure
from torchshear.graph.masked._call import zeros_are_exact
from torchshear.graph.model._state import Mode, find_caches
from torchshear.graph.numerics._ties import TieBreaker
from torchshear.speedup._random_values import (
    check_examples,
    gives_numbers,
    n_outputs_with_nan,
    random_inputs,
    smaller_inputs,
    table_sizes,
)
from torchshear.speedup._relative_error import relative_error, tolerance
from torchshear.speedup.native._attention_scale import share_names
from torchshear.speedup.rewriting._slicing import slice_state
from torchshear.speedup.rewriting._traced import TracedModule
from torchshear.speedup.shrinking._whole_model import TrainingCut
from torchshear.speedup.verification._runs import (
    ModelRun,
    copy_inputs,
    copy_sharing_values,
    dtype_of,
    equal_conditions,
    flat_inputs,
    run_module,
    use_values,
)
from torchshear.speedup.verification._state_cut import State, StateCut

_LARGE = 2e9  # multiply-accumulate operations of a sample
_CHOOSING = frozenset({"topk", "sort", "argsort", "max", "min", "argmax", "argmin", "median", "kthvalue"})
# Batch sizes, where the batch is free: two of them, since a wrong size may be right for one, and none of them 1.
_SAMPLES, _SAMPLES_OF_LAST = 3, 2

CrossChannel = Literal["none", "exact", "inexact"]


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Inputs, and weights of the original, on which both models are run.

    Attributes:
        inputs: inputs of the run.
        state: canonical name -> tensor of the original; None for its own.
        dtype: dtype to compute in.
        dense: flat outputs of the original, uncut; known of the last probe, if there are cross-channel operators.
        is_captured: whether the captured graph is known to compute `dense`.
    """

    inputs: ExampleInputs
    state: State | None
    dtype: torch.dtype
    dense: list[Any] | None = None
    is_captured: bool = False


class ModelPair:
    """A model, what a plan made of it, and the probes to compare them on.

    Both are run as twins that share the values of their parameters, so that a run can use other values.

    Attributes:
        model: the model.
        original: its twin.
        small: the shrunk model.
        candidate: its twin.
        plan: the plan between them.
        groups: the analysed network.
        graph: its captured graph.
        cut: the units that are removed.
        state_cut: the same for tensors.
        state: canonical name -> tensor of the original.
        caches: attributes in which the original, and the shrunk model, keep values computed from weights.
        training: the original captured in train mode, if it has been.
        cross_channel: whether operators compute over an axis that is cut, as norms, softmax and sums do: "exact" if
            zeros at cut positions change the result of none of them, as of a sum, else "inexact".
        is_traced: whether the shrunk model, or a part of it, is in traced form.
        dtype: float64 if both models run in it, else their own.
        first: the probe with the example.
        first_run: the run of the shrunk model on it, if it has been run already.
        second: a probe with other inputs; images of few pixels where the model takes them.
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
        self.state_cut = StateCut(groups, self.cut)
        self.caches = find_caches(model, example), find_caches(small, example)
        self.original = copy_sharing_values(model, self.caches[0])
        self.candidate = copy_sharing_values(small, self.caches[1])
        self.state = self.state_cut.state_of(self.original)
        mixing = [n for n in self.graph if any(self.cut.changes(a) for a in groups.facts.cross_channel.get(n.name, ()))]
        is_exact = all(map(zeros_are_exact, mixing))
        self.cross_channel: CrossChannel = "none" if not mixing else "exact" if is_exact else "inexact"
        self.left_out: list[str] = []
        self.is_traced = any(isinstance(module, TracedModule) for module in small.modules())
        # Small images where the graph takes them; a traced form has sizes of its own.
        small_inputs = example if self.is_traced else smaller_inputs(self.graph, model, example)
        self._base = self._with_few_samples(small_inputs, is_small=small_inputs is not example)
        self._run_on_base: ModelRun | None = None
        self.dtype = self._comparison_dtype()
        self._seed = seed
        self.first = Probe(self._base, None, self.dtype)
        if self.cross_channel == "none" and small_inputs is not example:  # the example itself, once
            self.first = Probe(example, None, dtype_of(small))
        self.first_run = self._run_on_base if self.first.inputs is self._base else None
        self.second = self._random_probe(None, seed)

    def _with_few_samples(self, example: ExampleInputs, *, is_small: bool) -> ExampleInputs:
        """Repeat or cut the example to three samples, where the batch is free.

        Of a large model one: three would take three times as long, and its form has been tried with more.
        """
        batch = example.batch_size()
        samples = 1 if not is_small and dense_cost(self.graph).macs > _LARGE else _SAMPLES
        if self.graph.batch_hint is None or not batch or batch == samples:
            return example
        few = example.with_batch(samples)
        return example if run_failure(self.model, few, "eval") is not None else few

    def _comparison_dtype(self) -> torch.dtype:
        """Return float64 if both models run in it, else their own dtype.

        A native form has the code of the original. A traced one has only the branches that the original took in its own
        dtype, so that the original has to be run as well.
        """
        failure = ""
        try:
            self._run_on_base = run_module(self.candidate, self._base, torch.float64)
            if not self.is_traced:
                return torch.float64
        except Exception:  # a forward may raise anything
            self._run_on_base = None
        for dtype in (torch.float64, dtype_of(self.small)):
            try:
                run_module(self.original, self._base, dtype)
                return dtype
            except Exception as error:  # a forward may raise anything
                failure = f"{type(error).__name__}: {first_line(error)[:160]}"
                self._run_on_base = None
        raise VerificationError(
            f"{self.plan.model_type} itself does not run on the example inputs in eval mode: {failure}. Give the "
            f"inputs that the plan was made with."
        )

    def _random_probe(self, state: State | None, seed: int, samples: int = _SAMPLES) -> Probe:
        """Make a probe with random inputs, of so many samples where the batch is free."""
        base = self._base
        if samples != _SAMPLES and self.graph.batch_hint is not None and base.batch_size() == _SAMPLES:
            base = base.with_batch(samples)
        with self.original_with(state):
            takes = partial(gives_numbers, self.original, example=self._base)
            inputs = random_inputs(base, table_sizes(self.graph), takes, seed)
        return Probe(inputs, state, self.dtype)

    @cached_property
    def last(self) -> Probe:
        """A probe with other inputs and random weights; with the model's own if it gives no numbers with random ones.

        It is made when it is first read: its weights take as much memory as the model's. Where there are no
        cross-channel operators, cut positions of its weights are zero.
        """
        seed, is_masked = self._seed + 1, self.cross_channel == "none"
        for buffers in (True, False):
            fixed = share_names(self.model)
            random: State = self.state_cut.random_state(self.state, seed, buffers=buffers, fixed=fixed)
            try:
                if is_masked:
                    random = self.state_cut.mask(random, originals=self.state)
                probe = self._random_probe(random, seed, _SAMPLES_OF_LAST)
                if is_masked:
                    if self._are_numbers(self.run_small(probe).outputs):
                        return probe
                    continue
                probe = replace(probe, dense=self.run_original(probe))
                if self._are_numbers(probe.dense or []) and self.is_captured(probe):
                    return replace(probe, is_captured=True)
            except Exception:  # code of the model may take no other values of what it holds
                continue
        probe = self._random_probe(None, seed, _SAMPLES_OF_LAST)
        return probe if is_masked else replace(probe, dense=self.run_original(probe))

    def with_other_inputs(self, probe: Probe) -> Probe:
        """Return the last probe with yet other inputs."""
        return replace(probe, inputs=self._random_probe(probe.state, 7, _SAMPLES_OF_LAST).inputs)

    def _are_numbers(self, outputs: list[Any]) -> bool:
        """Check that outputs with random weights hold no NaN, or no more of them than outputs for the example."""
        n_bad = n_outputs_with_nan(outputs)
        return not n_bad or n_bad <= n_outputs_with_nan(self.run_original(Probe(self._base, None, self.dtype)))

    @contextmanager
    def original_with(self, state: State | None) -> Iterator[None]:
        """Have the original compute with other tensors, by canonical name, for a while; None changes nothing."""
        values = None if state is None else self.state_cut.names_in(self.original, state)
        with use_values(self.original, values, self.caches[0]):
            yield

    def run_original(self, probe: Probe, mode: Mode = "eval") -> list[Any]:
        """Return the flat outputs of the original, uncut."""
        with self.original_with(probe.state):
            return run_module(self.original, probe.inputs, probe.dtype, mode).outputs

    def run_small(self, probe: Probe, mode: Mode = "eval", *, gradients: bool = False) -> ModelRun:
        """Run the shrunk model, with the kept positions of the probe's weights."""
        values = None
        if probe.state is not None:
            values = self.state_cut.names_in(self.candidate, slice_state(self.cut, probe.state))
        with use_values(self.candidate, values, self.caches[1]):
            select = (lambda _, gradient: gradient) if gradients else None
            return run_module(self.candidate, probe.inputs, probe.dtype, mode, select_gradient=select)

    def is_captured(self, probe: Probe) -> bool:
        """Check that the captured graph computes on a probe what the original does.

        Where positions are chosen by the order of values, as by top-k, it chooses as the original does among equal
        values.
        """
        names = (str(node.target).split(".") for node in self.graph if node.op == "call_function")
        is_choosing = any(len(name) == 3 and name[1] in _CHOOSING for name in names)
        choices = TieBreaker()
        with choices.record():
            dense = self.run_original(probe) if probe.dense is None or is_choosing else probe.dense
        limit = tolerance(dense)
        with equal_conditions(probe.dtype), choices.replay(limit):
            leaves = flat_inputs(copy_inputs(probe.inputs, probe.dtype))
            found = output_leaves(graph_output(self.graph.fx_graph, probe.state or self.state, leaves))
        return relative_error(dense, found) <= limit

    def check_comparable(self, probe: Probe) -> None:
        """See that a model could be equal to the original at all.

        Attributes and buffers are put back after every run, so that a model that counts its runs can be compared. State
        elsewhere is not.

        Raises:
            WeightError: parameters are NaN or infinite.
            VerificationError: a second run of the original on the same inputs gives something else.
        """
        for name, tensor in self.state.items():
            is_weight = self.graph.state[name].kind == "parameter" and tensor.is_floating_point()
            n_bad = int((~tensor.isfinite()).sum()) if is_weight else 0
            if n_bad:
                raise WeightError(f"{name!r} is NaN or infinite in {n_bad} places; load the trained weights.")
        runs = [self.run_original(probe) for _ in range(2)]
        error = relative_error(*runs)
        if error > tolerance(runs[0]):
            raise VerificationError(
                f"{self.plan.model_type} is stateful: two runs of the model on the same inputs differ by {error:.2g} "
                f"relative, since its forward changes something outside its attributes and buffers. Nothing can be "
                f"compared with it; keep that in an attribute, or prune the model without it."
            )
