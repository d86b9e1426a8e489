"""Whether the user's own module, with smaller tensors and other sizes, is what the rewritten graph is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import Cut, Form, Scales, Sizes
from torchshear.errors import PlanError
from torchshear.graph import (
    ExampleInputs,
    Graph,
    clear_caches,
    copy_model,
    is_on_meta,
    locate,
    run_failure,
    whole_model,
)
from torchshear.graph._run import graph_values
from torchshear.graph.numerics._float64 import to_float64
from torchshear.speedup.comparing._random_inputs import random_like
from torchshear.speedup.native._acceptance import Trials
from torchshear.speedup.native._attention_scale import explain_scales, scaled
from torchshear.speedup.native._builder import native_copy
from torchshear.speedup.native._original import Original
from torchshear.speedup.native._reference_run import Fault, RefusedDtypeError, Trial, find_fault
from torchshear.speedup.native._saved_config import is_built_from_settings, settings_of
from torchshear.speedup.native._scale_places import Scaling
from torchshear.speedup.native._size_attributes import Choice, assigned, check_slots, choices, explain
from torchshear.speedup.native._size_search import Repair, repair
from torchshear.speedup.native._unread_attributes import unread_sizes
from torchshear.speedup.rewriting._rewrite import changed_integers, implied_arguments, rewrite_graph

_UNSAID_WIDTHS = (
    "; no config says these widths, so from_pretrained does not load what save_pretrained writes: keep the plan and a "
    "state_dict"
)
_NOTHING: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class Native:
    """A native form, or why there is none.

    Attributes:
        model: the copy of the user's module; None where the traced form has to do.
        form: what made it, or a traced form that says why.
        fails_in: the module whose own code is wrong on the smaller tensors; None where that is not what is wrong.
    """

    model: nn.Module | None
    form: Form
    fails_in: str | None = None


def native_form(original: Original, cut: Cut, tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor]) -> Native:
    """A copy of the user's module that equals the rewritten graph.

    Both are compared in float64 on the example and on random inputs, also with the branches that code takes while it
    is exported. Where they differ, the sizes that the modules keep in attributes are searched.

    Args:
        original: the captured original.
        cut: the units that go.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.

    Returns:
        The copy with what made it, or a traced form that says why.
    """
    model, making = original.model, _Making.of(original, cut, tensors, sliced)
    unsaid = implied_arguments(cut.groups.graph.fx_graph, cut.groups.facts, cut)
    scaling = Scaling(cut, [node for node, _ in unsaid], making.run, (torch.float64, making.own_dtype))
    scales = next(iter(scaling.of_implied()), None) if unsaid else {}
    if scales is None:
        return Native(None, Form("traced", _unsaid_reason(unsaid)), locate(unsaid[0][0]).module)
    try:
        work = making.native()
    except Exception as error:  # a module that cannot be deep-copied says so with any exception
        return Native(None, Form("traced", f"the model cannot be copied: {type(error).__name__}: {error}"))
    try:
        found = making.find(work, scaling, scales)
    except RefusedDtypeError as error:  # the proof of the traced form will name the call
        return Native(None, Form("traced", f"the rewritten graph does not run: {error}"))
    fault = found.repair.fault
    if fault is not None:
        return Native(None, Form("traced", _reason(fault, making)), fault.modules[0])
    native, sizes = making.native(found.repair.sizes, found.scales), dict(found.repair.sizes)
    failure = _failure_in_training(native, original)
    if failure is not None:
        return Native(None, Form("traced", failure))
    unread = unread_sizes(model, native, cut, sizes, original.example_in_training)
    if unread:
        sizes |= unread
        native = making.native(sizes, found.scales)
    settings = making.settings(native)
    if settings:
        sizes |= settings
        native = making.native(sizes, found.scales)
    reason = f"{_description(sizes, found.scales)}; equal to the rewritten graph on all inputs tried"
    reason += "" if settings is not None else _UNSAID_WIDTHS
    return Native(native, Form("native", reason, sizes, found.scales))


def recorded_form(
    original: Original, cut: Cut, tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor], form: Form
) -> nn.Module:
    """A copy of the user's module with the sizes and factors of a recorded form, compared as in `native_form`.

    On the meta device there are no values to compare; the copy is made nevertheless.

    Args:
        original: the captured original.
        cut: the units that go.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.
        form: what to make.

    Raises:
        PlanError: the model has no such attributes or modules, or the copy does not equal the rewritten graph.
    """
    model = original.model
    check_slots(model, form)
    making = _Making.of(original, cut, tensors, sliced)
    native = making.native(form.sizes, form.scales)
    if is_on_meta(model):
        return native
    fault = making.fault_of(form)
    problem = _failure_in_training(native, original) if fault is None else _reason(fault, making)
    if problem is not None:
        what = _description(form.sizes, form.scales)
        raise PlanError(
            f"the plan says that {type(whole_model(model)).__name__} has the native form, {what}; made so, it is not "
            f"equal to the rewritten graph: {problem}. Expected the same class, configuration and library versions as "
            f"when the plan was made; make a new plan, or take the traced form with "
            f'torchshear.speedup.shrink_to_form(model, plan, form="traced").'
        )
    return native


@dataclass(frozen=True, slots=True)
class _Found:
    """What makes a copy right, and what is wrong nevertheless.

    Attributes:
        repair: sizes in attributes, and a fault if there is one left.
        scales: factors on outputs of modules.
    """

    repair: Repair
    scales: Scales


@dataclass(frozen=True, slots=True)
class _Making:
    """All that making and trying a native form needs."""

    original: Original
    cut: Cut
    replacements: dict[int, Tensor]
    sliced: Mapping[str, Tensor]
    rewritten: fx.Graph

    @classmethod
    def of(cls, original: Original, cut: Cut, tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor]) -> "_Making":
        graph = cut.groups.graph
        replacements = {id(tensors[name]): tensor for name, tensor in sliced.items()}
        replacements |= {id(own): sliced[name] for name, own in own_constants(original.model, graph) if name in sliced}
        return cls(original, cut, replacements, sliced, rewrite_graph(graph.fx_graph, cut.groups.facts, cut))

    @property
    def graph(self) -> Graph:
        return self.original.graph

    @property
    def own_dtype(self) -> torch.dtype:
        """Dtype of the model's numbers."""
        return next((t.dtype for t in self.sliced.values() if t.is_floating_point()), torch.float32)

    def native(self, sizes: Sizes = _NOTHING, scales: Scales = _NOTHING) -> nn.Module:
        changes = changed_integers(self.graph.fx_graph, self.cut.groups.facts, self.cut)
        native = native_copy(self.original.model, self.replacements, changes, sizes, scales)
        clear_caches(native, self.original.caches)
        return native

    def settings(self, native: nn.Module) -> Sizes | None:
        """Numbers of the model's config that say the widths of its native form; None if there are none."""
        if not is_built_from_settings(native):
            return {}
        found = choices(self.original.model, self.graph, self.cut).get("", ())
        return settings_of(native, found, self.original.example)

    def find(self, work: nn.Module, scaling: Scaling, scales: Scales) -> _Found:
        """Sizes and factors with which a copy is right, and what is wrong nevertheless."""
        for module in work.modules():
            module.training = False
        trials = self.trials(torch.float64)
        try:
            found = self._find_in(work, trials, scaling, scales)
            if found.repair.fault is None or found.repair.fault.check or not self._is_of_dtype(work, found):
                return found
        except RefusedDtypeError:
            pass
        return self._find_in(work, self.trials(self.own_dtype), scaling, scales)

    def trials(self, dtype: torch.dtype) -> Trials:
        """What a copy has to pass, computed in a dtype."""
        return Trials(self.original, self.rewritten, self.sliced, dtype)

    def _find_in(self, work: nn.Module, trials: Trials, scaling: Scaling, scales: Scales) -> _Found:
        """As `find`, by trials in one dtype."""
        twin = trials.twin(work)
        if all(self._fault(twin, scales, trial) is None for trial in trials):
            return _Found(Repair({}, None), scales)
        search = _Search(twin, choices(self.original.model, self.graph, self.cut), trials, scaling)
        return search.run(scales)

    def fault_of(self, form: Form) -> Fault | None:
        """What is wrong with a copy of which all that makes it is known, on the inputs that `find` tries."""
        work = self.native(form.sizes)
        for module in work.modules():
            module.training = False
        try:
            fault = self._first_fault(work, form.scales, self.trials(torch.float64))
            if fault is None or fault.check or not self.original.refuses_float64:
                return fault
        except RefusedDtypeError:
            pass
        return self._first_fault(work, form.scales, self.trials(self.own_dtype))

    def _first_fault(self, work: nn.Module, scales: Scales, trials: Trials) -> Fault | None:
        twin = trials.twin(work)
        return next((fault for trial in trials if (fault := self._fault(twin, scales, trial)) is not None), None)

    def _is_of_dtype(self, work: nn.Module, found: _Found) -> bool:
        """Whether code fails in float64 that does not fail in the model's own dtype."""
        if not self.original.refuses_float64:
            return False
        trials, fault = self.trials(self.own_dtype), found.repair.fault
        twin = trials.twin(work)
        with assigned(dict(twin.named_modules()), found.repair.sizes):
            narrow = self._fault(twin, found.scales, next(iter(trials)))
        return not (fault is not None and fault.is_like(narrow))

    @staticmethod
    def _fault(model: nn.Module, scales: Scales, trial: Trial) -> Fault | None:
        with scaled(model, scales):
            return find_fault(model, trial.varied(factors=tuple(set(scales.values()))))

    def run(self, dtype: torch.dtype, change: Callable[[fx.Node, Any], Any]) -> Iterator[tuple[fx.Node, Any]]:
        """Nodes of the rewritten graph with their values on the example, some of which are replaced."""
        inputs = self.original.example
        inputs = to_float64(inputs) if dtype is torch.float64 else inputs.copy()
        leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
        return graph_values(self.rewritten, self.sliced, leaves, change)


