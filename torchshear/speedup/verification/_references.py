"""The two references of a proof: the user's module with masked parameters, and the network on fewer channels."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from torchshear.dependency.groups._analyze import relate_graph
from torchshear.dependency.plans._cut import Cut
from torchshear.errors import CaptureError, PlanError, VerificationError, first_line
from torchshear.graph._location import locate
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import graph_values
from torchshear.graph.capture._trace import capture_in_mode
from torchshear.graph.model._state import Mode
from torchshear.speedup._relative_error import relative_error, tolerance
from torchshear.speedup.rewriting._rewrite import rewrite_graph
from torchshear.speedup.rewriting._slicing import map_axes, select_kept, slice_state
from torchshear.speedup.rewriting._traced import TracedModule
from torchshear.speedup.shrinking._whole_model import capture_training_cut
from torchshear.speedup.verification._masked_network import MaskedNetwork
from torchshear.speedup.verification._model_pair import ModelPair, Probe
from torchshear.speedup.verification._runs import (
    ModelRun,
    copy_inputs,
    detach_outputs,
    equal_conditions,
    flat_inputs,
    gradients_of,
    run_module,
    slice_outputs,
)
from torchshear.speedup.verification._state_cut import StateCut


class Reference(ABC):
    """A model of full size that computes what the shrunk model has to compute.

    Args:
        pair: the models.

    Attributes:
        is_graph: whether it computes by the captured graph.
        pair: the models.
        excused: name of a call -> its place, for calls whose operator sees kept positions only.
        has_gradients: whether it can be run with gradients; an operator need not have a derivative.
    """

    is_graph: ClassVar[bool]

    def __init__(self, pair: ModelPair) -> None:
        self.pair = pair
        self.excused: dict[str, str] = {}
        lost = pair.graph.lost_backwards
        self.has_gradients = not (lost and (self.is_graph or pair.is_traced))
        if not self.has_gradients:
            pair.left_out.append(f"gradients: a graph does not hold the backward of {lost[0]}")

    @abstractmethod
    def run(self, probe: Probe) -> ModelRun:
        """Run in eval mode without gradients."""

    @abstractmethod
    def run_probes(self) -> list[ModelRun]:
        """Run in eval mode on the three probes of the pair, on the last one with gradients."""

    @abstractmethod
    def run_in_training(self, in_eval: list[ModelRun]) -> ModelRun | None:
        """Run in train mode on the last probe.

        Args:
            in_eval: the run on that probe in eval mode; removed, since its gradients take as much memory as the model.

        Returns:
            The run; None where nothing can be compared, with the reason in `pair.left_out`.
        """

    @abstractmethod
    def run_recaptured(self, probe: Probe) -> ModelRun:
        """Run as the original computes now, with other attributes than in the capture."""

    def run_with_gradients(self, run: Callable[[bool], ModelRun]) -> ModelRun:
        """Call `run(gradients)` with gradients, or without if there are none, and note which it was."""
        if not self.has_gradients:
            return run(False)
        try:
            found = run(True)
        except (RuntimeError, NotImplementedError, CaptureError) as error:
            found = run(False)
            self.pair.left_out.append(f"gradients: the original has none: {first_line(error)[:160]}")
        self.has_gradients = found.gradients is not None
        return found

    def select_outputs(self, outputs: list[Any], mode: Mode) -> list[Any]:
        """Return the outputs at kept positions; those of eval mode unless the plan knows both modes."""
        return slice_outputs(self.pair.plan, outputs, "eval" if self.pair.graph.training is None else mode)

    def can_train(self) -> bool:
        """Check that the shrunk model has a train mode; if not, note it."""
        traced = [module for module in self.pair.small.modules() if isinstance(module, TracedModule)]
        has_mode = all("train" in call.forwards for module in traced for call in module._calls)
        if not has_mode:
            self.pair.left_out.append("train mode: the traced form has no graph for it")
        return has_mode


class ModuleReference(Reference):
    """The user's own module with its cut parameters set to zero."""

    is_graph = False

    def run(self, probe: Probe, mode: Mode = "eval", *, gradients: bool = False) -> ModelRun:
        """Run in a mode, with gradients if that is asked for."""
        pair = self.pair
        is_masked = probe.state is not None and pair.cross_channel == "none"
        state = probe.state if is_masked else pair.state_cut.mask(probe.state or pair.state)
        outputs = partial(self.select_outputs, mode=mode)
        gradient = pair.state_cut.slice_gradient if gradients else None
        with pair.original_with(state):
            return run_module(pair.original, probe.inputs, probe.dtype, mode, outputs, gradient)

    def run_probes(self) -> list[ModelRun]:
        """Run in eval mode on the three probes of the pair, on the last one with gradients."""
        pair = self.pair
        runs = [self.run(pair.first), self.run(pair.second)]
        return [*runs, self.run_with_gradients(lambda gradients: self.run(pair.last, gradients=gradients))]

    def run_in_training(self, in_eval: list[ModelRun]) -> ModelRun | None:
        """Run in train mode on the last probe."""
        in_eval.clear()
        if not self.can_train():
            return None
        try:
            return self.run(self.pair.last, "train", gradients=self.has_gradients)
        except Exception as error:  # a forward may raise anything
            self.pair.left_out.append(f"train mode: the original does not run in it: {first_line(error)[:160]}")
            return None

    def run_recaptured(self, probe: Probe) -> ModelRun:
        """Run as the original computes now."""
        return self.run(probe)


