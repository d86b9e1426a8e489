"""Dependency-aware pruning: what coupled layers lose in common goes for good, what each loses beyond that is masked."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchshear._arguments import check_kind, close_names, parse_names, quote
from torchshear._tables import Cell
from torchshear.calibration import Statistics
from torchshear.calibration._weight_calls import find_weight_calls
from torchshear.calibration._weight_source import WeightSource, weights_to_score
from torchshear.dependency import ChannelGroup, ChannelGroups, Member
from torchshear.dependency.groups._groups import check_groups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.errors import ArgumentError
from torchshear.graph._nodes import tensor_operands
from torchshear.graph._operator_record import node_macs
from torchshear.pruners.criteria._criterion import Criterion, UnscorableError, find_criterion
from torchshear.pruners.selection._request import check_ratio, layer_of
from torchshear.pruners.selection._scoring import group_scores
from torchshear.pruners.selection._widths import n_removed

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

Scorer = Callable[[ChannelGroup], Floats]

_LAYERS: Final = frozenset({"out", "depthwise"})
EXTRA: Final = ("apply", "drop")


@dataclass(frozen=True, slots=True)
class LayerMask:
    """Units that one layer loses.

    Attributes:
        layer: qualified name of the module, or of the parameter if it is no module's weight.
        group: the channel group of its output channels.
        width: number of these.
        ratio: fraction of them that was to go; None if nothing was said of the layer.
        common: how many go with all layers of the group, and are really removed.
        extra: how many are masked in this layer alone, and stay in the network.
        params: weights of the layer, after the common part is removed, that the extra part holds for nothing.
        macs: multiply-accumulate operations of a sample that the extra part costs for nothing.
        note: why it differs from the ratio asked for, or "".
    """

    layer: str
    group: str
    width: int
    ratio: float | None
    common: int
    extra: int
    params: int
    macs: int
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class DependencyAwarePlan:
    """The common part as a plan, and masks that have the extra part as well.

    Attributes:
        plan: what can be removed; shrinking it loses nothing but the common part.
        masks: name of a parameter or buffer -> bool tensor of its shape, True = kept; common and extra part.
        layers: what each layer loses.
    """

    plan: PruningPlan
    masks: Mapping[str, Tensor]
    layers: tuple[LayerMask, ...]

    def __str__(self) -> str:
        """A table of the layers for people."""
        return render_layers(self.layers)


def render_layers(layers: Sequence[LayerMask], width: int = 120) -> str:
    """A table of what layers lose.

    Args:
        layers: what each loses.
        width: columns of the terminal.
    """
    table = Table(title="Layers, by what they depend on", title_justify="left")
    for heading in ("layer", "group", "channels", "asked", "removed", "only masked", "its MACs", "note"):
        is_text = heading in ("layer", "group", "note")
        table.add_column(heading, justify="left" if is_text else "right")
    for row in layers:
        asked = "" if row.ratio is None else f"{row.ratio:.0%}"
        counts = [f"{count:,}" for count in (row.common, row.extra, row.macs)]
        table.add_row(Cell(row.layer), Cell(row.group), str(row.width), asked, *counts, Cell(row.note))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    n_extra, macs = sum(row.extra for row in layers), sum(row.macs for row in layers)
    console.print(
        f"{n_extra} channels are masked in single layers and stay: {macs:,} MACs without use", highlight=False
    )
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def plan_dependency_aware(
    groups: ChannelGroups,
    ratios: Mapping[str, float],
    criterion: str | Criterion = "l1",
    extra: str = "apply",
    weights: WeightSource = None,
    statistics: Statistics | None = None,
) -> DependencyAwarePlan:
    """Prune layers by a ratio of their own, those that depend on each other by their common part first.

    For each group of coupled layers l with n output channels, which grouped layers divide into G filter groups (G = 1
    where there are none):

    1. s_min = min over l of s_l; 0 if nothing was said of one of the layers.
    2. M_c = sum over l of m_lc, m_l being the criterion on layer l alone.
    3. In each filter group the floor(floor(n s_min) / G) channels with the lowest M_c go from all layers: the common
       part.
    4. In each filter group of each layer floor(floor(n s_l) / G) channels go in all, those beyond the common part by
       the layer's own m_l: its extra part.

    The extra part cannot be removed from the network, since other layers need these channels; it is masked, brings no
    speed, and its cost is told.

    Args:
        groups: the analysed network.
        ratios: name of a module or of its weight -> fraction of its output channels to remove, in [0, 1).
        criterion: name of a criterion, or a function.
        extra: "apply" for masks with the extra part; "drop" for the common part alone.
        weights: see `torchshear.plan`.
        statistics: see `torchshear.plan`.

    Returns:
        The plan of the common part, the masks, and what each layer loses.

    Raises:
        ArgumentError: a ratio is outside [0, 1), a name is no layer whose channels can go, or `extra` is no such word.
        UnscorableError: the criterion has nothing to say of any of the layers; those of which it has nothing to say
            beside others stay whole, with a note.
        WeightError: weights cannot be scored.

    Reference: the dependency-aware mode of NNI 2.0 to 2.8, which does not balance the extra part over filter groups.
    """
    check_groups(groups)
    check_kind("ratios", ratios, Mapping, "a mapping from layers to ratios")
    if statistics is not None:
        check_kind("statistics", statistics, Statistics, "what torchshear.collect gives")
    if not isinstance(extra, str) or extra not in EXTRA:
        raise ArgumentError(
            f"extra={quote(extra)}; expected one of {', '.join(EXTRA)}.{close_names(str(extra), EXTRA)}"
        )
    asked = _by_weight(groups, ratios)
    score = find_criterion(criterion)
    tensors = weights_to_score(groups, weights)
    sets = [_Set(group, asked) for group in groups.prunable if _layers(group)]
    for one in sets:
        one.choose(lambda view: group_scores(view, score, tensors, _of_layer(view, statistics)), extra == "apply")
    _check_scored(sets)
    kept = {one.group.name: one.kept for one in sets if len(one.kept) < one.group.width}
    cut = Cut(groups, kept)
    request = {
        "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
        "ratios": dict(ratios),
        "dependency_aware": extra,
    }
    plan = make_plan(cut, kept, request, {}, {one.group.name: one.least for one in sets if one.least is not None})
    masks = {name: mask.clone() for name, mask in plan.masks().items()}
    rows: list[LayerMask] = []
    costs = _macs_by_weight(groups, cut)
    biases = {layer.weight: layer.bias for layer in find_weight_calls(groups)}
    for one in sets:
        for member in one.layers:
            gone = one.extra[member.name]
            _mask(groups, masks, member, gone, biases.get(member.name, ""))
            rows.append(_row(one, member, cut, costs.get(member.name, 0)))
    return DependencyAwarePlan(plan, masks, tuple(rows))


class _Set:
    """Layers that depend on each other, and what they lose."""

    def __init__(self, group: ChannelGroup, asked: Mapping[str, float]) -> None:
        self.group = group
        self.layers = _layers(group)
        self.ratios = {member.name: asked.get(member.name) for member in self.layers}
        known = [ratio for ratio in self.ratios.values() if ratio is not None]
        self.least = (min(known) if len(known) == len(self.layers) else 0.0) if known else None
        self.kept: Indices = np.arange(group.width)
        self.problem = ""  # why the criterion has nothing to say
        self.extra: dict[str, Indices] = {member.name: np.zeros(0, np.int64) for member in self.layers}

    def choose(self, score: Scorer, with_extra: bool) -> None:
        """Choose the common part, and the extra part of each layer."""
        if self.least is None:
            return
        try:
            scores = {member.name: score(replace(self.group, members=(member,))) for member in self.layers}
        except UnscorableError as error:
            self.problem = str(error)
            return
        total = np.sum(list(scores.values()), 0)
        per_block = self._per_block(self.least)
        self.kept = np.setdiff1d(self.kept, self._lowest(total, self.kept, per_block))
        for member in self.layers if with_extra else ():
            further = self._per_block(self.ratios[member.name] or 0.0) - per_block
            if further > 0:
                self.extra[member.name] = self._lowest(scores[member.name], self.kept, further)

    def _per_block(self, ratio: float) -> int:
        """Channels of each filter group that go at a ratio, leaving at least what must stay."""
        most = self.group.max_cut // self.group.n_blocks
        return min(n_removed(self.group.width, ratio) // self.group.n_blocks, most)

    def _lowest(self, scores: Floats, among: Indices, per_block: int) -> Indices:
        """Of each filter group the units with the lowest scores; among equal ones the later first."""
        blocks = np.zeros(self.group.width, np.int64) if self.group.balance is None else self.group.balance
        gone = []
        for block in range(self.group.n_blocks):
            here = among[blocks[among] == block]
            gone.append(here[np.lexsort((-here, scores[here]))][:per_block])
        return np.sort(np.concatenate(gone))

    def note(self, member: Member) -> str:
        """Reason for which a layer loses another share than was asked."""
        if self.problem:
            return f"stays whole: {self.problem}"
        ratio, lost = self.ratios[member.name], self.lost(member)
        if ratio is None:
            return (
                "nothing was asked of it"
                if self.least is None
                else "nothing was asked of it, so nothing goes in common"
            )
        asked, gone, n_blocks = n_removed(lost.width, ratio), lost.common + lost.extra, lost.n_blocks
        if asked != gone and asked // n_blocks * n_blocks == gone and n_blocks > 1:
            return f"{asked} rounded down to equal numbers in {n_blocks} filter groups"
        return f"{asked} were asked for" if asked != gone else ""

    def lost(self, member: Member) -> "_Lost":
        """Count the units of one layer that go; layers of a recurrent call have units of their own in the group."""
        own = np.unique(member.units)
        blocks = 1 if self.group.balance is None else len(np.unique(self.group.balance[own]))
        kept, extra = np.isin(own, self.kept).sum(), np.isin(own, self.extra[member.name]).sum()
        return _Lost(len(own), len(own) - int(kept), int(extra), blocks)


@dataclass(frozen=True, slots=True)
class _Lost:
    """Numbers of a layer's units that go in common and beyond that, and of the filter groups that they are in."""

    width: int
    common: int
    extra: int
    n_blocks: int


