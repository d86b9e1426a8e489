"""Make a plan real: a physically smaller model, in native form where that is equal to the rewritten graph."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import ChannelGroups, Cut, Form, FormKind, PruningPlan, analyze
from torchshear.dependency.groups._analyze import relate
from torchshear.dependency.plans._agreement import check_agreement
from torchshear.dependency.rules._facts import Facts
from torchshear.dependency.rules._read_values import differing_value, readable_values
from torchshear.errors import ArgumentError, CaptureError, PlanError
from torchshear.graph import (
    ExampleInputs,
    Graph,
    PartRun,
    capture_in_mode,
    check_module,
    dynamic_dimensions,
    is_on_meta,
    record_parts,
    signature_of,
    trace_inputs,
    whole_model,
)
from torchshear.speedup.native._form import Native, recorded_form
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
from torchshear.speedup.shrinking._prepared_plan import Job, tensors_of
from torchshear.speedup.shrinking._whole_groups import Leave, leave_whole


@dataclass(frozen=True, slots=True, eq=False)
class TrainingCut:
    """A model captured in train mode, with the cut in terms of its axes, and what the rules found out about it."""

    graph: Graph
    cut: Cut
    facts: Facts


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A shrunk model, before it is proved, and what made its form.

    Attributes:
        model: the smaller model.
        form: what made its form.
        plan: the plan that it was made by: the one given, or one that leaves some of its groups whole.
        training: the original in train mode, where making the form took its capture.
    """

    model: nn.Module
    form: Form
    plan: PruningPlan
    training: TrainingCut | None = None


def shrink_whole(
    model: nn.Module, groups: ChannelGroups, plan: PruningPlan, kind: FormKind | None, leave: Leave | None = None
) -> Made:
    """Cut a model that was captured whole.

    Args:
        model: the original.
        groups: its analysis.
        plan: what to keep.
        kind: the form that it must have; None: the one that the plan records, else native if that can be.
        leave: which groups may stay whole for the native form; None for none.

    Raises:
        PlanError: the plan does not fit the groups, or the form that is asked for or recorded is not equal to the
            rewritten graph.
    """
    job, native = make_native(Job.of(model, groups, plan), plan.form, kind, leave)
    if native.model is not None:
        return Made(in_mode_of(native.model, model), native.form, job.plan)
    graph, form = groups.graph, native.form
    traced, training = _both_modes(model, graph, job.cut, job.sliced)
    if form is not plan.form:
        form = replace(form, reason=f"{form.reason}{explain_untrainable(graph.lost_backwards)}{explain_limits(traced)}")
    return Made(in_mode_of(traced, model), form, plan, training)


def make_native(
    job: Job, recorded: Form | None, kind: FormKind | None, leave: Leave | None = None
) -> tuple[Job, Native]:
    """The native form that is recorded, or found; and the cut that it is made by, which may leave groups whole.

    Raises:
        PlanError: the recorded form does not fit, or `kind="native"` is not equal to the rewritten graph.
    """
    if recorded is not None and kind in (None, recorded.kind):
        if recorded.kind == "traced":
            return job, Native(None, recorded)
        native = recorded_form(job.original, job.cut, job.tensors, job.sliced, recorded)
        unseen = "; not compared again on the meta device, where there are no values" if is_on_meta(job.run) else ""
        return job, Native(native, replace(recorded, reason=f"{recorded.reason}{unseen}"))
    if kind == "traced":
        return job, Native(None, Form("traced", "asked for"))
    found = job.native()
    if found.fails_in is not None and leave is not None:
        job, found = leave_whole(job, found, leave)
    if found.model is None and kind == "native":
        raise PlanError(f"the native form is not equal to the rewritten graph: {found.form.reason}")
    return job, found