class NetworkReference(Reference):
    """The original graph with masked parameters, whose cross-channel operators see kept positions only."""

    is_graph = True

    def run(self, probe: Probe) -> ModelRun:
        """Run in eval mode without gradients."""
        return self._run([probe], self.pair.state_cut)[0]

    def run_probes(self) -> list[ModelRun]:
        """Run in eval mode on the three probes of the pair, on the last one with gradients.

        The first two run side by side, which checks the positions that are said to be cut. The last one checks that the
        captured graph computes, uncut, what the model does.

        Raises:
            VerificationError: the graph does not.
            WeightError: nor could it, since the model's weights are NaN or infinite.
        """
        pair = self.pair
        runs = self._run([pair.first, pair.second], pair.state_cut)
        if not pair.last.is_captured and not pair.is_captured(pair.last):
            pair.check_comparable(pair.last)
            raise VerificationError(
                f"the captured graph is not the model: on inputs of the shapes of the example they differ. The forward "
                f"of {pair.plan.model_type} depends on what a graph cannot hold, such as values of its inputs in "
                f"Python."
            )
        last = self.run_with_gradients(lambda grad: self._run([pair.last], pair.state_cut, gradients=grad)[0])
        return [*runs, last]

    def run_in_training(self, in_eval: list[ModelRun]) -> ModelRun | None:
        """Run in train mode on the last probe."""
        pair, probe = self.pair, self.pair.last
        same = in_eval.pop()
        if not self.can_train():
            return None
        try:
            dense = pair.run_original(probe, "train")
        except Exception as error:  # a forward may raise anything
            pair.left_out.append(f"train mode: the original does not run in it: {first_line(error)[:160]}")
            return None
        if relative_error(probe.dense or [], dense) <= tolerance(dense):
            return same  # the original computes the same in both modes, and so does the network
        try:
            training = pair.training or capture_training_cut(pair.model, pair.graph, pair.cut)
        except (CaptureError, PlanError) as error:
            pair.left_out.append(f"train mode: {first_line(error)[:160]}")
            return None
        graph = replace(training.graph, state={**training.graph.state, **pair.graph.state})
        state_cut = StateCut(replace(training.cut.groups, graph=graph, facts=training.facts), training.cut)
        return self._run([probe, pair.with_other_inputs(probe)], state_cut, gradients=self.has_gradients)[0]

    def run_recaptured(self, probe: Probe) -> ModelRun:
        """Run by a new capture of the original."""
        pair = self.pair
        groups = relate_graph(pair.groups, capture_in_mode(pair.original, pair.graph.inputs, "eval"))
        state_cut = StateCut(groups, Cut(groups, pair.plan.kept))
        return self._run([probe, pair.with_other_inputs(probe)], state_cut)[0]

    def _run(self, probes: Sequence[Probe], state_cut: StateCut, *, gradients: bool = False) -> list[ModelRun]:
        """Run the masked network on probes that share their weights; gradients are those of the first."""
        graph, probe = state_cut.groups.graph, probes[0]
        own = probe.state or self.pair.state
        masked = state_cut.mask({name: own.get(name, entry.tensor) for name, entry in graph.state.items()})
        parameters = {
            name: tensor.detach().requires_grad_()
            for name, tensor in masked.items()
            if gradients and tensor.is_floating_point() and graph.state[name].kind == "parameter"
        }
        facts, state = state_cut.groups.facts, {**masked, **parameters}
        network = MaskedNetwork(graph.fx_graph, facts, state_cut.cut, state, self.excused)
        inputs = [flat_inputs(copy_inputs(one.inputs, probe.dtype)) for one in probes]
        with equal_conditions(probe.dtype, gradients=gradients):
            ((_, outputs),) = deque(network.values(inputs), maxlen=1)  # of the last node; others are not kept
            kept = [self.select_outputs(output_leaves(one), graph.mode) for one in outputs]
            found = gradients_of(kept[0], parameters, state_cut.slice_gradient) if gradients else None
        return [ModelRun(detach_outputs(one), found) for one in kept]


