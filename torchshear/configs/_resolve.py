"""Entries applied to a model: the share of each layer and of each channel group."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from torchshear._arguments import quote
from torchshear.configs._entry import DEFAULT_PATTERN, Entry
from torchshear.configs._layers import ConfigLayer, LayerGroups, Maskable, find_maskable_weights, list_layers
from torchshear.configs._resolved import ConfigRow, GroupTarget, ResolvedConfig
from torchshear.configs._selectors import assign, select
from torchshear.dependency import ChannelGroup, ChannelGroups, Member
from torchshear.dependency.groups._groups import check_groups
from torchshear.errors import ArgumentError
from torchshear.graph.model._checks import check_module

_EXACT = 1e-12


def resolve(
    model: nn.Module,
    entries: Sequence[Entry],
    groups: ChannelGroups | None = None,
    criterion: str | None = None,
    pattern: str = "out_channel",
) -> ResolvedConfig:
    """Say what a config list asks of each layer and of each channel group of a model.

    A layer's ratio is one of its output units (of its input units, or heads, where an entry says so), and so of the
    channel group that they lie in, with all layers that share it. Layers l that are coupled lose together

        min over l of ratio_l, if every layer that makes the group's units is configured, else 0

    which is what can really go; what a layer was asked beyond that is reported in its row. Depthwise convolutions that
    no entry names follow the layer before them, and so do norms. An excluded layer keeps its outputs, and with it its
    group; its inputs follow the layers before it.

    Args:
        model: the model; not changed.
        entries: what `parse_config` gives.
        groups: the analysed model; needed where units are channels or heads, and by configs of Neural Compressor, whose
            layers that make an output of the model are left whole.
        criterion: name of the criterion of entries that name none.
        pattern: what a unit is in entries that do not say.

    Returns:
        The resolved config; `str()` of it is a table.

    Raises:
        ArgumentError: a word fits no layer, an entry selects nothing, a layer is claimed twice, `groups` is missing, or
            nothing that is asked for can be removed.

    Reference: dependency-aware pruning of NNI, https://github.com/microsoft/nni.
    """
    check_module(model)
    is_parsed = isinstance(entries, Sequence) and all(isinstance(entry, Entry) for entry in entries)
    if not is_parsed:
        raise ArgumentError(f"entries is {type(entries).__name__}; expected what parse_config gives.")
    if groups is not None:
        check_groups(groups)
    if not isinstance(criterion, str | None) or not isinstance(pattern, str):
        raise ArgumentError(f"criterion={quote(criterion)} and pattern={quote(pattern)}; expected texts.")
    if not entries:
        raise ArgumentError("the config has no entries; expected at least one.")
    layers = list_layers(model)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    selections = [select(entry, layers, modules) for entry in entries]
    owners = assign(entries, selections)
    entries = [_fill_in(entry, criterion, pattern) for entry in _with_idle_exclusions(entries, owners)]
    by_label = {entry.label: entry for entry in entries}
    owners = {layer: by_label[entry.label] for layer, entry in owners.items()}
    _check_groups_given(owners, groups)
    found = LayerGroups(groups, layers) if groups is not None else None
    owners, skipped = _without_outputs(owners, found)
    claims = _Claims(layers, owners, found, find_maskable_weights(model))
    targets = {target.group: target for target in claims.targets()}
    rows = tuple(
        _row(layer, owners.get(layer.name), skipped, claims, targets)
        for layer in layers
        if layer.is_weighted or layer.name in owners or layer.name in skipped
    )
    resolved = ResolvedConfig(entries=tuple(entries), rows=rows, targets=targets)
    if not resolved.ratios and not resolved.weight_ratios:
        raise ArgumentError(_explain_nothing(resolved))
    return resolved


def _with_idle_exclusions(entries: Sequence[Entry], owners: Mapping[str, Entry]) -> list[Entry]:
    """The entries, with a note at those that exclude no layer in the end."""
    used = {entry.label for entry in owners.values()}
    idle = "excludes nothing: entries behind it select its layers again, and these count"
    return [
        replace(entry, notes=(*entry.notes, idle)) if entry.excludes and entry.label not in used else entry
        for entry in entries
    ]


def _fill_in(entry: Entry, criterion: str | None, pattern: str) -> Entry:
    """An entry with what the pruner says where it does not."""
    own = pattern if entry.pattern == DEFAULT_PATTERN else entry.pattern
    return replace(entry, criterion=entry.criterion or criterion, pattern=own)


def _check_groups_given(owners: Mapping[str, Entry], groups: ChannelGroups | None) -> None:
    if groups is not None:
        return
    for layer, entry in owners.items():
        if entry.excludes:
            continue
        if entry.removes_channels:
            raise ArgumentError(
                f"{entry.label} removes channels of {layer!r}, and what goes with them is not known without the "
                f"analysed model; give groups=torchshear.analyze(graph), or example inputs args= to a pruner."
            )
        if entry.dialect == "neural_compressor":
            raise ArgumentError(
                f"{entry.label}: configs of Neural Compressor leave the layers whole that make the outputs, which are "
                f"not known without the analysed model; give groups=, or example inputs args= to a pruner."
            )


def _without_outputs(
    owners: Mapping[str, Entry], found: LayerGroups | None
) -> tuple[dict[str, Entry], dict[str, tuple[Entry, str]]]:
    """Leave out layers of Neural Compressor's entries that make an output, whatever their units are."""
    kept: dict[str, Entry] = {}
    skipped: dict[str, tuple[Entry, str]] = {}
    for layer, entry in owners.items():
        is_masked = entry.dialect == "neural_compressor" and not entry.removes_channels
        if is_masked and found is not None and found.makes_output(layer):
            skipped[layer] = (entry, "it makes an output of the model")
        else:
            kept[layer] = entry
    return kept, skipped