@dataclass(frozen=True, slots=True)
class _Search:
    """A search for sizes, and for factors where sizes are not enough."""

    wide: nn.Module
    choices: Mapping[str, Sequence[Choice]]
    trials: Trials
    scaling: Scaling

    def run(self, scales: Scales) -> _Found:
        """Mend with sizes, and with factors as long as one gets the run further."""
        found: _Found | None = self._try(scales, _NOTHING)
        while found is not None:
            best = found
            found = self._better(best) if best.repair.fault is not None else None
        return best

    def _try(self, scales: Scales, known: Sizes) -> _Found:
        factors = tuple(set(scales.values()))
        trials = (trial.varied(factors=factors, is_searched=True) for trial in self.trials)
        with scaled(self.wide, scales):
            return _Found(repair(self.wide, self.choices, trials, known), scales)

    def _better(self, found: _Found) -> _Found | None:
        """The innermost module that goes wrong, and all of its class, with factors in other places.

        A factor changes numbers. It helps where they are wrong, not where the code does not run on the sizes.
        """
        if found.repair.fault is None or not found.repair.fault.check:
            return None
        modules = dict(self.wide.named_modules())
        for name in found.repair.fault.modules:
            twins = [other for other, module in modules.items() if type(module) is type(modules[name])]
            ways = self.scaling.of_modules(twins)
            kept = {p: c for p, c in found.scales.items() if not any(f"{p.module}.".startswith(f"{n}.") for n in twins)}
            for scales in ways:
                trial = self._try({**kept, **scales}, found.repair.sizes)
                if trial.repair.is_further_than(found.repair):
                    return trial
            if ways:
                return None
        return None


