"""Shrinking a model that was captured whole: in native form if that equals the rewritten graph, else in traced form."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._analyze import relate
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import Form, FormKind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.dependency.rules._findings import Facts
from torchshear.errors import CaptureError, PlanError
from torchshear.graph import Graph
from torchshear.graph.capture._dynamic_sizes import dynamic_dimensions
from torchshear.graph.capture._trace import capture_in_mode
from torchshear.graph.model._checks import signature_of
from torchshear.graph.model._meta import is_on_meta
from torchshear.speedup.native._form import Native, recorded_form
from torchshear.speedup.rewriting._lost_backwards import check_backwards, explain_lost_backwards, explain_untrainable
from torchshear.speedup.rewriting._rewrite import rewrite_graph
from torchshear.speedup.rewriting._slicing import slice_state
from torchshear.speedup.rewriting._traced import (
    CallSpec,
    GraphCode,
    RunGraph,
    StateEntry,
    TracedCall,
    TracedModule,
    explain_limits,
)
from torchshear.speedup.shrinking._prepared_cut import PreparedCut
from torchshear.speedup.shrinking._whole_groups import NativeTradeoff, leave_groups_whole


@dataclass(frozen=True, slots=True, eq=False)
class TrainingCut:
    """A model captured in train mode, the cut in terms of its axes, and facts of the rules about it."""

    graph: Graph
    cut: Cut
    facts: Facts


@dataclass(frozen=True, slots=True, eq=False)
class UnprovedModel:
    """A shrunk model that has not been proved.

    Attributes:
        model: the smaller model.
        form: its form, as a plan records it.
        plan: the plan that it was made by: the one given, or one that leaves some of its groups whole.
        training: the original captured in train mode, if that was needed.
    """

    model: nn.Module
    form: Form
    plan: PruningPlan
    training: TrainingCut | None = None


def shrink_whole(
    model: nn.Module,
    groups: ChannelGroups,
    plan: PruningPlan,
    kind: FormKind | None,
    tradeoff: NativeTradeoff | None = None,
) -> UnprovedModel:
    """Shrink a model that was captured whole.

    Args:
        model: the original.
        groups: its analysis.
        plan: the plan.
        kind: the form that it must have; None for the one that the plan records, else native if possible.
        tradeoff: permission to leave groups whole for the native form; None for none.

    Raises:
        PlanError: the plan does not fit the groups, or the form that is asked for or recorded is not equal to the
            rewritten graph.
    """
    job, native = make_native(PreparedCut.of(model, groups, plan), plan.form, kind, tradeoff)
    if native.model is not None:
        return UnprovedModel(copy_modes(native.model, model), native.form, job.plan)
    graph, form = groups.graph, native.form
    traced, training = _make_traced(model, graph, job.cut, job.sliced)
    if form is not plan.form:
        form = replace(form, reason=f"{form.reason}{explain_untrainable(graph.lost_backwards)}{explain_limits(traced)}")
    return UnprovedModel(copy_modes(traced, model), form, plan, training)


def make_unproved_traced(
    model: nn.Module,
    groups: ChannelGroups,
    plan: PruningPlan,
    run_of: Callable[[fx.Graph], RunGraph] = GraphCode.of,
) -> nn.Module:
    """Make the traced form in eval mode alone, without a proof: enough to measure how fast it runs, or how well.

    Args:
        model: the original, captured whole.
        groups: its analysis.
        plan: the plan.
        run_of: makes of the graph what runs it.

    Raises:
        PlanError: the plan does not fit the groups.
    """
    job, graph = PreparedCut.of(model, groups, plan), groups.graph
    rewritten = {"eval": rewrite_graph(graph.fx_graph, groups.facts, job.cut)}
    spec = _call_spec(model, {"eval": graph}, rewritten)
    call = TracedCall({"eval": run_of(rewritten["eval"])}, spec, "it was made to be measured in eval mode alone.")
    return TracedModule(_state_entries(model, graph, job.sliced), [call]).eval()


def make_native(
    job: PreparedCut, recorded: Form | None, kind: FormKind | None, tradeoff: NativeTradeoff | None = None
) -> tuple[PreparedCut, Native]:
    """Return the native form, recorded or found, or why there is none; and its cut, which may leave groups whole.

    Raises:
        PlanError: the recorded form does not fit, or `kind="native"` is not equal to the rewritten graph.
    """
    if recorded is not None and kind in (None, recorded.kind):
        if recorded.kind == "traced":
            return job, Native(None, recorded)
        native = recorded_form(job.original, job.cut, job.tensors, job.sliced, recorded)
        unseen = (
            "; not compared again on the meta device, where there are no values"
            if is_on_meta(job.original.model)
            else ""
        )
        return job, Native(native, replace(recorded, reason=f"{recorded.reason}{unseen}"))
    if kind == "traced":
        return job, Native(None, Form("traced", "asked for"))
    found = job.find_native()
    if found.fails_in is not None and tradeoff is not None:
        job, found = leave_groups_whole(job, found, tradeoff)
    if found.model is None and kind == "native":
        raise PlanError(f"the native form is not equal to the rewritten graph: {found.form.reason}")
    return job, found


def _state_entries(model: nn.Module, graph: Graph, sliced: Mapping[str, Tensor]) -> list[StateEntry]:
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in graph.aliases.items():
        names[name].append(alias)
    transient = nonpersistent_names(model)
    return [
        StateEntry(
            tuple(names[name]) or (name,), tensor, name not in transient and graph.state[name].kind != "constant"
        )
        for name, tensor in sliced.items()
    ]


def nonpersistent_names(model: nn.Module) -> set[str]:
    """Return the names of the buffers that a state dict does not hold."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _call_spec(model: nn.Module, graphs: Mapping[str, Graph], rewritten: Mapping[str, fx.Graph]) -> CallSpec:
    """Describe how the traced form of a model is called."""
    out_specs = {mode: graph.out_spec for mode, graph in graphs.items()}
    is_free = all(graph.batch_hint is not None for graph in graphs.values())
    # A call of another operator may have sizes as arguments that the first did not name.
    targets = {(mode, node.name): node.target for mode, graph in graphs.items() for node in graph}
    keeps_calls = all(
        targets.get((mode, node.name), node.target) == node.target for mode in graphs for node in rewritten[mode].nodes
    )
    others = dynamic_dimensions(model, list(graphs.values())) if keeps_calls else frozenset()
    shapes = input_shapes(graphs["eval"], is_free, others)
    return CallSpec(graphs["eval"].in_spec, out_specs, signature_of(model), *shapes)