class _Claims:
    """Claims of the layers of entries on channel groups, and weights that can be masked."""

    def __init__(
        self,
        layers: Sequence[ConfigLayer],
        owners: Mapping[str, Entry],
        found: LayerGroups | None,
        maskable: Mapping[str, Maskable],
    ) -> None:
        self.found = found
        self.maskable = maskable
        self.owners = owners
        self.groups_of: dict[str, tuple[tuple[ChannelGroup, Member], ...]] = {}
        self._groups: dict[str, ChannelGroup] = {}
        self._claims: dict[str, dict[str, Entry]] = defaultdict(dict)
        if found is None:
            return
        for layer, entry in owners.items():
            if entry.removes_channels and not entry.excludes:
                self.groups_of[layer] = found.of(layer, entry.pattern)
            for group, _ in self.groups_of.get(layer, ()):
                self._claims[group.name][layer] = entry
                self._groups[group.name] = group
        self._makers = self._all_makers(layers, found)

    def _all_makers(self, layers: Sequence[ConfigLayer], found: LayerGroups) -> dict[str, dict[str, dict[str, Member]]]:
        """Pattern -> group -> the layers that have its units in that way, with a dimension in which they lie."""
        patterns = {entry.pattern for entry in self.owners.values() if entry.removes_channels} | {"out_channel"}
        makers: dict[str, dict[str, dict[str, Member]]] = {p: defaultdict(dict) for p in patterns}
        for pattern in patterns:
            for layer in layers:
                for group, member in found.of(layer.name, pattern):
                    makers[pattern][group.name][layer.name] = member
        return makers

    def targets(self) -> list[GroupTarget]:
        """Return the target of each group that a layer claims."""
        return [self._target(group) for group in self._groups.values()]

    def _target(self, group: ChannelGroup) -> GroupTarget:
        asked = self._claims[group.name]
        least = min(asked, key=lambda layer: asked[layer].ratio)
        entry = asked[least]
        reason = group.reason or self._explain_exclusion(group) or self._explain_unconfigured(group)
        if reason:
            return GroupTarget(group.name, 0.0, entry, f"stays whole: {reason}")
        if any(one.ratio - entry.ratio > _EXACT for one in asked.values()):
            return GroupTarget(
                group.name, entry.ratio, entry, f"coupled with {least!r}, of which {entry.ratio:g} is to go"
            )
        return GroupTarget(group.name, entry.ratio, entry)

    def _explain_exclusion(self, group: ChannelGroup) -> str:
        """Name the excluded layer that makes the group, or ""; norms matter only where norms are what is asked for."""
        makers = self._makers["out_channel"].get(group.name, {})
        norms = {layer for layer, member in makers.items() if "norm" in member.purposes}
        only_norms = norms.issuperset(self._claims[group.name])
        for layer in makers:
            entry = self.owners.get(layer)
            if entry is not None and entry.excludes and (layer in norms) == only_norms:
                return f"it is coupled with {layer!r}, which {entry.label} excludes"
        return ""

    def _explain_unconfigured(self, group: ChannelGroup) -> str:
        """Name the layer of the group that no entry configures, or ""."""
        asked = self._claims[group.name]
        for pattern in sorted({entry.pattern for entry in asked.values()}):
            makers = self._makers[pattern].get(group.name, {})
            norms = {layer for layer, member in makers.items() if "norm" in member.purposes}
            only_norms = all(layer in norms for layer, entry in asked.items() if entry.pattern == pattern)
            for layer, member in makers.items():
                is_free = bool(member.purposes & {"depthwise", "raw"}) or (layer in norms) != only_norms
                if layer not in asked and not is_free:
                    return f"it is coupled with {layer!r}, which no entry configures"
        return ""


