"""Everything that a call of `search` asks for, and the search that comes of it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag, close_names, quote
from torchshear.calibration import Loss
from torchshear.compensation import check_compensation
from torchshear.dependency import ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.plans._cut import dense_cost
from torchshear.errors import ArgumentError
from torchshear.graph.capture._trace import trace
from torchshear.options import (
    CalibrationOptions,
    Compensation,
    Form,
    LatencyOptions,
    Planner,
    PruneOptions,
    check_criterion,
)
from torchshear.pruners import Criterion, Ratio
from torchshear.pruners._planning import RankedGroups
from torchshear.pruners.selection._latency import parse_latency
from torchshear.pruners.selection._request import Request
from torchshear.searching._budget import Resource, ResourceLimit, SearchBudget
from torchshear.searching._candidate import CandidateMaker, Evaluate, FineTune
from torchshear.searching._early_stopping import find_early
from torchshear.searching._method import SearchMethod
from torchshear.searching._reused_activations import ActivationStore, check_reusable
from torchshear.searching._space import SearchSpace
from torchshear.searching.methods import METHODS
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._alignment_profiles import resolve_alignment
from torchshear.speedup.latency._measure_table import input_identity, table_of
from torchshear.speedup.latency._table import check_table

_MOST_OF_A_GROUP: Final = 0.98  # that may go, as where groups are ranked together


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchRequest:
    """Request for a search; `torchshear.search` explains each field.

    Raises:
        ArgumentError: a value is outside what it may be, or two contradict each other.
    """

    evaluate: Evaluate
    method: str | SearchMethod = "netadapt"
    ratio: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    target_latency: float | str | None = None
    device: Device | LatencyTable | None = None
    finetune: FineTune | None = None
    finetune_best: FineTune | None = None
    stop_early: object = None
    reuse_activations: bool = False
    storage: object = None
    trials: int | None = None
    seed: int = 0
    criterion: str | Criterion | None = None
    min_ratio: Ratio = 0.0
    max_ratio: Ratio | None = None
    group_reduction: str = "sum"
    roles: str | Collection[str] | None = None
    exclude: str | Collection[str] = ()
    prunable_outputs: str | Collection[str] = ()
    submodules: Sequence[str] | None = None
    align: int | str | Alignment | None = None
    min_width: int = 1
    data: Iterable[Any] | None = None
    loss_fn: Loss | None = None
    batches: int | None = None
    compensate: Compensation = "none"
    memory: int | None = None
    form: Form = "auto"

    def __post_init__(self) -> None:
        """Refuse what means nothing; what only a network can tell is refused when the search is prepared."""
        check_criterion(self.criterion)
        functions = {"evaluate": self.evaluate, "finetune": self.finetune, "finetune_best": self.finetune_best}
        for name, function in functions.items():
            if not callable(function) and (function is not None or name == "evaluate"):
                raise ArgumentError(f"{name} is {type(function).__name__}; expected a function of a model.")
        find_method(self.method)
        if self.stop_early is not None:
            find_early(self.stop_early)
            if getattr(find_method(self.method), "cuts_in_rounds", False):
                raise ArgumentError(
                    f"stop_early is given, and method={name_of(find_method(self.method))!r} cuts in rounds: candidates "
                    f"get narrower, so that scores of earlier ones say nothing. Leave stop_early away, or use another "
                    f"method, as 'evolution'."
                )
        check_flag("reuse_activations", self.reuse_activations)
        if self.reuse_activations and self.finetune is not None:
            raise ArgumentError(
                "reuse_activations=True, and finetune is given, which changes all weights, so that candidates have no "
                "activations in common. Leave one of them away, or train the best candidate alone by finetune_best."
            )
        check_count("seed", self.seed, least=0)
        if self.trials is not None:
            check_count("trials", self.trials)
        _check_budget(self.units)

    @property
    def units(self) -> Request:
        """The units that may go, and the budget."""
        is_by_latency = self.target_latency is not None
        return Request(
            criterion="l1" if self.criterion is None else self.criterion,
            ratio=self.ratio,
            target_macs=self.target_macs,
            target_params=self.target_params,
            target_latency=self.target_latency,
            min_ratio=self.min_ratio,
            max_ratio=_MOST_OF_A_GROUP if self.max_ratio is None else self.max_ratio,
            group_reduction=self.group_reduction,
            roles=self.roles,
            exclude=self.exclude,
            alignment=resolve_alignment("auto" if self.align is None and is_by_latency else self.align),
            min_width=self.min_width,
        )

    @property
    def most_trials(self) -> int | None:
        """Most candidates that may be evaluated; None for as many as the method wants."""
        return self.trials if self.trials is not None else getattr(find_method(self.method), "default_trials", None)

    def prune_options(self) -> PruneOptions:
        """Return how units are chosen and candidates are made; batches are taken once, and held.

        Raises:
            ArgumentError: data is missing, or used by nothing.
        """
        memory = None if self.reuse_activations and self.compensate != "refit" else self.memory
        calibration = CalibrationOptions.parse(self.data, self.loss_fn, self.batches, self.compensate, memory)
        options = PruneOptions.parse(
            self.units,
            has_criterion=self.criterion is not None,
            config=None,
            submodules=self.submodules,
            calibration=replace(calibration, progress=False),
            compensate=self.compensate,
            form=self.form,
        )
        return replace(options, calibration=options.calibration.holding_batches())

    def prepare(
        self, model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None
    ) -> CandidateMaker:
        """Trace and score a model, and check that the budget can be reached, before anything is evaluated.

        Raises:
            ArgumentError: the dense model keeps within the budget; nothing can shrink; an argument does not fit it.
            PlanError: the budget cannot be reached.
            TorchshearError: as `torchshear.prune`.
        """
        measuring = LatencyOptions.parse(self.target_latency, self.device, False)
        options = self.prune_options()
        check_compensation(self.compensate, model, options.calibration.batches)
        groups = analyze(trace(model, args, kwargs, self.submodules), self.prunable_outputs)
        if self.criterion is None and self.compensate == "refit":
            options = options.with_reconstruction(groups)
        if self.reuse_activations:
            check_reusable(groups.graph)
        table = _table(model, groups, args, kwargs, measuring, self.units)
        space = _space(options, model, groups, table)
        return CandidateMaker(
            model=model,
            args=args,
            kwargs=kwargs,
            space=space,
            evaluate=self.evaluate,
            finetune=self.finetune,
            compensate=self.compensate,
            calibration=options.calibration,
            form=None if self.form == "auto" else self.form,
            seed=self.seed,
            said={"search": name_of(find_method(self.method))},
            activations=ActivationStore.of(groups, space.names, self.memory) if self.reuse_activations else None,
        )


def name_of(method: SearchMethod) -> str:
    """Return the name under which a method is known, or that of its class."""
    return next((name for name, kind in METHODS.items() if type(method) is kind), type(method).__name__)


def find_method(given: object) -> SearchMethod:
    """Return the method of a name, or the one that is given.

    Raises:
        ArgumentError: there is none of that name, or it is no method.
    """
    if isinstance(given, str):
        if given not in METHODS:
            raise ArgumentError(f"method={given!r}; expected one of {', '.join(METHODS)}.{close_names(given, METHODS)}")
        return METHODS[given]()
    if isinstance(given, type) or not isinstance(given, SearchMethod):
        raise ArgumentError(
            f"method={quote(given)}; expected one of {', '.join(METHODS)}, or a method with settings, as "
            f"torchshear.searching.Annealing(start=50)."
        )
    return given


def _check_budget(request: Request) -> None:
    """Refuse a search without a budget, or with shares for single groups, which it is to find."""
    if isinstance(request.ratio, Mapping):
        raise ArgumentError(
            "ratio is a mapping; a search finds the share of each group. Give one number, and limits for groups as "
            "min_ratio, max_ratio or exclude."
        )
    if request.ratio is None and not request.has_budget and request.target_latency is None:
        raise ArgumentError("no budget is given; expected ratio, target_macs, target_params or target_latency.")
    if request.ratio == 0:
        raise ArgumentError("ratio=0 removes nothing; expected the share of channels that is to go, in (0, 1).")


def _table(
    model: nn.Module,
    groups: ChannelGroups,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None,
    measuring: LatencyOptions,
    request: Request,
) -> LatencyTable | None:
    """Measure a table of times, or check the given one; None without a target of latency."""
    given = measuring.given
    if request.target_latency is None or given is None:
        return None
    if isinstance(given, LatencyTable):
        check_table(given, groups, input_identity(args, kwargs))
        return given
    return table_of(model, groups, args, kwargs, given, request.alignment)


def _space(options: PruneOptions, model: nn.Module, groups: ChannelGroups, table: LatencyTable | None) -> SearchSpace:
    """Make the space of the widths, and check the budget before data is run, which may take long.

    Raises:
        ArgumentError: the dense model keeps within the budget; nothing can shrink.
        PlanError: the budget cannot be reached.
    """
    request = options.request
    limits = _limits(groups, request, table)
    numbers = {group.name: number for number, group in enumerate(groups)}

    def space_of(ranked: RankedGroups) -> SearchSpace:
        free = np.array([numbers[one.group.name] for one in ranked.steps], np.int64)
        if not len(free):
            raise ArgumentError(f"no channel group of {groups.graph.model_type} can shrink, so there is no search.")
        space = SearchSpace.of(ranked, SearchBudget.of(groups, free, limits, table))
        n_whole = len(groups) - len(free)
        said = f"min_width={request.min_width}, alignment {request.alignment.name!r}, max_ratio={request.max_ratio}"
        space.check_reachable(f"{said} and {n_whole} groups that stay whole")
        return space

    space = space_of(RankedGroups.of(groups, request, None, with_scores=False))
    if space.budget.holds(tuple(space.dense.tolist())):
        raise ArgumentError("the dense model keeps within the budget already. Ask for less.")
    return space_of(RankedGroups.of(groups, request, Planner.of(options, groups).statistics))


def _limits(groups: ChannelGroups, request: Request, table: LatencyTable | None) -> list[ResourceLimit]:
    """Return the bounds as shares of the dense model's."""
    found: list[ResourceLimit] = []
    if isinstance(request.ratio, float | int):
        found.append(ResourceLimit("channels", 1 - request.ratio))
    asked: list[tuple[Resource, float | None, int]] = [
        ("macs", request.target_macs, dense_cost(groups.graph).macs),
        ("params", request.target_params, dense_cost(groups.graph).n_params),
    ]
    for resource, target, dense in asked:
        if target is not None:
            found.append(ResourceLimit(resource, float(target if target <= 1 else target / max(dense, 1))))
    if table is not None:
        share, milliseconds = parse_latency(request.target_latency)
        found.append(ResourceLimit("latency", share if share is not None else (milliseconds or 0.0) / table.dense_ms))
    return found