def analysis_of(
    model: nn.Module, plan: PruningPlan, args: tuple[Any, ...] | Tensor | None, kwargs: Mapping[str, Any] | None
) -> ChannelGroups:
    """The analysed network of a plan, for this model: at hand if the plan was made of it, else traced again.

    Raises:
        PlanError: the model is not the one that the plan was made for.
    """
    check_module(model)
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(
            f"plan is {type(plan).__name__}; expected a PruningPlan, from torchshear.plan or PruningPlan.load."
        )
    model = whole_model(model)
    if plan.analysis is not None and _is_same_instance(model, plan.analysis.graph):
        _check_values(model, plan, plan.analysis.graph)
        check_agreement(plan, plan.analysis)
        return plan.analysis
    _check_shapes(model, plan)
    run, inputs = recorded_run(model, plan, args, kwargs)
    groups = analyze(trace_inputs(run, inputs), plan.prunable_outputs)
    if groups.graph.fingerprint != plan.fingerprint:
        raise PlanError(
            f"the plan is for {plan.model_type} with graph {plan.fingerprint[:12]}; {type(model).__name__} has graph "
            f"{groups.graph.fingerprint[:12]}. Expected the same class, configuration and torch version as when the "
            f"plan was made; make a new plan for this model."
        )
    _check_values(model, plan, groups.graph)
    check_agreement(plan, groups)
    return groups


def recorded_run(
    model: nn.Module, plan: PruningPlan, args: tuple[Any, ...] | Tensor | None, kwargs: Mapping[str, Any] | None
) -> tuple[nn.Module, ExampleInputs]:
    """What a plan is for, the model or its parts, with example inputs: the given ones if any, else those of the plan.

    Raises:
        ArgumentError: no inputs are given, and the plan does not describe its own.
        CaptureError: the model has parts and does not run on the given inputs.
    """
    model = whole_model(model)
    run = model if plan.parts is None else PartRun(model, plan.parts)
    if args is None and kwargs is None:
        return run, _inputs_of(plan, model)
    given = ExampleInputs.of(() if args is None else args, kwargs)
    return (run, given) if plan.parts is None else record_parts(model, plan.parts.names, given)


def _inputs_of(plan: PruningPlan, model: nn.Module) -> ExampleInputs:
    """The example inputs of a plan, where the model is: those it was made with, or others of the same description."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    known = plan.analysis.graph.inputs if plan.analysis is not None else None
    if known is not None and (plan.inputs is None or all(tensor.device == device for tensor in known.tensors())):
        return known
    if plan.inputs is not None:
        return ExampleInputs.from_json(plan.inputs, device)
    raise ArgumentError("the plan does not describe its example inputs; give them as args and kwargs.")


def _is_same_instance(model: nn.Module, graph: Graph) -> bool:
    named = dict(model.named_parameters())
    return len(named) > 0 and all(
        named.get(name) is entry.tensor for name, entry in graph.state.items() if entry.kind == "parameter"
    )


def _check_shapes(model: nn.Module, plan: PruningPlan) -> None:
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, entry in plan.state.items():
        shape = tuple(named[name].shape) if name in named else None
        if shape != entry.shape:
            raise PlanError(
                f"the plan is for {plan.model_type}, where {name!r} has shape {entry.shape}; in "
                f"{type(model).__name__} it {f'has shape {shape}' if shape else 'does not exist'}. Expected an "
                f"unpruned model of the same class and configuration."
            )


def _check_values(model: nn.Module, plan: PruningPlan, graph: Graph) -> None:
    wrong = differing_value(plan.values, readable_values(graph, tensors_of(model, graph)))
    if wrong is not None:
        raise PlanError(
            f"{wrong} in this {type(model).__name__}; the plan was made with values of it that say which channels go "
            f"together. Load the buffers that the plan was made with, or make a new plan for this model."
        )


def _entries(model: nn.Module, graph: Graph, sliced: Mapping[str, Tensor]) -> list[StateEntry]:
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in graph.aliases.items():
        names[name].append(alias)
    transient = transient_names(model)
    return [
        StateEntry(
            tuple(names[name]) or (name,), tensor, name not in transient and graph.state[name].kind != "constant"
        )
        for name, tensor in sliced.items()
    ]


def transient_names(model: nn.Module) -> set[str]:
    """Names of the buffers that a state dict does not hold."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _call_spec(model: nn.Module, graphs: Mapping[str, Graph], rewritten: Mapping[str, fx.Graph]) -> CallSpec:
    out_specs = {mode: graph.out_spec for mode, graph in graphs.items()}
    is_free = all(graph.batch_hint is not None for graph in graphs.values())
    keeps_calls = all(_has_same_calls(graph.fx_graph, rewritten[mode]) for mode, graph in graphs.items())
    others = dynamic_dimensions(model, list(graphs.values())) if keeps_calls else frozenset()
    shapes = input_shapes(graphs["eval"], is_free, others)
    return CallSpec(graphs["eval"].in_spec, out_specs, signature_of(model), *shapes)