def input_shapes(
    graph: Graph, is_free: bool, others: Collection[tuple[int, int]] = ()
) -> tuple[tuple[tuple[int | None, ...] | None, ...], tuple[tuple[int, ...] | None, ...]]:
    """Return the sizes of the flat inputs, None for dynamic ones and for inputs that are no tensors; and all as given.

    Args:
        graph: the capture.
        is_free: whether its batch is dynamic.
        others: numbers of tensors, with other dynamic dimensions of them.
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


def _make_traced(
    model: nn.Module, graph: Graph, cut: Cut, sliced: dict[str, Tensor]
) -> tuple[TracedModule, TrainingCut | None]:
    """Make the traced form, with a graph for each mode; also return the capture in train mode, if there is one."""
    rewritten = {"eval": rewrite_graph(graph.fx_graph, cut.groups.facts, cut)}
    sources = {"eval": graph}
    error, training = "", None
    try:
        training = capture_training_cut(model, graph, cut)
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
    return TracedModule(_state_entries(model, graph, sliced), [call]), training


def capture_training_cut(model: nn.Module, graph: Graph, cut: Cut) -> TrainingCut:
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


def copy_modes(small: nn.Module, model: nn.Module) -> nn.Module:
    """Set every module of a shrunk model to the mode of its original, and return it."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, model.training)
    return small