def _description(sizes: Sizes, scales: Scales) -> str:
    """What the native form is, beside a copy."""
    changed = f", with other values of {explain(sizes)}" if sizes else ""
    kept = f", with the scale of attention kept by a factor on the output of {explain_scales(scales)}" if scales else ""
    return f"its own module with smaller tensors{changed}{kept}"


def _unsaid_reason(unsaid: Sequence[tuple[fx.Node, str]]) -> str:
    """Say which calls derive an argument that no attribute holds."""
    node, name = unsaid[0]
    more = f" and {len(unsaid) - 1} more" if len(unsaid) > 1 else ""
    return (
        f"{locate(node)}{more}: {name!r} is not given, so the operator derives it from a size that changes; neither an "
        f"attribute nor a factor on the output of a module inside can keep it at its value"
    )


def _reason(fault: Fault, making: _Making) -> str:
    """Say which module, and which line of it, is wrong on the smaller tensors."""
    where = f"module {fault.modules[0]!r}" if fault.modules[0] else "the model"
    changes = changed_integers(making.graph.fx_graph, making.cut.groups.facts, making.cut)
    places = [locate(change.node) for change in changes]
    lines = dict.fromkeys(place.source for place in places if place.module == fault.modules[0] and place.source)
    source = f"; sizes change at {', '.join(list(lines)[:3])}" if lines and fault.check else ""
    return f"{where}: {fault.message}{source}"


def own_constants(model: nn.Module, graph: Graph) -> list[tuple[str, Tensor]]:
    """Plain tensor attributes of the model's modules that the graph holds as constants."""
    found: list[tuple[str, Tensor]] = []
    for name, entry in graph.state.items():
        if entry.kind == "constant":
            owner: Any = model
            for part in name.split("."):
                owner = getattr(owner, part, None)
            if isinstance(owner, Tensor):
                found.append((name, owner))
    return found


def _failure_in_training(native: nn.Module, original: Original) -> str | None:
    """Why a native form does not run in train mode though its original does, or None."""
    inputs: ExampleInputs = random_like(original.example, seed=0)
    twin = copy_model(native, {id(parameter): parameter for parameter in native.parameters()})  # no run leaves traces
    failure = run_failure(twin, inputs, "train")
    if failure is not None and inputs.batch_size() == 1:
        inputs = random_like(original.example_in_training, seed=0)
        failure = run_failure(twin, inputs, "train")
    if failure is None or run_failure(original.model, inputs, "train") is not None:
        return None
    return f"its own forward does not run in train mode on the smaller tensors ({failure})"