def _of_layer(view: ChannelGroup, statistics: Statistics | None) -> Statistics | None:
    """Statistics in which the units of a group show by one of its layers alone."""
    own = statistics.by_layer.get(view.members[0].name) if statistics is not None else None
    return (
        replace(statistics, taps={**statistics.taps, view.name: own}) if statistics is not None and own else statistics
    )


def _check_scored(sets: Sequence[_Set]) -> None:
    unscored = [one for one in sets if one.problem]
    if unscored and not any(one.least is not None and not one.problem for one in sets):
        first = unscored[0]
        raise UnscorableError(
            f"the criterion can score none of the layers that were named: {layer_of(first.layers[0].name)!r}, of group "
            f"{first.group.name!r}: {first.problem}"
        )


def _layers(group: ChannelGroup) -> tuple[Member, ...]:
    return tuple(member for member in group.members if member.purposes & _LAYERS)


def _by_weight(groups: ChannelGroups, ratios: Mapping[str, float]) -> dict[str, float]:
    """Name of a weight -> the ratio asked of its layer."""
    weights = {member.name for group in groups.prunable for member in _layers(group)}
    names = {layer_of(name): name for name in weights} | {name: name for name in weights}
    if not isinstance(ratios, Mapping):
        raise ArgumentError(f"ratios is {type(ratios).__name__}; expected a mapping from layers to fractions.")
    parse_names("keys of ratios", ratios)
    found: dict[str, float] = {}
    for name, ratio in ratios.items():
        check_ratio(f"ratios[{name!r}]", ratio)
        if name not in names:
            raise ArgumentError(f"ratios: {name!r} is no layer whose channels can go.{close_names(name, names)}")
        if names[name] in found:
            raise ArgumentError(f"ratios: two entries for {names[name]!r}; give one.")
        found[names[name]] = float(ratio)
    return found


