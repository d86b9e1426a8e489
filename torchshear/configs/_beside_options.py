"""Config lists beside other options: what may stand beside them, and what they mean beside a target."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from numbers import Number
from typing import Final

import numpy as np
from torch import Tensor

from torchshear._arguments import quote
from torchshear.calibration import Statistics
from torchshear.configs._dialects import parse_config
from torchshear.configs._entry import DEFAULT_PATTERN, Entry
from torchshear.configs._files import ConfigList, load_config
from torchshear.configs._resolved import GroupTarget, ResolvedConfig
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners.allocation._problem import CostBudget, CostTerm, Levels
from torchshear.pruners.criteria._criterion import Criterion, find_criterion
from torchshear.pruners.selection._request import Request

_BESIDE: Final = ("criterion", "alignment", "min_width", "target_latency")
_OTHER_TARGETS: Final = ("target_macs", "target_params", "target_size")
_MOST: Final = 0.98  # of a group, as where no config bounds what it loses


def read_entries(
    config: ConfigList, request: Request, has_criterion: bool, may_mask: bool = False
) -> tuple[Entry, ...]:
    """Read the entries of a config, and refuse options beside it that say the same.

    Args:
        config: the config, or the path of a file of one.
        request: the options.
        has_criterion: whether their criterion was given.
        may_mask: whether entries may ask for single weights, beside channels and heads.

    Raises:
        ArgumentError: the config is wrong, or an option beside it says what it says, or says it otherwise.
    """
    beside = (*_BESIDE, *(() if request.target_latency is None else _OTHER_TARGETS))
    for field in fields(request):
        value = getattr(request, field.name)
        is_empty = value is None or (isinstance(value, tuple | list) and not value)
        is_plain = isinstance(value, str | Number) and isinstance(field.default, str | Number)
        is_default = is_plain and value == field.default
        if field.name not in beside and not (is_empty or is_default):
            advice = "" if field.name not in _OTHER_TARGETS else " This one may stand beside target_latency=, too."
            raise ArgumentError(
                f"config= says which layers lose how much, and {field.name}={quote(value)} says something else of "
                f"that. Give one of them; beside a config there may be criterion, align, min_width and "
                f"target_latency.{advice}"
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
        if not (may_mask or entry.excludes or entry.removes_channels or entry.pattern == DEFAULT_PATTERN):
            raise ArgumentError(
                f"{entry.label} sets single weights to zero (pattern {entry.pattern!r}), which makes nothing smaller, "
                f"and prune only removes. Use ConfigPruner or LevelPruner of torchshear.compat.nni, or "
                f"torchshear.pruners.masks.choose_masks; or PruningSession(config=...), which trains."
            )
    return entries


def bound_by(resolved: ResolvedConfig, request: Request) -> Request:
    """Return a request for a target with the bounds of a config: what may go, how much at most, by which criterion.

    The share of an entry is the most that its layers may lose; where layers are ranked together, each keeps within the
    bounds of a layer, and `pool_budgets` has the share of all.

    Args:
        resolved: the config as it applies to the model.
        request: the target.
    """
    shrinking = {name: target for name, target in resolved.targets.items() if target.ratio > 0}
    most = {name: min(_bound(target), _MOST) for name, target in shrinking.items()}
    least = {name: target.entry.min_ratio for name, target in shrinking.items()}
    criteria = {name: target.entry.criterion or "l1" for name, target in shrinking.items()}
    is_one = len(set(criteria.values())) == 1
    by_filters = all(target.entry.dialect == "neural_compressor" for target in shrinking.values())
    return replace(
        request,
        criterion=next(iter(criteria.values())) if is_one else _criterion_by_group(criteria),
        ratio={name: target.ratio for name, target in shrinking.items()},
        min_ratio={name: min(share, most[name]) for name, share in least.items()} if any(least.values()) else 0.0,
        max_ratio=most,
        group_reduction="filters" if by_filters else "sum",
    )


def _bound(target: GroupTarget) -> float:
    return target.ratio if target.entry.pool is None else target.entry.max_ratio


def _criterion_by_group(names: Mapping[str, str]) -> Criterion:
    """Return a criterion that scores each group by its own; such scores do not compare between groups."""

    def scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
        return find_criterion(names[group.name])(group, weights, statistics)

    scores.__name__ = ", ".join(sorted(set(names.values())))
    return scores


def pool_budgets(resolved: ResolvedConfig, groups: ChannelGroups, levels: Sequence[Levels]) -> list[CostBudget]:
    """Return for each pool of a config what its layers may lose together, for the exact solver.

    Args:
        resolved: the config as it applies to the model.
        groups: the analysed network.
        levels: the widths that groups may have.
    """
    pools: dict[str, list[Levels]] = {}
    entries: dict[str, Entry] = {}
    for one in levels:
        entry = resolved.targets[one.name].entry
        if entry.pool is not None:
            pools.setdefault(entry.pool, []).append(one)
            entries.setdefault(entry.pool, entry)
    found = []
    for pool, here in pools.items():
        gone = {one.name: groups[one.name].width - np.array(one.widths, np.float64) for one in here}
        most = entries[pool].ratio * sum(groups[one.name].width for one in here)
        forced = sum(float(units.min()) for units in gone.values())  # by widths that the device runs well
        terms = tuple(CostTerm((name,), units) for name, units in gone.items())
        found.append(CostBudget(f"channels that go by {entries[pool].label}", max(most, forced), terms))
    return found


def reasons_to_stay(resolved: ResolvedConfig, groups: ChannelGroups) -> dict[str, str]:
    """Return why groups stay whole under a config, by name; of those that no layer of an entry makes, too."""
    whole = [group for group in groups.prunable if group.name not in resolved.ratios]
    known = {name: target.reason for name, target in resolved.targets.items() if target.reason}
    return {group.name: known.get(group.name, "stays whole: no entry of the config selects it") for group in whole}