def _has_same_calls(graph: fx.Graph, rewritten: fx.Graph) -> bool:
    """Whether no call became one of another operator, whose arguments may be sizes that the first did not name."""
    targets = {node.name: node.target for node in graph.nodes}
    return all(targets.get(node.name, node.target) == node.target for node in rewritten.nodes)


def input_shapes(
    graph: Graph, is_free: bool, others: Collection[tuple[int, int]] = ()
) -> tuple[tuple[tuple[int | None, ...] | None, ...], tuple[tuple[int, ...] | None, ...]]:
    """Sizes of the flat inputs, None for free ones and for inputs that are no tensors; and the same as given.

    Args:
        graph: the capture.
        is_free: whether its batch is free.
        others: numbers of tensors, with dimensions of them that are free, too.
    """
    leaves = pytree.tree_leaves((graph.inputs.args, graph.inputs.kwargs))
    given = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves)
    numbers = iter(range(len(leaves)))
    free: list[tuple[int | None, ...] | None] = []
    for shape in given:
        number = None if shape is None else next(numbers)
        free.append(
            None
            if shape is None
            else tuple(
                None if (dim == 0 and is_free) or (number, dim) in others else size for dim, size in enumerate(shape)
            )
        )
    return tuple(free), given


def _both_modes(
    model: nn.Module, graph: Graph, cut: Cut, sliced: dict[str, Tensor]
) -> tuple[TracedModule, TrainingCut | None]:
    """The traced form with a graph for train mode beside the one for eval mode, and what that was made of."""
    rewritten = {"eval": rewrite_graph(graph.fx_graph, cut.groups.facts, cut)}
    sources = {"eval": graph}
    error, training = "", None
    try:
        training = training_cut(model, graph, cut)
        train = training.graph
        check_backwards(train)
        rewritten["train"] = rewrite_graph(train.fx_graph, training.facts, training.cut)
        sources["train"] = train
        sliced = sliced | slice_state(training.cut, {n: e.tensor for n, e in train.state.items() if n not in sliced})
        graph = replace(graph, state={**train.state, **graph.state})
    except (CaptureError, PlanError) as failure:
        error = str(failure)
    call = TracedCall.of(
        rewritten, _call_spec(model, sources, rewritten), error, explain_lost_backwards(sources["eval"])
    )
    return TracedModule(_entries(model, graph, sliced), [call]), training


def training_cut(model: nn.Module, graph: Graph, cut: Cut) -> TrainingCut:
    """Capture a model in train mode, with the cut in terms of its axes.

    Raises:
        CaptureError: the model cannot be captured in that mode.
        PlanError: the cut does not fit it.
    """
    groups = cut.groups
    if graph.training is not None and not graph.training.has_assumed_branches and groups.training_facts is not None:
        return TrainingCut(graph.training, cut, groups.training_facts)
    train = capture_in_mode(model, graph.inputs, "train", graph)
    algebra, facts = groups.algebra.copy(), groups.facts.copy()
    of_train = facts.for_other_graph()
    relate(train, algebra, of_train, groups.prunable_outputs)
    both = replace(graph, state={**train.state, **graph.state})  # the graphs have constants of their own
    return TrainingCut(train, Cut(replace(groups, graph=both, algebra=algebra, facts=facts), cut.kept), of_train)


def in_mode_of(small: nn.Module, model: nn.Module) -> nn.Module:
    """Give every module of the result the mode of its original."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, model.training)
    return small