def describe_difference(pair: ModelPair, probe: Probe, error: float) -> str:
    """Run the masked and the rewritten graph side by side, and name the first value that differs.

    Args:
        pair: the models.
        probe: inputs and weights on which they differ.
        error: relative difference of their outputs.
    """
    graph, facts, cut, state = pair.graph.fx_graph, pair.groups.facts, pair.cut, probe.state or pair.state
    inputs = copy_inputs(probe.inputs, probe.dtype)
    network = MaskedNetwork(graph, facts, cut, pair.state_cut.mask(state))
    with equal_conditions(probe.dtype):
        small = graph_values(rewrite_graph(graph, facts, cut), slice_state(cut, state), flat_inputs(inputs.copy()))
        actual = {node.name: value for node, value in _values_until_failure(small)}
        for node, (value,) in _values_until_failure(network.values([flat_inputs(inputs.copy())])):
            if node.name not in actual:
                return f"the rewritten graph fails at {node.name!r}, {locate(node)}: its operator rule is wrong."
            try:
                kept = map_axes(lambda tensor, own: select_kept(tensor, own, cut), value, facts.axes.get(node.name))
            except (IndexError, RuntimeError):
                return f"{node.name!r}, {locate(node)}, has other axes than its operator rule says."
            if node.op == "call_function" and isinstance(kept, Tensor) and kept.is_floating_point():
                difference = relative_error([kept], [actual[node.name]])
                if difference > tolerance([kept]):
                    return (
                        f"the shrunk model differs from the masked model by {error:.2g} relative. The first value that "
                        f"differs is {node.name!r}, {locate(node)}, by {difference:.2g}. Expected at most "
                        f"{tolerance([kept]):.0e}: the rule of that operator does not describe this call."
                    )
    return (
        f"the shrunk model differs from the masked model by {error:.2g} relative, though its graph does not: the model "
        f"given is not what the plan makes of the original. Shrink the original with this plan again."
    )


def _values_until_failure(values: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yield nodes with their values; the node after the last one is the one that fails."""
    try:
        yield from values
    except (RuntimeError, TypeError, ValueError, IndexError, VerificationError):
        return