def _row(
    layer: ConfigLayer,
    entry: Entry | None,
    skipped: Mapping[str, tuple[Entry, str]],
    claims: _Claims,
    targets: Mapping[str, GroupTarget],
) -> ConfigRow:
    row = ConfigRow(layer=layer.name, type_name=layer.type_name)
    if layer.name in skipped:
        by, reason = skipped[layer.name]
        return replace(row, entry=by.label, pattern=by.pattern, reason=reason)
    if entry is None:
        return replace(row, reason="no entry selects it")
    if entry.excludes:
        return replace(
            row, entry=entry.label, reason="excluded: its outputs stay, its inputs follow the layers before it"
        )
    row = replace(row, entry=entry.label, criterion=entry.criterion or "", pattern=entry.pattern, ratio=entry.ratio)
    if not entry.removes_channels:
        return _masked_row(replace(row, removed=0.0), layer, claims.maskable)
    own = claims.groups_of.get(layer.name, ())
    if not own:
        assert claims.found is not None, "channels were asked for, and the groups are there"
        return replace(row, removed=0.0, reason=claims.found.explain_fixed(layer.name, entry.pattern))
    names = tuple(group.name for group, _ in own)
    removed = min(targets[name].ratio for name in names)
    reason = next((targets[name].reason for name in names if targets[name].reason), "")
    if removed == entry.ratio:
        reason = ""
    elif removed > 0:
        reason = f"{reason}: {entry.ratio - removed:.3g} could only be masked"
    return replace(row, groups=names, removed=removed, reason=reason)


def _masked_row(row: ConfigRow, layer: ConfigLayer, maskable: Mapping[str, Maskable]) -> ConfigRow:
    """A row of a layer of which single weights are masked."""
    computed = f"{layer.name}.weight"  # no parameter of the layer where a parametrization makes it
    found = next((name for name in (*layer.parameters, computed) if name in maskable), None)
    if found is None:
        return replace(row, reason=f"how a {layer.type_name} keeps its weights is not known to masks")
    if maskable[found].problem:
        return replace(row, reason=maskable[found].problem)
    reason = "single weights become zeros, and nothing gets smaller"
    return replace(row, masked=row.ratio or 0.0, parameter=found, reason=reason)


def _explain_nothing(resolved: ResolvedConfig) -> str:
    reasons = [f"{row.layer!r}: {row.reason or 'its ratio is 0'}" for row in resolved.rows if row.pattern]
    if not reasons:
        return "nothing that the config asks for can be removed: its entries leave out layers and choose none."
    rest = "; ..." if len(reasons) > 4 else ""
    return f"nothing that the config asks for can be removed. {'; '.join(reasons[:4])}{rest}"
