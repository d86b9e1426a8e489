"""Options of `plan`, `prune` and `compare`: checked before a model is traced, and held as frozen values."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, get_args

from torch import nn

from torchshear._arguments import check_count, check_flag, check_kind, check_one_of, quote
from torchshear._other_tools import unknown_keyword
from torchshear.calibration import Loss, Progress, Statistics
from torchshear.calibration._batches import DEFAULT_BATCHES, check_batches
from torchshear.calibration._statistics import ALL_SUMS, SUMS_OF_GRADIENTS
from torchshear.configs import ConfigList, ResolvedConfig, resolve
from torchshear.configs._beside_options import bound_by, read_entries
from torchshear.configs._entry import Entry
from torchshear.configs._planning import Widths, plan_config
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._purposes import READING_PURPOSES
from torchshear.dependency.plans._form import FormKind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, KeywordError
from torchshear.pruners import Criterion
from torchshear.pruners._collecting import collect
from torchshear.pruners._planning import check_request, plan_units
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._targets import choose_targets
from torchshear.speedup.compensation._frontier import DEFAULT_MEMORY, MOST_MEMORY
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.shrinking._whole_groups import NativeTradeoff

Form = Literal["auto", "native", "traced"]
CompensationMethod = Literal["refit", "statistics", "means", "constants"]
Compensation = Literal["none", CompensationMethod]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def checked_call(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Refuse arguments that a public function does not have in our own words, and calls without those that it needs.

    Keywords of other pruning tools are answered with what to use instead of them.
    """
    signature = inspect.signature(function)
    name = function.__name__ if function.__name__ != "__init__" else function.__qualname__.split(".")[0]
    known = ", ".join(one for one in signature.parameters if one != "self")

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for keyword in kwargs:
            if keyword not in signature.parameters:
                raise unknown_keyword(name, keyword, known)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise KeywordError(f"{name}(): {error}; it has {known}.") from error
        return function(*args, **kwargs)

    return checked


def check_criterion(criterion: object) -> None:
    """Raise ArgumentError for what is neither the name of a criterion, nor a function like one, nor None."""
    if criterion is not None and not isinstance(criterion, str) and not callable(criterion):
        raise ArgumentError(f"criterion is {type(criterion).__name__}; expected the name of one, or a function.")


