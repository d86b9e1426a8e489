"""Shrink parts of a model in place: a copy of the whole model, in which each part is smaller."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import ChannelGroups, Cut, PruningPlan
from torchshear.dependency._analysis import with_graph
from torchshear.errors import CaptureError, PlanError
from torchshear.graph import ExampleInputs, Graph, PartRun, Parts, copy_model, trace_inputs, whole_of
from torchshear.speedup._lost_backwards import check_backwards, lost_backwards, untrainable
from torchshear.speedup._native_form import own_constants
from torchshear.speedup._rewrite import rewrite_graph
from torchshear.speedup._shrink import (
    Shrunk,
    in_mode_of,
    input_shapes,
    tensors_of,
    training_cut,
    transient_names,
    try_native,
)
from torchshear.speedup._state import slice_state
from torchshear.speedup._traced import CallSpec, StateEntry, TracedCall, TracedModule, signature_of

Form = Literal["native", "traced"]


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A cut of a model's parts: the model, the checked choice, its tensors and what they become."""

    model: nn.Module
    cut: Cut
    tensors: dict[str, Tensor]
    sliced: dict[str, Tensor]

    def replacements(self) -> dict[int, Any]:
        """Id of each tensor of the model -> its new version."""
        found: dict[int, Any] = {id(self.tensors[name]): tensor for name, tensor in self.sliced.items()}
        constants = own_constants(self.model, self.cut.groups.graph)
        return found | {id(own): self.sliced[name] for name, own in constants if name in self.sliced}


def shrink_parts(model: nn.Module, groups: ChannelGroups, plan: PruningPlan, form: Form | None) -> Shrunk:
    """Cut the parts of a model that a plan is for, each in its native form where that holds.

    Raises:
        PlanError: the plan does not fit the groups, or `form="native"` is not equal to the rewritten graph.
    """
    cut = Cut(groups, plan.kept)
    graph = groups.graph
    assert graph.parts is not None
    tensors = tensors_of(model, graph)
    job = _Job(model, cut, tensors, slice_state(cut, tensors))
    problem = "asked for"
    if form != "traced":
        native, problem = try_native(PartRun(model, graph.parts), cut, tensors, job.sliced)
        if native is not None:
            forms: dict[str, Form] = dict.fromkeys(graph.parts.names, "native")
            return Shrunk(in_mode_of(whole_of(native), model), "native", problem, forms)
        if form == "native":
            raise PlanError(f"the native form is not equal to the rewritten graph: {problem}")
    return _part_by_part(job, problem, try_native=form != "traced" and len(graph.parts.names) > 1)


def _part_by_part(job: _Job, problem: str, *, try_native: bool) -> Shrunk:
    """Give each part the form that it can have, and put all of them into one copy of the model."""
    parts = job.cut.groups.graph.parts
    assert parts is not None
    forms: dict[str, Form] = {}
    reasons: list[str] = []
    memo = job.replacements()
    for name in parts.names:
        native, reason = _native_part(job, name) if try_native else (None, problem)
        forms[name] = "traced" if native is None else "native"
        original = job.model.get_submodule(name)
        if native is None:
            lost = [call for call in job.cut.groups.graph.lost_backwards if f"{call.module}.".startswith(f"{name}.")]
            reasons.append(f"part {name!r} is traced: {reason}{untrainable(lost)}")
            memo[id(original)] = _traced_part(job, name)
        else:
            memo |= {id(module): native.get_submodule(inner) for inner, module in original.named_modules()}
    whole = copy_model(job.model, memo)
    form: Form = "traced" if "traced" in forms.values() else "native"
    return Shrunk(
        in_mode_of(whole, job.model), form, "; ".join(reasons) or "each part equals its rewritten graph", forms
    )


def _calls_of(graph: Graph, name: str) -> list[Any]:
    """`(args, kwargs)` of each captured call of a part."""
    assert graph.parts is not None
    return [given for call, given in zip(graph.parts.calls, graph.inputs.args, strict=True) if call == name]