def _mask(groups: ChannelGroups, masks: dict[str, Tensor], member: Member, gone: Indices, bias: str) -> None:
    """Mask rows of a layer, and of its bias."""
    if not len(gone):
        return
    rows = member.positions[np.isin(member.units, gone)]
    for name, dim in ((member.name, member.dim), (bias, 0)):
        if name and groups.graph.state[name].shape[dim] == member.size:
            mask = masks.setdefault(name, torch.ones(groups.graph.state[name].shape, dtype=torch.bool))
            mask.index_fill_(dim, torch.from_numpy(rows), False)


def _macs_by_weight(groups: ChannelGroups, cut: Cut) -> dict[str, int]:
    """Operations of a sample in all calls that read a weight, after the cut; weights of one call share them by size."""
    graph = groups.graph
    found: dict[str, int] = {}
    nodes = {node.name: node for node in graph}
    layers = tuple(find_weight_calls(groups))
    sizes = [int(np.prod(cut.state_shape(layer.weight), dtype=np.int64)) for layer in layers]
    sizes_of: dict[str, int] = {}
    for layer, size in zip(layers, sizes, strict=True):
        sizes_of[layer.node] = sizes_of.get(layer.node, 0) + size
    for layer, size in zip(layers, sizes, strict=True):
        node = nodes[layer.node]
        macs = node_macs(str(node.target), [cut.shape(n) for n in tensor_operands(node)], cut.shape(node))
        share = macs * size // max(1, sizes_of[layer.node])
        found[layer.weight] = found.get(layer.weight, 0) + share // (graph.batch_hint or 1)
    return found


def _row(one: _Set, member: Member, cut: Cut, macs: int) -> LayerMask:
    lost = one.lost(member)
    share = lost.extra / (lost.width - lost.common)
    n_params = int(np.prod(cut.state_shape(member.name), dtype=np.int64))
    return LayerMask(
        layer=layer_of(member.name),
        group=one.group.name,
        width=lost.width,
        ratio=one.ratios[member.name],
        common=lost.common,
        extra=lost.extra,
        params=round(share * n_params),
        macs=round(share * macs),
        note=one.note(member),
    )
