"""The native form: a copy of the user's own module with smaller tensors that equals the rewritten graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import Form, OutputFactors, Sizes
from torchshear.errors import PlanError
from torchshear.graph import ExampleInputs
from torchshear.graph._graph import whole_model
from torchshear.graph._location import locate
from torchshear.graph._run import run_failure
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._meta import is_on_meta
from torchshear.speedup._random_values import random_like
from torchshear.speedup.native._attention_scale import FactorPlacement, describe_factors, multiply_outputs
from torchshear.speedup.native._builder import NativeBuilder
from torchshear.speedup.native._divergence import Divergence, first_divergence
from torchshear.speedup.native._reference_run import Original, ReferenceRuns, RefusedDtypeError
from torchshear.speedup.native._size_attributes import (
    SizeSlot,
    assign_sizes,
    check_slots,
    explain_sizes,
    find_size_slots,
)
from torchshear.speedup.native._size_search import SizeSearch, SizeSearchResult
from torchshear.speedup.native._unread_sizes import find_config_sizes, unread_sizes
from torchshear.speedup.rewriting._rewrite import implied_arguments

_NO_CONFIG = (
    "; no config says these widths, so from_pretrained does not load what save_pretrained writes: keep the plan and a "
    "state_dict"
)


@dataclass(frozen=True, slots=True, eq=False)
class Native:
    """A native form, or the reason why there is none.

    Attributes:
        model: the copy of the user's module; None if the traced form has to do.
        form: the native form, or a traced one with the reason.
        fails_in: the module whose own code is wrong on the smaller tensors; None if the reason is another one.
    """

    model: nn.Module | None
    form: Form
    fails_in: str | None = None


@dataclass(frozen=True, slots=True)
class _FormSearchResult:
    """Sizes, a divergence that is left, and factors on outputs of modules."""

    search: SizeSearchResult
    factors: OutputFactors


def native_form(original: Original, cut: Cut, tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor]) -> Native:
    """Copy the user's module, with the sizes and factors with which it equals the rewritten graph.

    Both are compared in float64 on the example and on random inputs, also with the branches that code takes while it is
    exported. Where they differ, the sizes that the modules keep in attributes are searched.

    Args:
        original: the captured original.
        cut: the units that are removed.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.

    Returns:
        The copy with its form, or a traced form with the reason.
    """
    builder = NativeBuilder(original, cut, tensors, sliced)
    implied = implied_arguments(original.graph.fx_graph, cut.groups.facts, cut)
    dtypes = (torch.float64, builder.dtype)
    placement = FactorPlacement(cut, [node for node, _ in implied], builder.run_rewritten, dtypes)
    factors = next(iter(placement.for_implied()), None) if implied else {}
    if factors is None:
        return Native(None, Form("traced", _explain_implied(implied)), locate(implied[0][0]).module)
    slots = find_size_slots(original.model, original.graph, cut)
    try:
        copy = builder.build()
    except Exception as error:  # a module that cannot be deep-copied says so with any exception
        return Native(None, Form("traced", f"the model cannot be copied: {type(error).__name__}: {error}"))
    try:
        found = _search_form(builder, copy, slots, placement, factors)
    except RefusedDtypeError as error:  # the proof of the traced form will name the call
        return Native(None, Form("traced", f"the rewritten graph does not run: {error}"))
    divergence, sizes, factors = found.search.divergence, dict(found.search.sizes), found.factors
    if divergence is not None:
        return Native(None, Form("traced", _explain_divergence(divergence, builder)), divergence.modules[0])
    native = builder.build(sizes, factors)
    failure = _training_failure(native, original)
    if failure is not None:
        return Native(None, Form("traced", failure))
    unread = unread_sizes(original.model, native, slots, sizes, original.example_in_training)
    sizes |= unread
    native = builder.build(sizes, factors) if unread else native
    config = find_config_sizes(native, slots.get("", ()), original.example)
    sizes |= config or {}
    native = builder.build(sizes, factors) if config else native
    reason = f"{_describe_form(sizes, factors)}; equal to the rewritten graph on all inputs tried"
    reason += "" if config is not None else _NO_CONFIG
    return Native(native, Form("native", reason, sizes, factors))


def recorded_form(
    original: Original, cut: Cut, tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor], form: Form
) -> nn.Module:
    """Copy the user's module with the sizes and factors of a recorded form, and compare it as in `native_form`.

    On the meta device there are no values to compare; the copy is made nevertheless.

    Args:
        original: the captured original.
        cut: the units that are removed.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.
        form: the recorded form.

    Raises:
        PlanError: the model has no such attributes or modules, or the copy does not equal the rewritten graph.
    """
    check_slots(original.model, form)
    builder = NativeBuilder(original, cut, tensors, sliced)
    native = builder.build(form.sizes, form.factors)
    if is_on_meta(original.model):
        return native
    copy, divergence = builder.build(form.sizes), None
    for dtype in (torch.float64, builder.dtype):
        try:
            runs = builder.reference_runs(dtype)
            divergence = first_divergence(runs.twin(copy), runs, form.factors)
            if divergence is None or divergence.check or not original.refuses_float64:
                break
        except RefusedDtypeError:
            if dtype is builder.dtype:
                raise
    problem = _explain_divergence(divergence, builder) if divergence else _training_failure(native, original)
    if problem is not None:
        raise PlanError(
            f"the plan says that {type(whole_model(original.model)).__name__} has the native form, "
            f"{_describe_form(form.sizes, form.factors)}; made so, it is not equal to the rewritten graph: {problem}. "
            f"Expected the same class, configuration and library versions as when the plan was made; make a new plan, "
            f"or take the traced form with "
            f'torchshear.speedup.shrink_to_form(model, plan, form="traced").'
        )
    return native


def _search_form(
    builder: NativeBuilder,
    copy: nn.Module,
    slots: Mapping[str, Sequence[SizeSlot]],
    placement: FactorPlacement,
    factors: OutputFactors,
) -> _FormSearchResult:
    """Search in float64, and in the dtype of the model if its code refuses float64.

    Args:
        builder: builder of the native forms.
        copy: a native form with the old sizes.
        slots: module -> slots that may hold sizes.
        placement: places of factors.
        factors: factors that are known to be needed.
    """
    try:
        runs = builder.reference_runs(torch.float64)
        found = _FormSearch(runs.twin(copy), slots, runs, placement).run(factors)
        divergence = found.search.divergence
        if divergence is None or divergence.check or not builder.original.refuses_float64:
            return found
        runs = builder.reference_runs(builder.dtype)
        twin = runs.twin(copy)
        with assign_sizes(dict(twin.named_modules()), found.search.sizes):
            if divergence.is_same_as(first_divergence(twin, [next(iter(runs))], found.factors)):
                return found  # float64 is not the reason why the code fails
    except RefusedDtypeError:
        pass
    runs = builder.reference_runs(builder.dtype)
    return _FormSearch(runs.twin(copy), slots, runs, placement).run(factors)


@dataclass(frozen=True, slots=True, eq=False)
class _FormSearch:
    """A search for sizes, and for factors where sizes are not enough, by runs in one dtype.

    Attributes:
        twin: a native form with the old sizes, as the runs compute with it.
        slots: module -> slots that may hold sizes.
        runs: the runs.
        placement: places of factors.
    """

    twin: nn.Module
    slots: Mapping[str, Sequence[SizeSlot]]
    runs: ReferenceRuns
    placement: FactorPlacement

    def run(self, factors: OutputFactors) -> _FormSearchResult:
        """Search sizes, and then factors as long as one gets the run further."""
        if first_divergence(self.twin, self.runs, factors) is None:
            return _FormSearchResult(SizeSearchResult({}, None), factors)
        best = self._search_sizes(factors, {})
        better: _FormSearchResult | None = best
        while better is not None:
            best, better = better, self._search_factors(better)
        return best

    def _search_sizes(self, factors: OutputFactors, known: Sizes) -> _FormSearchResult:
        distinct = tuple(set(factors.values()))
        runs = (replace(run, factors=distinct, compares_inside=True) for run in self.runs)
        with multiply_outputs(self.twin, factors):
            return _FormSearchResult(SizeSearch(self.twin, self.slots, known).run(runs), factors)

    def _search_factors(self, found: _FormSearchResult) -> _FormSearchResult | None:
        """Place factors in the innermost module that goes wrong, and in all of its class; None if none helps.

        A factor changes numbers. It helps where they are wrong, not where the code does not run on the sizes.
        """
        divergence = found.search.divergence
        if divergence is None or not divergence.check:
            return None
        modules = dict(self.twin.named_modules())
        for name in divergence.modules:
            twins = [other for other, module in modules.items() if type(module) is type(modules[name])]
            placements = self.placement.for_modules(twins)
            kept = {
                p: c for p, c in found.factors.items() if not any(f"{p.module}.".startswith(f"{n}.") for n in twins)
            }
            for factors in placements:
                other = self._search_sizes({**kept, **factors}, found.search.sizes)
                if other.search.is_further_than(found.search):
                    return other
            if placements:
                return None
        return None


def _training_failure(native: nn.Module, original: Original) -> str | None:
    """Say why a native form does not run in train mode; None if it does, or if its original does not either."""
    inputs: ExampleInputs = random_like(original.example, seed=0)
    twin = copy_model(native, {id(parameter): parameter for parameter in native.parameters()})  # no run leaves traces
    failure = run_failure(twin, inputs, "train")
    if failure is not None and inputs.batch_size() == 1:
        inputs = random_like(original.example_in_training, seed=0)
        failure = run_failure(twin, inputs, "train")
    if failure is None or run_failure(original.model, inputs, "train") is not None:
        return None
    return f"its own forward does not run in train mode on the smaller tensors ({failure})"


def _describe_form(sizes: Sizes, factors: OutputFactors) -> str:
    """Say in what a native form differs from its original."""
    changed = f", with other values of {explain_sizes(sizes)}" if sizes else ""
    kept = (
        f", with the scale of attention kept by a factor on the output of {describe_factors(factors)}"
        if factors
        else ""
    )
    return f"its own module with smaller tensors{changed}{kept if factors else ''}"


def _explain_implied(implied: Sequence[tuple[fx.Node, str]]) -> str:
    """Say which calls derive an argument that no attribute holds."""
    node, name = implied[0]
    more = f" and {len(implied) - 1} more" if len(implied) > 1 else ""
    return (
        f"{locate(node)}{more}: {name!r} is not given, so the operator derives it from a size that changes; neither an "
        f"attribute nor a factor on the output of a module inside can keep it at its value"
    )


def _explain_divergence(divergence: Divergence, builder: NativeBuilder) -> str:
    """Say which module, and which lines of it, are wrong on the smaller tensors."""
    module = divergence.modules[0]
    where = f"module {module!r}" if module else "the model"
    places = [locate(change.node) for change in builder.changes]
    lines = dict.fromkeys(place.source for place in places if place.module == module and place.source)
    source = f"; sizes change at {', '.join(list(lines)[:3])}" if lines and divergence.check else ""
    return f"{where}: {divergence.message}{source}"
