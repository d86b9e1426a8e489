"""Shrinking parts of a model: a copy of the whole model in which each part is smaller."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._analyze import relate_graph
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import Form, FormKind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import CaptureError, PlanError
from torchshear.graph import ExampleInputs, Graph
from torchshear.graph._graph import PartRun, Parts, whole_model
from torchshear.graph.capture._trace import trace_inputs
from torchshear.graph.model._checks import signature_of
from torchshear.graph.model._copy import copy_model
from torchshear.speedup.native._builder import own_constants
from torchshear.speedup.native._reference_run import Original
from torchshear.speedup.rewriting._lost_backwards import check_backwards, explain_lost_backwards, explain_untrainable
from torchshear.speedup.rewriting._rewrite import rewrite_graph
from torchshear.speedup.rewriting._slicing import slice_state
from torchshear.speedup.rewriting._traced import (
    CallSpec,
    StateEntry,
    TracedCall,
    TracedModule,
    explain_limits,
)
from torchshear.speedup.shrinking._prepared_cut import PreparedCut
from torchshear.speedup.shrinking._whole_groups import NativeTradeoff
from torchshear.speedup.shrinking._whole_model import (
    UnprovedModel,
    capture_training_cut,
    copy_modes,
    input_shapes,
    make_native,
    nonpersistent_names,
)


def shrink_parts(
    model: nn.Module,
    groups: ChannelGroups,
    plan: PruningPlan,
    kind: FormKind | None,
    tradeoff: NativeTradeoff | None = None,
) -> UnprovedModel:
    """Shrink the parts of a model that a plan is for, each in native form if possible; see `shrink_whole`.

    Raises:
        PlanError: the plan does not fit the groups, or the form that is asked for or recorded is not equal to the
            rewritten graph.
    """
    parts = groups.graph.parts
    assert parts is not None
    recorded = plan.form if plan.form is not None and kind in (None, plan.form.kind) else None
    given = PreparedCut.of(PartRun(model, parts), groups, plan)
    if recorded is not None and len(set(recorded.parts.values())) > 1:
        return _shrink_each_part(given, dict(recorded.parts), recorded)
    job, native = make_native(given, recorded, kind, tradeoff)
    kinds: dict[str, FormKind] = dict.fromkeys(parts.names, native.form.kind)
    if native.model is not None:
        return UnprovedModel(copy_modes(whole_model(native.model), model), replace(native.form, parts=kinds), job.plan)
    looks_further = recorded is None and kind != "traced" and len(parts.names) > 1
    return _shrink_each_part(given, {} if looks_further else kinds, native.form)


def _shrink_each_part(job: PreparedCut, kinds: Mapping[str, FormKind], whole: Form) -> UnprovedModel:
    """Shrink each part in the form that it can have, and put all of them into one copy of the model.

    Args:
        job: the cut.
        kinds: known kinds of the forms of parts; for other parts the native form is searched.
        whole: the recorded form of all parts together, or a traced one with the reason.
    """
    parts = job.cut.groups.graph.parts
    assert parts is not None
    found: dict[str, Form] = {}
    graph, model = job.cut.groups.graph, whole_model(job.original.model)
    memo: dict[int, Any] = {id(job.tensors[name]): tensor for name, tensor in job.sliced.items()}
    memo |= {id(own): job.sliced[name] for name, own in own_constants(model, graph) if name in job.sliced}
    for name in parts.names:
        native, found[name] = (
            (None, whole) if kinds.get(name) == "traced" else _make_native_part(job, name, kinds, whole)
        )
        original = model.get_submodule(name)
        if native is None:
            lost = [call for call in graph.lost_backwards if f"{call.module}.".startswith(f"{name}.")]
            traced = memo[id(original)] = _make_traced_part(job, name)
            found[name] = replace(
                found[name], reason=f"{found[name].reason}{explain_untrainable(lost)}{explain_limits(traced)}"
            )
        else:
            memo |= {id(module): native.get_submodule(inner) for inner, module in original.named_modules()}
    copied = copy_modes(copy_model(model, memo), model)
    is_recorded = set(kinds.values()) == {"native", "traced"}
    return UnprovedModel(copied, whole if is_recorded else _merge_forms(found), job.plan)


def _merge_forms(found: Mapping[str, Form]) -> Form:
    """Merge the forms of all parts into one."""
    kinds = {name: form.kind for name, form in found.items()}
    reasons = [f"part {name!r} is traced: {form.reason}" for name, form in found.items() if form.kind == "traced"]
    return Form(
        "traced" if reasons else "native",
        "; ".join(reasons) or "each part equals its rewritten graph",
        {slot: value for form in found.values() for slot, value in form.sizes.items()},
        {part: factor for form in found.values() for part, factor in form.factors.items()},
        kinds,
    )


def _calls_of(graph: Graph, name: str) -> list[Any]:
    """Return `(args, kwargs)` of each captured call of a part."""
    assert graph.parts is not None
    return [given for call, given in zip(graph.parts.calls, graph.inputs.args, strict=True) if call == name]


def _capture_calls(job: PreparedCut, name: str, calls: list[Any]) -> tuple[PartRun, Cut]:
    """Capture some calls of one part by themselves; also return the cut in terms of their axes."""
    groups = job.cut.groups
    assert groups.graph.parts is not None
    run = PartRun(whole_model(job.original.model), Parts((name,) * len(calls), groups.graph.parts.pinned))
    graph = trace_inputs(run, ExampleInputs(tuple(calls), {}))
    return run, Cut(relate_graph(groups, graph), job.cut.kept)


def _make_native_part(
    job: PreparedCut, name: str, kinds: Mapping[str, FormKind], whole: Form
) -> tuple[nn.Module | None, Form]:
    """Return one part in native form, as recorded if its kind is known; or None, with the reason in the form."""
    run, cut = _capture_calls(job, name, _calls_of(job.cut.groups.graph, name))
    recorded = replace(whole, kind="native") if name in kinds else None
    _, native = make_native(replace(job, original=Original(run, cut.groups.graph), cut=cut), recorded, None)
    return (None if native.model is None else whole_model(native.model).get_submodule(name)), native.form


def _make_traced_part(job: PreparedCut, name: str) -> TracedModule:
    """Return one part in traced form, with graphs for each of its captured calls."""
    part = whole_model(job.original.model).get_submodule(name)
    entries = _part_entries(job, name)
    calls: list[TracedCall] = []
    for number, given in enumerate(_calls_of(job.cut.groups.graph, name)):
        run, cut = _capture_calls(job, name, [given])
        sources = {"eval": (cut.groups.graph, cut.groups.facts, cut)}
        error = ""
        try:
            training = capture_training_cut(run, cut.groups.graph, cut)
            check_backwards(training.graph)
            sources["train"] = (training.graph, training.facts, training.cut)
        except (CaptureError, PlanError) as failure:
            error = str(failure)
        graphs: dict[str, fx.Graph] = {}
        for mode, (graph, facts, own_cut) in sources.items():
            names = _names_in_part(graph, name, f"_{mode}_{number}")
            graphs[mode] = rewrite_graph(graph.fx_graph, facts, own_cut)
            for node in graphs[mode].find_nodes(op="get_attr"):
                node.target = names[str(node.target)]
            read = {str(node.target) for node in graph if node.op == "get_attr"}
            own = {n: e.tensor for n, e in graph.state.items() if e.kind == "constant" and n in read}
            entries += [StateEntry((names[n],), tensor, False) for n, tensor in slice_state(own_cut, own).items()]
        spec = _part_spec(part, {mode: source[0] for mode, source in sources.items()}, given)
        calls.append(TracedCall.of(graphs, spec, error, explain_lost_backwards(cut.groups.graph)))
    return TracedModule(entries, calls)


def _part_spec(part: nn.Module, graphs: Mapping[str, Graph], given: Any) -> CallSpec:
    """Describe how a part is called, from a capture of one call."""
    is_free = all(graph.batch_hint is not None for graph in graphs.values())
    out_specs = {mode: graph.out_spec.children()[0] for mode, graph in graphs.items()}
    shapes = input_shapes(graphs["eval"], is_free)
    return CallSpec(pytree.tree_structure(given), out_specs, signature_of(part), *shapes)


def _names_in_part(graph: Graph, part: str, suffix: str) -> dict[str, str]:
    """Return canonical name -> name in a part; constants get a suffix, since each graph has its own."""
    prefix = f"{part}."
    names: dict[str, str] = {}
    for alias, name in graph.aliases.items():
        if alias.startswith(prefix):
            names.setdefault(name, alias.removeprefix(prefix))
    constants = [name for name, entry in graph.state.items() if entry.kind == "constant"]
    return names | {name: f"{name.replace('.', '_')}{suffix}" for name in constants}


def _part_entries(job: PreparedCut, part: str) -> list[StateEntry]:
    """Return the parameters and buffers of one part under all names that it has for them."""
    prefix, graph, transient = f"{part}.", job.cut.groups.graph, nonpersistent_names(whole_model(job.original.model))
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in graph.aliases.items():
        if alias.startswith(prefix):
            names[name].append(alias.removeprefix(prefix))
    return [StateEntry(tuple(own), job.sliced[name], name not in transient) for name, own in names.items()]
