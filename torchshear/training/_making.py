"""From the arguments of a session to what it asks for."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from torchshear._arguments import check_flag, check_kind, check_share, parse_names
from torchshear.configs import ConfigList
from torchshear.configs._beside_options import read_entries
from torchshear.configs._planning import Widths
from torchshear.dependency import ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.errors import ArgumentError
from torchshear.options import LatencyOptions, check_criterion
from torchshear.pruners import Criterion, Ratio
from torchshear.pruners.masks._choose import Layers
from torchshear.pruners.masks._patterns import Reduce
from torchshear.pruners.regularizers import Regularizer
from torchshear.pruners.schedules import Schedule
from torchshear.pruners.selection._request import Request
from torchshear.speedup.latency._alignment_profiles import resolve_alignment
from torchshear.training._channel_goal import ChannelGoal
from torchshear.training._config_goal import ConfigGoal
from torchshear.training._goals import Goal
from torchshear.training._latency_goal import Inputs, LatencyGoal
from torchshear.training._lock_goal import LockGoal
from torchshear.training._progressive import N_STAGES, check_progressive
from torchshear.training._training_config import TrainingConfig, pattern_of_blocks
from torchshear.training._weight_goal import WeightGoal

_OF_CHANNELS: Final = ("target_macs", "target_params", "target_latency", "roles", "exclude", "align")
_OF_WEIGHTS: Final = ("layers", "reduce")
_BESIDE_A_CONFIG: Final = ("pattern", "layers", "reduce", "target_latency")
_MOST_OF_A_LAYER: Final = 0.98
_LOCK: Final = "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Request of a session, as it was given; see `PruningSession`."""

    schedule: Schedule
    criterion: str | Criterion | None
    ratio: Ratio | None
    target_macs: float | None
    target_params: float | None
    target_latency: float | str | None
    measuring: LatencyOptions
    pattern: str | None
    config: ConfigList | TrainingConfig | None
    soft: bool
    progressive: bool
    scope: str
    min_ratio: Ratio
    max_ratio: Ratio | None
    group_reduction: str
    normalize: str
    roles: str | Collection[str] | None
    exclude: str | Collection[str]
    align: int | str | Alignment | None
    min_width: int
    layers: Layers
    reduce: Reduce | None
    training: TrainingConfig | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Refuse options that do not go together, before the model is traced."""
        check_criterion(self.criterion)
        if self.config is not None:
            object.__setattr__(self, "training", self._read_config())
            return
        if self.pattern is not None:
            check_kind("pattern", self.pattern, str, "as '4x1', '2:4' or 'lock', or None for channels")
        if self.progressive:
            check_progressive(self.pattern, self.schedule)
        beside = _OF_WEIGHTS if self.pattern is None else _OF_CHANNELS
        for name in beside:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, tuple) and not value):
                goes_with = "a pattern" if self.pattern is None else "channels"
                raise ArgumentError(
                    f"{name}= goes with {goes_with}, and pattern={self.pattern!r}; leave one of them away."
                )
        if self.pattern is None:
            self.request()
        elif self.pattern == _LOCK and (self.ratio is not None or self.soft):
            raise ArgumentError("pattern='lock' keeps the zeros that there are; leave ratio= and soft= away.")
        elif isinstance(self.ratio, Mapping):
            raise ArgumentError("ratio= is a mapping; with a pattern give layers= a mapping from layers to ratios.")
        else:
            check_share("ratio", self.share)

    def _read_config(self) -> TrainingConfig:
        """Read the config, beside which only some options may stand."""
        for name in _BESIDE_A_CONFIG:
            if getattr(self, name) is not None:
                raise ArgumentError(f"config= says what goes, and {name}= says it too; leave one of them away.")
        if isinstance(self.config, TrainingConfig):
            return self.config
        assert self.config is not None, "read where one is given"
        entries = read_entries(self.config, self.request(), self.criterion is not None, may_mask=True)
        if not self.progressive:
            return TrainingConfig(entries=entries)
        units = [entry for entry in entries if not entry.excludes]
        for entry in units:
            check_progressive(pattern_of_blocks(entry), self.schedule)
        return TrainingConfig(
            entries=entries, stages={entry.label: self.schedule.frequency // N_STAGES for entry in units}
        )

    @property
    def share(self) -> float:
        """The share of single weights."""
        if isinstance(self.layers, Mapping) and self.layers:
            return max(self.layers.values())
        return 0.5 if self.ratio is None else float(self.ratio)  # type: ignore[arg-type]

    @property
    def criteria(self) -> tuple[str | Criterion, ...]:
        """Criteria that score units."""
        own = "l1" if self.criterion is None else self.criterion
        return (own,) if self.training is None else self.training.criteria(str(own))

    @property
    def single_weights(self) -> str:
        """Words that ask for single weights, or for channels little by little; "" if none do."""
        if self.training is not None:
            return self.training.single_weights
        return "" if self.pattern is None else f"pattern={self.pattern!r}"

    def request(self) -> Request:
        """The request for channels."""
        return Request(
            criterion="l1" if self.criterion is None else self.criterion,
            ratio=self.ratio,
            scope=self.scope,
            target_macs=self.target_macs,
            target_params=self.target_params,
            target_latency=self.target_latency,
            min_ratio=self.min_ratio,
            max_ratio=self.max_ratio,
            group_reduction=self.group_reduction,
            normalize=self.normalize,
            roles=self.roles,
            exclude=self.exclude,
            alignment=resolve_alignment(
                "auto" if self.align is None and self.target_latency is not None else self.align, self.measuring.device
            ),
            min_width=self.min_width,
        )

    def options_of_masks(self) -> dict[str, Any]:
        """The options of `choose_masks`."""
        return {
            "layers": self.layers,
            "scope": "local" if self.scope == "auto" else self.scope,
            "min_ratio": self.min_ratio,
            "max_ratio": _MOST_OF_A_LAYER if self.max_ratio is None else self.max_ratio,
            "reduce": "mean" if self.reduce is None else self.reduce,
        }


def check_settings(schedule: object, regularizer: object, soft: object, progressive: object) -> None:
    """Raise ArgumentError for what is no schedule, regularizer or flag."""
    check_kind("schedule", schedule, Schedule, "a schedule, as torchshear.schedules.AGP(end=1000)")
    if regularizer is not None:
        check_kind("regularizer", regularizer, Regularizer, "one of torchshear.regularizers, or None")
    check_flag("soft", soft)
    check_flag("progressive", progressive)


def make_goal(model: nn.Module, groups: ChannelGroups, asked: Asked, inputs: Inputs) -> Goal:
    """Make what a session asks of a model; for a target of latency that is measured first.

    Raises:
        ArgumentError: it does not fit the model.
        PlanError: it cannot be reached.
        MaskError: the pattern fits no layer.
    """
    if asked.training is not None:
        request = asked.request()
        widths = Widths(request.alignment, request.min_width)
        return ConfigGoal(groups, model, asked.training, str(request.criterion), widths, asked.schedule, asked.soft)
    if asked.target_latency is not None and asked.measuring.given is not None:
        return LatencyGoal.measured(model, groups, asked.request(), asked.soft, inputs, asked.measuring.given)
    if asked.pattern is None:
        return ChannelGoal(groups, asked.request(), asked.soft)
    if asked.pattern == _LOCK:
        layers = None if asked.layers is None else parse_names("layers", asked.layers)
        return LockGoal(groups, model, layers, asked.schedule)
    options, score = asked.options_of_masks(), asked.criteria[0]
    stage = asked.schedule.frequency // N_STAGES if asked.progressive else 0
    return WeightGoal(groups, model, asked.pattern, asked.share, score, options, asked.soft, stage)
