"""From a resolved config to a plan of channels and to masks of single weights."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import nn

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import Sum, WeightSums
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
_MOST: Final = 1 - 1e-9  # shares of a layer are below 1; its last unit may go where no bound was set
_SUMS: Final[Mapping[str, Sum]] = MappingProxyType(
    {"snip": "saliency", "snip_momentum": "momentum", "gradient": "gradient", "taylor": "taylor"}
)
_OF_WEIGHTS: Final = ("l1", "l2")


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
        group_reduction: see `pool_requests`.

    Raises:
        ArgumentError: as `torchshear.plan`.
        WeightError: weights cannot be scored.
    """
    kept: dict[str, Indices] = {}
    notes = {name: target.reason for name, target in resolved.targets.items() if target.reason}
    for request, ratios in pool_requests(groups, resolved, widths, group_reduction):
        plan = plan_units(groups, request, statistics=statistics, whole=[n for n in whole if n in ratios])
        kept |= {group.name: group.kept for group in plan.groups if group.name in ratios}
        notes |= {group.name: group.note for group in plan.groups if group.name in ratios and group.note}
    said = describe_config(resolved, widths) | statistics_notes(statistics)
    asked = {name: ratio for name, ratio in resolved.ratios.items() if name not in whole}
    return make_plan(Cut(groups, kept), kept, said, notes, asked)


def pool_requests(
    groups: ChannelGroups, resolved: ResolvedConfig, widths: Widths, group_reduction: str | None = None
) -> list[tuple[Request, dict[str, float]]]:
    """Return a request for the groups of each pool, which leaves all others whole, with the ratios of its groups.

    Args:
        groups: the analysed network.
        resolved: the config.
        widths: which widths are allowed.
        group_reduction: how scores of a group's members become one, see `torchshear.plan`; None: as the criterion has
            it, or of the filters alone where the config is one of Neural Compressor, which scores nothing else.
    """
    pools: dict[_Pool, dict[str, float]] = defaultdict(dict)
    for name, ratio in resolved.ratios.items():
        entry = resolved.targets[name].entry
        own = group_reduction or ("filters" if entry.dialect == "neural_compressor" else "sum")
        pools[entry.criterion, entry.pool, entry.min_ratio, entry.max_ratio, own][name] = ratio
    return [(_request(groups, key, ratios, widths), ratios) for key, ratios in pools.items()]


def describe_config(resolved: ResolvedConfig, widths: Widths) -> dict[str, Any]:
    """Return what a config asks of channel groups, as plain data for a plan."""
    criteria = {resolved.targets[name].entry.criterion or "" for name in resolved.ratios}
    return {
        "criterion": ", ".join(sorted(criteria)),
        "ratio": resolved.ratios,
        "alignment": widths.alignment.name,
        "min_width": widths.min_width,
        "config": resolved.to_dict(),
    }


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
    entries = {entry.label: entry for entry in resolved.entries}
    found: list[Masks] = []
    nothing: NothingFitsError | None = None
    for label, layers in masked_layers(model, resolved).items():
        entry = entries[label]
        score = entry_score(entry, model, layers, statistics)
        try:
            found.append(mask_entry(model, entry, layers, entry.ratio, score))
        except NothingFitsError as error:
            nothing = error
            found.append(Masks.of({}, error.layers, entry.pattern))
    if nothing is not None and not resolved.ratios and not any(masks.tensors for masks in found):
        raise nothing
    return found


def masked_layers(model: nn.Module, resolved: ResolvedConfig) -> dict[str, list[str]]:
    """Return the layers of which each entry masks single weights, by its label."""
    known = find_maskable_weights(model)
    found: dict[str, list[str]] = defaultdict(list)
    for row in resolved.rows:
        if row.parameter and row.masked > 0:
            found[row.entry].append(known[row.parameter].layer)
    return dict(found)


def mask_entry(
    model: nn.Module,
    entry: Entry,
    layers: Sequence[str],
    ratio: float,
    score: Score,
    previous: Masks | None = None,
) -> Masks:
    """Choose masks for what an entry asks of single weights.

    Args:
        model: the model; not changed.
        entry: the entry.
        layers: its layers.
        ratio: share of their weights to mask, which may still grow to that of the entry.
        score: of each weight.
        previous: masks that were chosen before, if the share grows.
    """
    return choose_masks(
        model,
        entry.pattern,
        ratio,
        layers=layers,
        scope=entry.scope,
        min_ratio=entry.min_ratio,
        max_ratio=min(entry.max_ratio, _MOST),
        final_ratio=entry.ratio,
        score=score,
        reduce=entry.reduce,  # type: ignore[arg-type]
        previous=previous,
    )


def find_sum(entry: Entry) -> Sum | None:
    """Return the sum over gradients by which an entry ranks single weights; None where it looks at weights alone.

    Raises:
        ArgumentError: its criterion scores no single weights.
    """
    if entry.criterion not in _SUMS and entry.criterion not in _OF_WEIGHTS:
        raise ArgumentError(
            f"{entry.label}: criterion {entry.criterion!r} scores channels and no single weights, which the pattern "
            f"{entry.pattern!r} asks for; expected {', '.join((*_OF_WEIGHTS, *_SUMS))}, or a pattern of channels."
        )
    return _SUMS.get(entry.criterion or "")


def entry_score(
    entry: Entry,
    model: nn.Module,
    layers: Sequence[str],
    statistics: Statistics | None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Score:
    """Return the scores by which an entry ranks single weights.

    Args:
        entry: the entry.
        model: the model.
        layers: the entry's layers.
        statistics: sums over gradients, if its criterion is made of them.
        names: other name of a parameter -> the one that statistics have.

    Raises:
        ArgumentError: the criterion scores no single weights; no gradients were seen of a layer.
    """
    summed = find_sum(entry)
    if summed is None:
        return "magnitude" if entry.criterion == "l1" else lambda _, weight: weight.square()
    assert statistics is not None, "checked when the pruner or session was made"
    known = find_maskable_layers(model)
    sums: Mapping[str, WeightSums] = statistics.weights
    weights = {layer: names.get(known[layer].weight, known[layer].weight) for layer in layers}
    missing = [layer for layer, weight in weights.items() if weight not in sums]
    if missing:
        raise ArgumentError(f"{entry.label}: no gradients were seen of layer {missing[0]!r}; leave it out.")
    return {layer: getattr(sums[weight], summed) for layer, weight in weights.items()}


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
