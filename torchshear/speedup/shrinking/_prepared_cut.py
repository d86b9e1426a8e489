"""The network that a plan is for, checked against a model, and the cut of it, with tensors before and after."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import Form
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.dependency.plans._tensor_plans import check_consistency
from torchshear.dependency.rules._read_values import differing_value, readable_values
from torchshear.errors import ArgumentError, PlanError
from torchshear.graph import ExampleInputs, Graph
from torchshear.graph._graph import PartRun, whole_model
from torchshear.graph.capture._recording import record_parts
from torchshear.graph.capture._trace import trace_inputs
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._meta import is_on_meta
from torchshear.speedup.native._form import Native, native_form
from torchshear.speedup.native._reference_run import Original
from torchshear.speedup.rewriting._slicing import slice_state


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCut:
    """A checked cut of a captured model.

    Attributes:
        original: the captured model, or the captured calls of its parts.
        plan: the plan.
        cut: the plan in terms of the network's axes.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.
    """

    original: Original
    plan: PruningPlan
    cut: Cut
    tensors: dict[str, Tensor]
    sliced: dict[str, Tensor]

    @classmethod
    def of(cls, run: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> "PreparedCut":
        """Prepare the cut of a plan.

        Raises:
            PlanError: the plan does not fit the groups.
        """
        tensors = tensors_of(whole_model(run), groups.graph)
        cut = Cut(groups, plan.kept)
        return cls(Original(run, groups.graph), plan, cut, tensors, slice_state(cut, tensors))

    def with_plan(self, plan: PruningPlan) -> "PreparedCut":
        """Prepare the cut of another plan of the same model."""
        cut = Cut(self.cut.groups, plan.kept)
        return PreparedCut(self.original, plan, cut, self.tensors, slice_state(cut, self.tensors))

    def find_native(self) -> Native:
        """Find the native form, which needs values to compare, or the reason why there is none."""
        if is_on_meta(self.original.model):
            reason = "without values on the meta device, its own forward cannot be compared with the rewritten graph"
            return Native(None, Form("traced", reason))
        return native_form(self.original, self.cut, self.tensors, self.sliced)


def tensors_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """Return a model's tensors by canonical name; constants, and buffers that are caches, as the graph holds them."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {name: named.get(name, entry.tensor) for name, entry in graph.state.items()}
    return {n: t if t.shape == graph.state[n].tensor.shape else graph.state[n].tensor for n, t in own.items()}


def analyze_planned(
    model: nn.Module, plan: PruningPlan, args: tuple[Any, ...] | Tensor | None, kwargs: Mapping[str, Any] | None
) -> ChannelGroups:
    """Return the analysed network of a plan for a model: at hand if the plan was made for this very model, else traced.

    Raises:
        PlanError: the model is not the one that the plan was made for.
    """
    check_module(model)
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(
            f"plan is {type(plan).__name__}; expected a PruningPlan, from torchshear.plan or PruningPlan.load."
        )
    model = whole_model(model)
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    known = plan.analysis.graph.state.items() if plan.analysis is not None else ()
    parameters = [named.get(name) is entry.tensor for name, entry in known if entry.kind == "parameter"]
    if plan.analysis is not None and parameters and all(parameters):
        groups = plan.analysis
    else:
        groups = _analyze_for(plan, model, named, args, kwargs)
    # The buffers that decide which channels go together have to hold what the plan was made with.
    wrong = differing_value(plan.values, readable_values(groups.graph, tensors_of(model, groups.graph)))
    if wrong is not None:
        raise PlanError(
            f"{wrong} in this {type(model).__name__}; the plan was made with other values, which decide what channels "
            f"go together. Load the buffers that the plan was made with, or make a new plan for this model."
        )
    check_consistency(plan.kept, plan.state, groups)
    return groups


def _analyze_for(
    plan: PruningPlan,
    model: nn.Module,
    named: Mapping[str, Tensor],
    args: tuple[Any, ...] | Tensor | None,
    kwargs: Mapping[str, Any] | None,
) -> ChannelGroups:
    """Trace and analyse a model that a plan is for.

    Raises:
        PlanError: it has other parameters, or another graph, than the model of the plan.
    """
    for name, entry in plan.state.items():
        shape = tuple(named[name].shape) if name in named else None
        if shape != entry.shape:
            raise PlanError(
                f"the plan is for {plan.model_type}, where {name!r} has shape {entry.shape}; in "
                f"{type(model).__name__} it {f'has shape {shape}' if shape else 'does not exist'}. Expected an "
                f"unpruned model of the same class and configuration."
            )
    run, inputs = planned_run(model, plan, args, kwargs)
    groups = analyze(trace_inputs(run, inputs), plan.prunable_outputs)
    if groups.graph.fingerprint != plan.fingerprint:
        raise PlanError(
            f"the plan is for {plan.model_type} with graph {plan.fingerprint[:12]}; {type(model).__name__} has graph "
            f"{groups.graph.fingerprint[:12]}. Expected the same class, configuration and torch version as when the "
            f"plan was made; make a new plan for this model."
        )
    return groups


def planned_run(
    model: nn.Module, plan: PruningPlan, args: tuple[Any, ...] | Tensor | None, kwargs: Mapping[str, Any] | None
) -> tuple[nn.Module, ExampleInputs]:
    """Return the model or the parts that a plan is for, with example inputs: the given ones, or those of the plan.

    Raises:
        ArgumentError: no inputs are given, and the plan does not describe its own.
        CaptureError: the model has parts and does not run on the given inputs.
    """
    model = whole_model(model)
    run = model if plan.parts is None else PartRun(model, plan.parts)
    if args is None and kwargs is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        known = plan.analysis.graph.inputs if plan.analysis is not None else None
        if known is not None and (plan.inputs is None or all(tensor.device == device for tensor in known.tensors())):
            return run, known
        if plan.inputs is None:
            raise ArgumentError("the plan does not describe its example inputs; give them as args and kwargs.")
        return run, ExampleInputs.from_json(plan.inputs, device)
    given = ExampleInputs.of(() if args is None else args, kwargs)
    return (run, given) if plan.parts is None else record_parts(model, plan.parts.names, given)