def runs_data(compensate: Compensation) -> bool:
    """Return True for a compensation that runs batches."""
    return compensate not in ("none", "constants")


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationOptions:
    """Batches that a call may run, and the loss for gradients.

    Attributes:
        loader: gives batches, once or more often; None without data.
        loss_fn: the loss, or None.
        batches: how many to run; None: the first 32, or all where there are fewer.
        memory: bytes that a refit may hold of activations in memory.
        progress: how runs over the data are shown.
    """

    loader: Iterable[Any] | None
    loss_fn: Loss | None = None
    batches: int | None = None
    memory: int = DEFAULT_MEMORY
    progress: Progress = False

    @classmethod
    def parse(
        cls,
        data: object,
        loss_fn: Loss | None,
        batches: int | None,
        compensate: Compensation,
        memory: int | None = None,
    ) -> "CalibrationOptions":
        """Check the data that is given; take the batches of an iterator, which runs out, now.

        Raises:
            ArgumentError: the compensation is unknown, or needs data that is not given; a loss or a number of batches
                is given without data; the data gives no batches, or not a whole number of them; memory is given, and
                nothing is refitted.
        """
        check_one_of("compensate", compensate, get_args(Compensation))
        if memory is not None and compensate != "refit":
            raise ArgumentError("memory= is what a refit may take; give it with compensate='refit', or leave it away.")
        size = DEFAULT_MEMORY if memory is None else memory
        check_count("memory", size, most=MOST_MEMORY)
        if data is None:
            if runs_data(compensate):
                raise ArgumentError(
                    f"compensate={compensate!r} runs data; give batches as data=, or write 'constants', which needs "
                    f"none."
                )
            for name in (name for name, value in {"loss_fn": loss_fn, "batches": batches}.items() if value is not None):
                raise ArgumentError(f"{name}= is given without data; give batches of it as data=, or leave it away.")
            return cls(None)
        check_batches(batches)
        if not isinstance(data, Iterable) or isinstance(data, str | bytes):
            raise ArgumentError(
                f"data is {type(data).__name__}; expected something that gives batches, as a DataLoader."
            )
        options = cls(data, loss_fn, batches, size)
        return options.holding_batches() if isinstance(data, Iterator) else options

    def holding_batches(self) -> "CalibrationOptions":
        """Return the same with the batches taken, so that whatever the loader does, all that look see the same ones."""
        if self.loader is None:
            return self
        n_batches = DEFAULT_BATCHES if self.batches is None else self.batches
        return replace(self, loader=list(islice(self.loader, n_batches)))

    def missing_for(self, criterion: str | Criterion) -> str:
        """Return what a criterion needs and is not given, with advice, or "".

        Functions that do not declare what they need are called with what is there, and raise themselves.

        Raises:
            ArgumentError: there is no criterion of that name.
        """
        needs = needs_of(criterion)
        if needs == ALL_SUMS:
            return ""
        on_gradients = bool(needs & SUMS_OF_GRADIENTS)
        if needs and self.loader is None:
            loss = ", and a loss as loss_fn=" if on_gradients else ""
            return f"looks at {'gradients' if on_gradients else 'activations'}; give batches as data={loss}."
        if on_gradients and self.loss_fn is None:
            return "looks at gradients; give a loss as loss_fn=."
        return ""

    def check_used(self, criteria: Collection[str | Criterion], compensate: Compensation) -> None:
        """Raise ArgumentError for data that neither a criterion nor the compensation looks at."""
        if self.loader is not None and not runs_data(compensate) and not any(needs_of(one) for one in criteria):
            names = ", ".join(str(name) for name in criteria)
            raise ArgumentError(
                f"data is given, and no criterion looks at it ({names}), nor does compensate={compensate!r}. Leave "
                f"data= away, or use it, as by compensate='refit'."
            )

    def check_parts(
        self, submodules: Sequence[str] | None, criteria: Collection[str | Criterion], compensate: Compensation
    ) -> None:
        """Raise ArgumentError for data that would have to reach parts of a model, of which only the graphs are known.

        New statistics are no such case: the whole model is run for them.
        """
        if submodules is None or self.loader is None:
            return
        on_parts = [f"compensate={compensate!r}"] if runs_data(compensate) and compensate != "statistics" else []
        for name in [str(one) for one in criteria if needs_of(one)] + on_parts:
            raise ArgumentError(
                f"submodules= and {name}: batches are for the whole model, of which only parts are captured "
                f"({', '.join(map(str, submodules))}). Prune each part by itself, with batches of what it is called "
                f"with as data=, and put results in place; or choose what needs no data."
            )


@dataclass(frozen=True, slots=True)
class LatencyOptions:
    """Device on which latency is measured, and a demand on the result.

    Attributes:
        given: the device, or a table that was measured on one; None where nothing is measured.
        must_be_faster: whether a result that is not measurably faster is refused.
    """

    given: Device | LatencyTable | None
    must_be_faster: bool

    @classmethod
    def parse(cls, target: object, device: object, must_be_faster: bool | None) -> "LatencyOptions":
        """Check what is given beside a target of latency, or in place of one.

        Raises:
            ArgumentError: the device is none, or `must_be_faster` is no flag.
        """
        if device is not None and not isinstance(device, Device | LatencyTable):
            raise ArgumentError(
                f"device={quote(device)}; expected a torchshear.speedup.latency.Device, or a LatencyTable of one."
            )
        if must_be_faster is not None:
            check_flag("must_be_faster", must_be_faster)
        must = target is not None if must_be_faster is None else must_be_faster
        if target is None and device is None and not must:
            return cls(None, False)
        return cls(Device() if device is None else device, must)

    @property
    def device(self) -> Device | None:
        """The device on which the result is measured; None for no measurement."""
        return self.given.device if isinstance(self.given, LatencyTable) else self.given


