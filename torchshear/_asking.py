"""What a call of `prune` asks, checked before the model is traced: a request or a config, and the data for both."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal

from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag, check_kind, check_one_of, shown
from torchshear._words import Selection, Sight
from torchshear.calibration import ALL_SUMS, SUMS_OF_GRADIENTS, Loss, Statistics
from torchshear.configs import (
    DEFAULT_PATTERN,
    ConfigList,
    Entry,
    ResolvedConfig,
    Widths,
    load_config,
    parse_config,
    plan_config,
    resolve,
)
from torchshear.dependency import ChannelGroups, FormKind, PruningPlan
from torchshear.dependency.alignment import Alignment
from torchshear.errors import ArgumentError
from torchshear.pruners import (
    Criterion,
    Ratio,
    Request,
    channel_means,
    check_request,
    choose_targets,
    collect,
    plan_units,
)
from torchshear.pruners.criteria import needs_of
from torchshear.speedup import Leave

BATCHES: Final = 32
_OF_THE_REQUEST: Final = (*Selection.__annotations__, "axes", "exclude")


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Batches to look at.

    Attributes:
        loader: gives batches, once or more often; None without data.
        loss_fn: the loss, or None.
        batches: how many to run.
    """

    loader: Iterable[Any] | None
    loss_fn: Loss | None
    batches: int


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What is asked of a pruning.

    Attributes:
        request: what is asked of the plan; of a config, its criterion and widths alone.
        entries: those of a config; empty without one.
        data: what is looked at.
        recalibrates: whether batch norms get new statistics after the cut.
        fold_bias: what is folded into biases: nothing, constants of removed channels, or their "means" over the data.
        form: what the result is to be, see `Choice`.
    """

    request: Request
    entries: tuple[Entry, ...]
    data: Data
    recalibrates: bool
    fold_bias: bool | Literal["means"]
    form: str = "auto"

    @property
    def criteria(self) -> list[str | Criterion]:
        """What units are scored by."""
        if not self.entries:
            return [self.request.criterion]
        named = [entry.criterion or self.request.criterion for entry in self.entries if not entry.excludes]
        return list(dict.fromkeys(named))

    def planning(self, model: nn.Module, groups: ChannelGroups) -> "Planning":
        """Look at the data, and for a config at what it asks of each layer: all that plans are made of."""
        resolved = None
        if self.entries:
            assert isinstance(self.request.criterion, str), "checked with the config"
            resolved = resolve(model, self.entries, groups, self.request.criterion)
        return Planning(self.request, groups, resolved, self._statistics(groups, resolved))

    def form_of(self, planning: "Planning") -> tuple[FormKind | None, Leave | None]:
        """The form that the result must have, None for any; and which groups may stay whole for the native one."""
        if self.form == "traced":
            return "traced", None
        return ("native", Leave(planning.plan, most=1.0)) if self.form == "native" else (None, Leave(planning.plan))

    def means(self, groups: ChannelGroups) -> dict[tuple[str, int], Tensor] | None:
        """Means over the data of what layers read, if these are to be folded."""
        if self.fold_bias != "means":
            return None
        assert self.data.loader is not None, "checked before the model was traced"
        return channel_means(groups, self.data.loader, self.data.batches, progress=False)

    def _statistics(self, groups: ChannelGroups, resolved: ResolvedConfig | None) -> Statistics | None:
        looking = [criterion for criterion in self.criteria if needs_of(criterion)]
        if self.data.loader is None or not looking:
            return None
        if resolved is None:
            check_request(groups, self.request)  # before data is run, which may take long
        loader, loss_fn, batches = self.data.loader, self.data.loss_fn, self.data.batches
        whole = self._whole(groups, resolved)
        return collect(groups, loader, loss_fn, batches, progress=False, criteria=looking, exclude=whole)

    def _whole(self, groups: ChannelGroups, resolved: ResolvedConfig | None) -> list[str]:
        """Groups that are to stay whole, so that no gradient needs to reach them."""
        if resolved is not None:
            return [group.name for group in groups if group.name not in resolved.ratios]
        request = self.request
        targets = choose_targets(groups, request.shares, request.axes, request.exclude)
        return [name for name, target in targets.items() if target.ratio is None]


@dataclass(frozen=True, slots=True, eq=False)
class Planning:
    """What plans of one model are made of.

    Attributes:
        request: what is asked.
        groups: the analysed network.
        resolved: what a config asks of each layer; None without one.
        statistics: what was seen of the data; None where nothing looks at any.
    """

    request: Request
    groups: ChannelGroups
    resolved: ResolvedConfig | None
    statistics: Statistics | None

    def plan(self, whole: Collection[str] = ()) -> PruningPlan:
        """The plan; with some groups left whole so that the model keeps its own class."""
        if self.resolved is None:
            return plan_units(self.groups, self.request, statistics=self.statistics, whole=whole)
        widths = Widths(self.request.alignment, self.request.min_width)
        return plan_config(self.groups, self.resolved, widths, self.statistics, whole)


def ask(
    criterion: str | Criterion | None,
    ratio: Ratio | None,
    alignment: Alignment,
    min_width: int,
    choice: Mapping[str, Any],
    fold_bias: bool | Literal["means"] = False,
) -> Asked:
    """Check what is asked, and put it together.

    Args:
        criterion: what units are scored by; None: "l1", or what a config says.
        ratio: fraction to remove, or None.
        alignment: what kept widths are.
        min_width: the fewest units to keep in a group.
        choice: the other words, see `Choice`.
        fold_bias: what is folded into biases.

    Raises:
        ArgumentError: a word is outside what it may be, two contradict each other, or data is missing or looked at by
            nothing.
    """
    if criterion is not None and not isinstance(criterion, str) and not callable(criterion):
        raise ArgumentError(f"criterion is {type(criterion).__name__}; expected the name of one, or a function.")
    check_flag("recalibrate", choice.get("recalibrate", False))
    criterion_or_l1 = "l1" if criterion is None else criterion
    widths: dict[str, Any] = {"criterion": criterion_or_l1, "alignment": alignment, "min_width": min_width}
    entries: tuple[Entry, ...] = ()
    words = {name: choice[name] for name in _OF_THE_REQUEST if name in choice}
    if choice.get("config") is not None:
        _check_alone({"ratio": ratio} | words)
        entries = _read_entries(choice["config"], criterion)
        request = Request(**widths)
    else:
        request = Request(ratio=ratio, **widths, **words)
    form = choice.get("form", "auto")
    check_one_of("form", form, ("auto", "native", "traced"))
    submodules = choice.get("submodules")
    if submodules is not None:
        check_kind("submodules", submodules, Sequence, "a list of names of modules, as ['backbone']")
    asked = Asked(request, entries, read_data(choice), choice.get("recalibrate", False), fold_bias, form)
    _check_fold(fold_bias, asked.data)
    _check_parts(asked, submodules)
    check_data(asked.criteria, asked.data, asked.recalibrates or fold_bias == "means")
    return asked


def _check_parts(asked: Asked, submodules: Collection[str] | None) -> None:
    """Raise ArgumentError for data that would have to reach parts of a model: only their graphs are known."""
    looking = [str(criterion) for criterion in asked.criteria if needs_of(criterion) and asked.data.loader is not None]
    looking += ["fold_bias='means'"] if asked.fold_bias == "means" else []
    if submodules is not None and looking:
        raise ArgumentError(
            f"submodules= and {looking[0]}: batches are for the whole model, of which only parts are captured "
            f"({', '.join(map(str, submodules))}). Prune each part by itself, with batches of what it is called with "
            f"as data=, and put results in place; or choose a criterion of weights."
        )


def _check_fold(fold_bias: bool | Literal["means"], data: Data) -> None:
    if not (isinstance(fold_bias, bool) or (isinstance(fold_bias, str) and fold_bias == "means")):
        raise ArgumentError(f"fold_bias={shown(fold_bias)}; expected False, True (--fold-bias constants) or 'means'.")
    if fold_bias == "means" and data.loader is None:
        raise ArgumentError("fold_bias='means' takes means over data; give batches as data= (--data), or write True.")


def read_data(choice: Mapping[str, Any]) -> Data:
    """The data that is given; of an iterator, which runs out, the batches are taken now.

    Raises:
        ArgumentError: there are words on data without data; or it gives no batches, or not a whole number of them.
    """
    loader, batches = choice.get("data"), choice.get("batches", BATCHES)
    if loader is None:
        idle = [word for word in Sight.__annotations__ if choice.get(word) is not None and choice[word] is not False]
        if idle:
            raise ArgumentError(f"{idle[0]}= is given without data; give batches of it as data=, or leave it away.")
        return Data(None, None, BATCHES)
    check_count("batches", batches)
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes):
        raise ArgumentError(f"data is {type(loader).__name__}; expected something that gives batches, as a DataLoader.")
    if isinstance(loader, Iterator):
        loader = list(islice(loader, batches))
    return Data(loader, choice.get("loss_fn"), batches)


def check_data(criteria: Collection[str | Criterion], data: Data, is_used: bool) -> None:
    """Raise ArgumentError where data or a loss is missing, or data is given that nothing looks at."""
    for criterion in criteria:
        missing = missing_data(criterion, data)
        if missing:
            raise ArgumentError(f"the criterion {criterion!r} {missing}")
    check_looked_at(criteria, data, is_used)


def check_looked_at(criteria: Collection[str | Criterion], data: Data, is_used: bool) -> None:
    """Raise ArgumentError for data that no criterion looks at, and that is not used after the cut either."""
    if data.loader is not None and not is_used and not any(needs_of(criterion) for criterion in criteria):
        names = ", ".join(str(name) for name in criteria)
        raise ArgumentError(f"data is given, and no criterion looks at it ({names}). Leave data= away.")


def missing_data(criterion: str | Criterion, data: Data) -> str:
    """What a criterion needs and is not given, with advice, or "".

    Functions, and criteria that do not say what they need, are taken to do with what is given: they raise themselves.

    Raises:
        ArgumentError: there is no criterion of that name.
    """
    needs = needs_of(criterion)
    if needs == ALL_SUMS:
        return ""
    on_gradients = bool(needs & SUMS_OF_GRADIENTS)
    if needs and data.loader is None:
        loss = ", and a loss as loss_fn= (--loss)" if on_gradients else ""
        return f"looks at {'gradients' if on_gradients else 'activations'}; give batches as data= (--data){loss}."
    if on_gradients and data.loss_fn is None:
        return "looks at gradients; give a loss as loss_fn= (--loss)."
    return ""


def _check_alone(words: Mapping[str, Any]) -> None:
    """Raise ArgumentError for words that say what a config says."""
    for word, value in words.items():
        if value is not None and not (isinstance(value, tuple | list) and not value):
            raise ArgumentError(
                f"config= says which layers lose how much, and {word}={shown(value)} says something else of that. Give "
                f"one of them; beside a config there may be criterion, align and min_width."
            )


def _read_entries(config: ConfigList, criterion: str | Criterion | None) -> tuple[Entry, ...]:
    """The entries of a config, of channels or heads alone; all that is left open is the criterion."""
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
                f"and prune only removes. Use torchshear.compat.nni.ConfigPruner or LevelPruner, or "
                f"torchshear.pruners.masks.choose_masks."
            )
    return entries
