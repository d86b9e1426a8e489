"""Shrink parts of a model in place: a copy of the whole model, in which each part is smaller."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import ChannelGroups, Cut, Form, FormKind, PruningPlan
from torchshear.dependency.groups._analyze import relate_graph
from torchshear.errors import CaptureError, PlanError
from torchshear.graph import ExampleInputs, Graph, PartRun, Parts, copy_model, signature_of, trace_inputs, whole_model
from torchshear.speedup.native._builder import own_constants
from torchshear.speedup.native._original import Original
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
from torchshear.speedup.shrinking._prepared_plan import Job
from torchshear.speedup.shrinking._whole_groups import Leave
from torchshear.speedup.shrinking._whole_model import (
    Made,
    in_mode_of,
    input_shapes,
    make_native,
    training_cut,
    transient_names,
)


def shrink_parts(
    model: nn.Module, groups: ChannelGroups, plan: PruningPlan, kind: FormKind | None, leave: Leave | None = None
) -> Made:
    """Cut the parts of a model that a plan is for, each in its native form where that holds; see `shrink_whole`.

    Raises:
        PlanError: the plan does not fit the groups, or the form that is asked for or recorded is not equal to the
            rewritten graph.
    """
    parts = groups.graph.parts
    assert parts is not None
    recorded = plan.form if plan.form is not None and kind in (None, plan.form.kind) else None
    given = Job.of(PartRun(model, parts), groups, plan)
    if recorded is not None and len(set(recorded.parts.values())) > 1:
        return _part_by_part(given, dict(recorded.parts), recorded)
    job, native = make_native(given, recorded, kind, leave)
    kinds: dict[str, FormKind] = dict.fromkeys(parts.names, native.form.kind)
    if native.model is not None:
        return Made(in_mode_of(whole_model(native.model), model), replace(native.form, parts=kinds), job.plan)
    looks_further = recorded is None and kind != "traced" and len(parts.names) > 1
    return _part_by_part(given, {} if looks_further else kinds, native.form)


def _part_by_part(job: Job, kinds: Mapping[str, FormKind], whole: Form) -> Made:
    """Give each part the form that it can have, and put all of them into one copy of the model.

    Args:
        job: the cut.
        kinds: what is known of the forms of the parts; of those not named the native form is looked for.
        whole: what is known of the form of all together: a recorded one, or why none is native.
    """
    parts = job.cut.groups.graph.parts
    assert parts is not None
    found: dict[str, Form] = {}
    memo, model = _replacements(job), whole_model(job.run)
    for name in parts.names:
        native, found[name] = (None, whole) if kinds.get(name) == "traced" else _native_part(job, name, kinds, whole)
        original = model.get_submodule(name)
        if native is None:
            lost = [call for call in job.cut.groups.graph.lost_backwards if f"{call.module}.".startswith(f"{name}.")]
            traced = memo[id(original)] = _traced_part(job, name)
            found[name] = replace(
                found[name], reason=f"{found[name].reason}{explain_untrainable(lost)}{explain_limits(traced)}"
            )
        else:
            memo |= {id(module): native.get_submodule(inner) for inner, module in original.named_modules()}
    copied = in_mode_of(copy_model(model, memo), model)
    is_recorded = set(kinds.values()) == {"native", "traced"}
    return Made(copied, whole if is_recorded else _joined(found), job.plan)


def _replacements(job: Job) -> dict[int, Any]:
    """Id of each tensor of the model -> its new version."""
    found: dict[int, Any] = {id(job.tensors[name]): tensor for name, tensor in job.sliced.items()}
    constants = own_constants(whole_model(job.run), job.cut.groups.graph)
    return found | {id(own): job.sliced[name] for name, own in constants if name in job.sliced}


def _joined(found: Mapping[str, Form]) -> Form:
    """What made the forms of all parts."""
    kinds = {name: form.kind for name, form in found.items()}
    reasons = [f"part {name!r} is traced: {form.reason}" for name, form in found.items() if form.kind == "traced"]
    return Form(
        "traced" if reasons else "native",
        "; ".join(reasons) or "each part equals its rewritten graph",
        {slot: value for form in found.values() for slot, value in form.sizes.items()},
        {part: factor for form in found.values() for part, factor in form.scales.items()},
        kinds,
    )


def _calls_of(graph: Graph, name: str) -> list[Any]:
    """`(args, kwargs)` of each captured call of a part."""
    assert graph.parts is not None
    return [given for call, given in zip(graph.parts.calls, graph.inputs.args, strict=True) if call == name]


def _captured(job: Job, name: str, calls: list[Any]) -> tuple[PartRun, Cut]:
    """Some calls of one part, captured by themselves, with the cut in terms of their axes."""
    groups = job.cut.groups
    assert groups.graph.parts is not None
    run = PartRun(whole_model(job.run), Parts((name,) * len(calls), groups.graph.parts.pinned))
    graph = trace_inputs(run, ExampleInputs(tuple(calls), {}))
    return run, Cut(relate_graph(groups, graph), job.cut.kept)


def _native_part(job: Job, name: str, kinds: Mapping[str, FormKind], whole: Form) -> tuple[nn.Module | None, Form]:
    """One part in its native form, or why it has none; as it is recorded if its kind is known."""
    run, cut = _captured(job, name, _calls_of(job.cut.groups.graph, name))
    recorded = replace(whole, kind="native") if name in kinds else None
    _, native = make_native(replace(job, original=Original(run, cut.groups.graph), cut=cut), recorded, None)
    return (None if native.model is None else whole_model(native.model).get_submodule(name)), native.form


def _traced_part(job: Job, name: str) -> TracedModule:
    """One part as rewritten graphs, one pair for each signature that it is called with."""
    part = whole_model(job.run).get_submodule(name)
    entries = _part_entries(job, name)
    calls: list[TracedCall] = []
    for number, given in enumerate(_calls_of(job.cut.groups.graph, name)):
        run, cut = _captured(job, name, [given])
        sources = {"eval": (cut.groups.graph, cut.groups.facts, cut)}
        error = ""
        try:
            training = training_cut(run, cut.groups.graph, cut)
            check_backwards(training.graph)
            sources["train"] = (training.graph, training.facts, training.cut)
        except (CaptureError, PlanError) as failure:
            error = str(failure)
        graphs: dict[str, fx.Graph] = {}
        for mode, (graph, facts, own_cut) in sources.items():
            renamed = _names_in_part(graph, name, f"_{mode}_{number}")
            graphs[mode] = _renamed(rewrite_graph(graph.fx_graph, facts, own_cut), renamed)
            entries += _constants(graph, own_cut, renamed)
        spec = _part_spec(part, {mode: source[0] for mode, source in sources.items()}, given)
        calls.append(TracedCall.of(graphs, spec, error, explain_lost_backwards(cut.groups.graph)))
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


def _part_entries(job: Job, part: str) -> list[StateEntry]:
    """Parameters and buffers of one part under all names that it has for them."""
    prefix, graph, transient = f"{part}.", job.cut.groups.graph, transient_names(whole_model(job.run))
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in graph.aliases.items():
        if alias.startswith(prefix):
            names[name].append(alias.removeprefix(prefix))
    return [StateEntry(tuple(own), job.sliced[name], name not in transient) for name, own in names.items()]


def _constants(graph: Graph, cut: Cut, names: Mapping[str, str]) -> list[StateEntry]:
    read = {str(node.target) for node in graph if node.op == "get_attr"}
    constants = {n: entry.tensor for n, entry in graph.state.items() if entry.kind == "constant" and n in read}
    return [StateEntry((names[name],), tensor, False) for name, tensor in slice_state(cut, constants).items()]