@dataclass(frozen=True, slots=True, eq=False)
class PruneOptions:
    """Everything that a call of `prune` asks for.

    Attributes:
        request: which units go; of a call with a config, its criterion and widths alone.
        entries: entries of a config; empty without one.
        calibration: the data.
        form: the form of the result: "auto", "native" or "traced".
        compensate: what brings the result nearer to its original, once it is proved.
        resolved: what the entries ask of the model; None without entries, and before `under_config`.
    """

    request: Request
    entries: tuple[Entry, ...]
    calibration: CalibrationOptions
    form: Form
    compensate: Compensation
    resolved: ResolvedConfig | None = None

    @classmethod
    def parse(
        cls,
        request: Request,
        *,
        has_criterion: bool,
        config: ConfigList | None,
        submodules: Sequence[str] | None,
        calibration: CalibrationOptions,
        compensate: Compensation,
        form: Form,
    ) -> "PruneOptions":
        """Check that options fit together.

        Raises:
            ArgumentError: two options contradict each other, or data is missing or used by nothing.
        """
        entries = () if config is None else read_entries(config, request, has_criterion)
        check_one_of("form", form, ("auto", "native", "traced"))
        if submodules is not None:
            check_kind("submodules", submodules, Sequence, "a list of names of modules, as ['backbone']")
        options = cls(request, entries, calibration, form, compensate)
        calibration.check_parts(submodules, options.criteria, compensate)
        for criterion in options.criteria:
            missing = calibration.missing_for(criterion)
            if missing:
                raise ArgumentError(f"the criterion {criterion!r} {missing}")
        calibration.check_used(options.criteria, compensate)
        return options

    @property
    def criteria(self) -> list[str | Criterion]:
        """Criteria that score units."""
        if not self.entries:
            return [self.request.criterion]
        named = [entry.criterion or self.request.criterion for entry in self.entries if not entry.excludes]
        return list(dict.fromkeys(named))

    def under_config(self, model: nn.Module, groups: ChannelGroups) -> "PruneOptions":
        """Return the same with the entries applied to a model; beside a target they bound what groups lose.

        Raises:
            ArgumentError: the config does not fit the model.
        """
        request = self.request
        if not self.entries:
            return self
        assert isinstance(request.criterion, str), "checked with the config"
        resolved = resolve(model, self.entries, groups, request.criterion)
        bounded = request if request.target_latency is None else bound_by(resolved, request)
        return replace(self, request=bounded, resolved=resolved)

    def with_reconstruction(self, groups: ChannelGroups) -> "PruneOptions":
        """Return the same with the criterion that goes with a refit, if it can score all groups."""
        are_read = all(any(member.purposes & READING_PURPOSES for member in group.members) for group in groups.prunable)
        if self.entries or not are_read:
            return self
        return replace(self, request=replace(self.request, criterion="reconstruction"))

    def form_of(self, planner: "MakesPlans") -> tuple[FormKind | None, NativeTradeoff | None]:
        """Return the form that the result must have, None for any; and which groups may stay whole for a native one."""
        if self.form == "traced":
            return "traced", None
        if self.form == "native":
            return "native", NativeTradeoff(planner.plan, max_cost=1.0)
        return None, NativeTradeoff(planner.plan)


class MakesPlans(Protocol):
    """Something that makes plans of one model, with some groups left whole if that is asked for."""

    def plan(self, whole: Collection[str] = ()) -> PruningPlan:
        """Choose the units that stay."""


@dataclass(frozen=True, slots=True, eq=False)
class Planner:
    """Makes plans of one model, with some groups left whole if that is asked for.

    Attributes:
        request: which units go.
        groups: the analysed network.
        resolved: the shares of each layer by a config; None without one.
        statistics: statistics of the data; None where no criterion looks at any.
    """

    request: Request
    groups: ChannelGroups
    resolved: ResolvedConfig | None
    statistics: Statistics | None

    @classmethod
    def of(cls, options: PruneOptions, groups: ChannelGroups) -> "Planner":
        """Collect the statistics that criteria need.

        Raises:
            ArgumentError: the request does not fit the model.
            DataError: the data does not fit the model.
        """
        request, resolved = options.request, options.resolved
        on_data = [criterion for criterion in options.criteria if needs_of(criterion)]
        data = options.calibration
        if data.loader is None or not on_data:
            return cls(request, groups, resolved, None)
        if resolved is not None:  # no gradient needs to reach groups that stay whole
            whole = [group.name for group in groups if group.name not in resolved.ratios]
        else:
            check_request(groups, request)  # before data is run, which may take long
            targets = choose_targets(groups, request.shares, request.roles, request.exclude)
            whole = [name for name, target in targets.items() if target.ratio is None]
        statistics = collect(
            groups, data.loader, data.loss_fn, data.batches, data.progress, criteria=on_data, exclude=whole
        )
        return cls(request, groups, resolved, statistics)

    def plan(self, whole: Collection[str] = ()) -> PruningPlan:
        """Choose the units that stay.

        Args:
            whole: names of groups to leave whole, so that the model keeps its own class.
        """
        if self.resolved is None:
            return plan_units(self.groups, self.request, statistics=self.statistics, whole=whole)
        widths = Widths(self.request.alignment, self.request.min_width)
        return plan_config(self.groups, self.resolved, widths, self.statistics, whole)