def _captured(job: _Job, name: str, calls: list[Any]) -> tuple[PartRun, Cut]:
    """Some calls of one part, captured by themselves, with the cut in terms of their axes."""
    groups = job.cut.groups
    assert groups.graph.parts is not None
    run = PartRun(job.model, Parts((name,) * len(calls), groups.graph.parts.pinned))
    graph = trace_inputs(run, ExampleInputs(tuple(calls), {}))
    return run, Cut(with_graph(groups, graph), job.cut.kept)


def _native_part(job: _Job, name: str) -> tuple[nn.Module | None, str]:
    """One part in its native form, or why it has none."""
    run, cut = _captured(job, name, _calls_of(job.cut.groups.graph, name))
    made, reason = try_native(run, cut, job.tensors, job.sliced)
    return (None if made is None else whole_of(made).get_submodule(name)), reason


def _traced_part(job: _Job, name: str) -> TracedModule:
    """One part as rewritten graphs, one pair for each signature that it is called with."""
    part = job.model.get_submodule(name)
    entries = _part_entries(job, name)
    calls: list[TracedCall] = []
    for number, given in enumerate(_calls_of(job.cut.groups.graph, name)):
        run, cut = _captured(job, name, [given])
        sources = {"eval": (cut.groups.graph, cut.groups.facts, cut)}
        error = ""
        try:
            train, again, facts = training_cut(run, cut.groups.graph, cut)
            check_backwards(train)
            sources["train"] = (train, facts, again)
        except (CaptureError, PlanError) as failure:
            error = str(failure)
        graphs: dict[str, fx.Graph] = {}
        for mode, (graph, facts, own_cut) in sources.items():
            renamed = _names_in_part(graph, name, f"_{mode}_{number}")
            graphs[mode] = _renamed(rewrite_graph(graph.fx_graph, facts, own_cut), renamed)
            entries += _constants(graph, own_cut, renamed)
        spec = _part_spec(part, {mode: source[0] for mode, source in sources.items()}, given)
        calls.append(TracedCall.of(graphs, spec, error, lost_backwards(cut.groups.graph)))
    return TracedModule(entries, calls)


def _part_spec(part: nn.Module, graphs: Mapping[str, Graph], given: Any) -> CallSpec:
    """How one part is called: the specification of its only call in a run."""
    is_free = all(graph.batch_hint is not None for graph in graphs.values())
    out_specs = {mode: graph.out_spec.children()[0] for mode, graph in graphs.items()}
    shapes = input_shapes(graphs["eval"], is_free)
    return CallSpec(pytree.tree_structure(given), out_specs, signature_of(part), *shapes)


def _names_in_part(graph: Graph, part: str, suffix: str) -> dict[str, str]:
    """Canonical name in the whole model -> name in the part; constants get the suffix, since each graph has its own."""
    prefix = f"{part}."
    names: dict[str, str] = {}
    for alias, name in graph.aliases.items():
        if alias.startswith(prefix):
            names.setdefault(name, alias.removeprefix(prefix))
    constants = [name for name, entry in graph.state.items() if entry.kind == "constant"]
    return names | {name: f"{name.replace('.', '_')}{suffix}" for name in constants}


def _renamed(graph: fx.Graph, names: Mapping[str, str]) -> fx.Graph:
    """Have a graph read its tensors under other names."""
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = names[str(node.target)]
    return graph


def _part_entries(job: _Job, part: str) -> list[StateEntry]:
    """Parameters and buffers of one part under all names that it has for them."""
    prefix, graph, transient = f"{part}.", job.cut.groups.graph, transient_names(job.model)
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in graph.aliases.items():
        if alias.startswith(prefix):
            names[name].append(alias.removeprefix(prefix))
    return [StateEntry(tuple(own), job.sliced[name], name not in transient) for name, own in names.items()]


def _constants(graph: Graph, cut: Cut, names: Mapping[str, str]) -> list[StateEntry]:
    read = {str(node.target) for node in graph if node.op == "get_attr"}
    constants = {n: entry.tensor for n, entry in graph.state.items() if entry.kind == "constant" and n in read}
    return [StateEntry((names[name],), tensor, False) for name, tensor in slice_state(cut, constants).items()]
