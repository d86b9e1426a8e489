"""From a resolved config to a plan of channels and to masks of single weights."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import nn

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import WeightSums
from torchshear.configs._entry import Entry
from torchshear.configs._layers import find_maskable_weights
from torchshear.configs._resolved import ResolvedConfig
from torchshear.dependency import ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.errors import ArgumentError
from torchshear.pruners._planning import plan_units, statistics_notes
from torchshear.pruners.masks import Masks, choose_masks
from torchshear.pruners.masks._choose import NothingFitsError
from torchshear.pruners.masks._layers import find_maskable_layers
from torchshear.pruners.masks._scores import Score
from torchshear.pruners.selection._request import Request

Indices = npt.NDArray[np.int64]
_Pool = tuple[str | None, str | None, float, float, str]  # criterion, pool, bounds, how scores become one


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths that groups may have.

    Attributes:
        alignment: what kept widths are a multiple of.
        min_width: the fewest units to keep in a group.
    """

    alignment: Alignment
    min_width: int = 1


def plan_config(
    groups: ChannelGroups,
    resolved: ResolvedConfig,
    widths: Widths,
    statistics: Statistics | None,
    whole: Collection[str] = (),
    group_reduction: str | None = None,
) -> PruningPlan:
    """Plan what a config asks of channel groups, pool by pool.

    Args:
        groups: the analysed network.
        resolved: the config, with channels to remove.
        widths: which widths are allowed.
        statistics: what criteria that look at data need.
        whole: names of groups that stay whole nevertheless, so that the model keeps its own class.
        group_reduction: how scores of a group's members become one, see `torchshear.plan`; None: as the criterion has
            it, or of the filters alone where the config is one of Neural Compressor, which scores nothing else.

    Raises:
        ArgumentError: as `torchshear.plan`.
        WeightError: weights cannot be scored.
    """
    pools: dict[_Pool, dict[str, float]] = defaultdict(dict)
    for name, ratio in resolved.ratios.items():
        entry = resolved.targets[name].entry
        own = group_reduction or ("filters" if entry.dialect == "neural_compressor" else "sum")
        pools[entry.criterion, entry.pool, entry.min_ratio, entry.max_ratio, own][name] = ratio
    kept: dict[str, Indices] = {}
    notes = {name: target.reason for name, target in resolved.targets.items() if target.reason}
    for key, ratios in pools.items():
        request_of_pool = _request(groups, key, ratios, widths)
        plan = plan_units(groups, request_of_pool, statistics=statistics, whole=[n for n in whole if n in ratios])
        kept |= {group.name: group.kept for group in plan.groups if group.name in ratios}
        notes |= {group.name: group.note for group in plan.groups if group.name in ratios and group.note}
    request = {
        "criterion": ", ".join(sorted({key[0] or "" for key in pools})),
        "ratio": resolved.ratios,
        "alignment": widths.alignment.name,
        "min_width": widths.min_width,
        "config": resolved.to_dict(),
    }
    asked = {name: ratio for name, ratio in resolved.ratios.items() if name not in whole}
    return make_plan(Cut(groups, kept), kept, request | statistics_notes(statistics), notes, asked)


def mask_weights(model: nn.Module, resolved: ResolvedConfig, statistics: Statistics | None) -> list[Masks]:
    """Choose masks for what a config asks of single weights, entry by entry.

    Args:
        model: the model; not changed.
        resolved: the config.
        statistics: what criteria that look at data need.

    Returns:
        Masks of each entry that asks for any. Layers that its pattern does not fit are skipped and say so in the
        report.

    Raises:
        ArgumentError: a criterion scores no single weights.
        MaskError: no pattern fits any layer, and no channels are asked for either.
    """
    known = find_maskable_weights(model)
    entries = {entry.label: entry for entry in resolved.entries}
    asked: dict[str, dict[str, float]] = defaultdict(dict)
    for row in resolved.rows:
        if row.parameter and row.masked > 0:
            asked[row.entry][known[row.parameter].layer] = row.masked
    found: list[Masks] = []
    nothing: NothingFitsError | None = None
    for label, ratios in asked.items():
        try:
            found.append(_choose(model, entries[label], ratios, statistics))
        except NothingFitsError as error:
            nothing = error
            found.append(Masks.of({}, error.layers, entries[label].pattern))
    if nothing is not None and not resolved.ratios and not any(masks.tensors for masks in found):
        raise nothing
    return found


def _choose(model: nn.Module, entry: Entry, ratios: dict[str, float], statistics: Statistics | None) -> Masks:
    bounds: dict[str, Any] = {"min_ratio": entry.min_ratio, "max_ratio": min(entry.max_ratio, _MOST)}
    return choose_masks(
        model,
        entry.pattern,
        layers=ratios,
        scope=entry.scope,
        score=_score(entry, model, list(ratios), statistics),
        reduce=entry.reduce,  # type: ignore[arg-type]
        **bounds,
    )


_MOST: Final = 1 - 1e-9  # shares of a layer are below 1; its last unit may go where no bound was set
_SUMS: Final[Mapping[str, str]] = MappingProxyType(
    {"snip": "saliency", "snip_momentum": "momentum", "gradient": "gradient", "taylor": "taylor"}
)


def _score(entry: Entry, model: nn.Module, layers: list[str], statistics: Statistics | None) -> Score:
    """Return the scores by which single weights are ranked."""
    if entry.criterion == "l1":
        return "magnitude"
    if entry.criterion == "l2":
        return lambda _, weight: weight.square()
    summed = _SUMS.get(entry.criterion or "")
    if summed is None:
        raise ArgumentError(
            f"{entry.label}: criterion {entry.criterion!r} scores channels and no single weights, which the pattern "
            f"{entry.pattern!r} asks for; expected one of l1, l2, {', '.join(_SUMS)}, or a pattern of channels."
        )
    assert statistics is not None, "checked when the pruner was made"
    known = find_maskable_layers(model)
    sums: Mapping[str, WeightSums] = statistics.weights
    missing = [name for name in layers if known[name].weight not in sums]
    if missing:
        raise ArgumentError(f"{entry.label}: no gradients were seen of layer {missing[0]!r}; leave it out.")
    return {name: getattr(sums[known[name].weight], summed) for name in layers}


def _request(groups: ChannelGroups, key: _Pool, ratios: dict[str, float], widths: Widths) -> Request:
    """Return the request for groups that are ranked together; all others stay whole."""
    criterion, pool, least, most, group_reduction = key
    limits: dict[str, Any] = {
        "alignment": widths.alignment,
        "min_width": widths.min_width,
        "group_reduction": group_reduction,
    }
    if pool is None:
        return Request(criterion=criterion or "l1", ratio=ratios, **limits)
    others = tuple(group.name for group in groups if group.name not in ratios)
    limits |= {"min_ratio": least, "max_ratio": min(most, _MOST), "exclude": others}
    return Request(criterion=criterion or "l1", ratio=next(iter(ratios.values())), scope="global", **limits)
