"""Options of `plan`, `prune` and `compare`: checked before a model is traced, and held as frozen values."""

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from numbers import Number
from typing import Any, Final, Literal, ParamSpec, TypeVar

from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag, check_kind, check_one_of, quote
from torchshear._other_tools import unknown_keyword
from torchshear.calibration import Loss, Statistics
from torchshear.calibration._statistics import ALL_SUMS, SUMS_OF_GRADIENTS
from torchshear.configs import ConfigList, ResolvedConfig, load_config, parse_config, resolve
from torchshear.configs._entry import DEFAULT_PATTERN, Entry
from torchshear.configs._planning import Widths, plan_config
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._form import FormKind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, KeywordError
from torchshear.pruners import Criterion, channel_means
from torchshear.pruners._collecting import collect
from torchshear.pruners._planning import check_request, plan_units
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._targets import choose_targets
from torchshear.speedup.shrinking._whole_groups import NativeTradeoff

Form = Literal["auto", "native", "traced"]
FoldBias = bool | Literal["means"]
DEFAULT_BATCHES: Final = 32

_P = ParamSpec("_P")
_R = TypeVar("_R")


def checked_call(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Refuse arguments that a public function does not have in our own words, and calls without those that it needs.

    Keywords of other pruning tools are answered with what to use instead of them.
    """
    signature = inspect.signature(function)
    name = function.__name__

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for keyword in kwargs:
            if keyword not in signature.parameters:
                raise unknown_keyword(name, keyword, ", ".join(signature.parameters))
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise KeywordError(f"{name}(): {error}; it has {', '.join(signature.parameters)}.") from error
        return function(*args, **kwargs)

    return checked


def check_criterion(criterion: object) -> None:
    """Raise ArgumentError for what is neither the name of a criterion, nor a function like one, nor None."""
    if criterion is not None and not isinstance(criterion, str) and not callable(criterion):
        raise ArgumentError(f"criterion is {type(criterion).__name__}; expected the name of one, or a function.")


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationOptions:
    """Batches that a call may run, and the loss for gradients.

    Attributes:
        loader: gives batches, once or more often; None without data.
        loss_fn: the loss, or None.
        batches: how many to run.
    """

    loader: Iterable[Any] | None
    loss_fn: Loss | None = None
    batches: int = DEFAULT_BATCHES

    @classmethod
    def parse(
        cls, data: object, loss_fn: Loss | None, batches: int | None, recalibrate: object
    ) -> "CalibrationOptions":
        """Check the data that is given; take the batches of an iterator, which runs out, now.

        Raises:
            ArgumentError: a loss, a number of batches or `recalibrate` is given without data; the data gives no
                batches, or not a whole number of them.
        """
        check_flag("recalibrate", recalibrate)
        if data is None:
            unused = {"loss_fn": loss_fn, "batches": batches, "recalibrate": recalibrate or None}
            for name in (name for name, value in unused.items() if value is not None):
                raise ArgumentError(f"{name}= is given without data; give batches of it as data=, or leave it away.")
            return cls(None)
        count = DEFAULT_BATCHES if batches is None else batches
        check_count("batches", count)
        if not isinstance(data, Iterable) or isinstance(data, str | bytes):
            raise ArgumentError(
                f"data is {type(data).__name__}; expected something that gives batches, as a DataLoader."
            )
        return cls(list(islice(data, count)) if isinstance(data, Iterator) else data, loss_fn, count)

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

    def check_used(self, criteria: Collection[str | Criterion], is_used_otherwise: bool) -> None:
        """Raise ArgumentError for data that no criterion looks at, and that nothing else uses."""
        if self.loader is not None and not is_used_otherwise and not any(needs_of(one) for one in criteria):
            names = ", ".join(str(name) for name in criteria)
            raise ArgumentError(f"data is given, and no criterion looks at it ({names}). Leave data= away.")


@dataclass(frozen=True, slots=True, eq=False)
class PruneOptions:
    """Everything that a call of `prune` asks for.

    Attributes:
        request: which units go; of a call with a config, its criterion and widths alone.
        entries: entries of a config; empty without one.
        calibration: the data.
        recalibrates: True if batch norms get new statistics after the cut.
        fold_bias: what is folded into biases: nothing, constants of removed channels, or their "means" over the data.
        form: the form of the result: "auto", "native" or "traced".
    """

    request: Request
    entries: tuple[Entry, ...]
    calibration: CalibrationOptions
    recalibrates: bool
    fold_bias: FoldBias
    form: Form

    @classmethod
    def parse(
        cls,
        request: Request,
        *,
        has_criterion: bool,
        config: ConfigList | None,
        submodules: Sequence[str] | None,
        calibration: CalibrationOptions,
        recalibrate: bool,
        fold_bias: FoldBias,
        form: Form,
    ) -> "PruneOptions":
        """Check that options fit together.

        Raises:
            ArgumentError: two options contradict each other, or data is missing or used by nothing.
        """
        entries = () if config is None else _read_entries(config, request, has_criterion)
        check_one_of("form", form, ("auto", "native", "traced"))
        if submodules is not None:
            check_kind("submodules", submodules, Sequence, "a list of names of modules, as ['backbone']")
        if not (isinstance(fold_bias, bool) or (isinstance(fold_bias, str) and fold_bias == "means")):
            raise ArgumentError(f"fold_bias={quote(fold_bias)}; expected False, True or 'means'.")
        uses_means = fold_bias == "means"
        if uses_means and calibration.loader is None:
            raise ArgumentError("fold_bias='means' takes means over data; give batches as data=, or write True.")
        options = cls(request, entries, calibration, recalibrate, fold_bias, form)
        if submodules is not None and calibration.loader is not None:
            on_data = [str(one) for one in options.criteria if needs_of(one)] + ["fold_bias='means'"] * uses_means
            for name in on_data:  # batches would have to reach parts of a model, and only their graphs are known
                raise ArgumentError(
                    f"submodules= and {name}: batches are for the whole model, of which only parts are captured "
                    f"({', '.join(map(str, submodules))}). Prune each part by itself, with batches of what it is "
                    f"called with as data=, and put results in place; or choose a criterion of weights."
                )
        for criterion in options.criteria:
            missing = calibration.missing_for(criterion)
            if missing:
                raise ArgumentError(f"the criterion {criterion!r} {missing}")
        calibration.check_used(options.criteria, recalibrate or uses_means)
        return options

    @property
    def criteria(self) -> list[str | Criterion]:
        """Criteria that score units."""
        if not self.entries:
            return [self.request.criterion]
        named = [entry.criterion or self.request.criterion for entry in self.entries if not entry.excludes]
        return list(dict.fromkeys(named))

    def form_of(self, planner: "Planner") -> tuple[FormKind | None, NativeTradeoff | None]:
        """Return the form that the result must have, None for any; and which groups may stay whole for a native one."""
        if self.form == "traced":
            return "traced", None
        if self.form == "native":
            return "native", NativeTradeoff(planner.plan, max_cost=1.0)
        return None, NativeTradeoff(planner.plan)

    def means(self, groups: ChannelGroups) -> dict[tuple[str, int], Tensor] | None:
        """Average over the data what layers read, if that is to be folded."""
        if self.fold_bias != "means":
            return None
        assert self.calibration.loader is not None, "checked before the model was traced"
        return channel_means(groups, self.calibration.loader, self.calibration.batches, progress=False)


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
    def of(cls, options: PruneOptions, model: nn.Module, groups: ChannelGroups) -> "Planner":
        """Apply a config to a model, and collect the statistics that criteria need.

        Raises:
            ArgumentError: the request or the config does not fit the model.
            DataError: the data does not fit the model.
        """
        request, resolved = options.request, None
        if options.entries:
            assert isinstance(request.criterion, str), "checked with the config"
            resolved = resolve(model, options.entries, groups, request.criterion)
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
            groups, data.loader, data.loss_fn, data.batches, progress=False, criteria=on_data, exclude=whole
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


_BESIDE_A_CONFIG: Final = ("criterion", "alignment", "min_width")


def _read_entries(config: ConfigList, request: Request, has_criterion: bool) -> tuple[Entry, ...]:
    """Read the entries of a config, which may ask for channels and heads alone."""
    for field in fields(request):
        value = getattr(request, field.name)
        is_empty = value is None or (isinstance(value, tuple | list) and not value)
        is_plain = isinstance(value, str | Number) and isinstance(field.default, str | Number)
        is_default = is_plain and value == field.default
        if field.name not in _BESIDE_A_CONFIG and not (is_empty or is_default):
            raise ArgumentError(
                f"config= says which layers lose how much, and {field.name}={quote(value)} says something else of "
                f"that. Give one of them; beside a config there may be criterion, align and min_width."
            )
    criterion = request.criterion if has_criterion else None
    if criterion is not None and not isinstance(criterion, str):
        raise ArgumentError("config= goes with the name of a criterion, and a function is given; register it first.")
    entries = parse_config(load_config(config) if isinstance(config, str | os.PathLike) else config)
    for entry in entries:
        if entry.criterion is not None and criterion is not None and not entry.excludes:
            raise ArgumentError(
                f"{entry.label} says a criterion of its own ({entry.criterion}), as those of Neural Compressor always "
                f"do, and criterion={criterion!r} says another. Leave criterion= away."
            )
        if not (entry.excludes or entry.removes_channels or entry.pattern == DEFAULT_PATTERN):
            raise ArgumentError(
                f"{entry.label} sets single weights to zero (pattern {entry.pattern!r}), which makes nothing smaller, "
                f"and prune only removes. Use ConfigPruner or LevelPruner of torchshear.compat.nni, or "
                f"torchshear.pruners.masks.choose_masks."
            )
    return entries
