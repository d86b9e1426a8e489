"""Attention heads as units of masks: rows of queries, keys and values with the columns that read them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from torchshear.dependency import ROLES, ChannelGroup, ChannelGroups, Member
from torchshear.errors import ArgumentError, MaskError
from torchshear.pruners.masks._candidates import Candidate, Masked
from torchshear.pruners.masks._layers import LayerWeight, MaskableLayer, find_maskable_layers
from torchshear.pruners.masks._masks import LayerReport, Masks
from torchshear.pruners.masks._members import by_position, mask_of_units, unit_values
from torchshear.pruners.masks._patterns import HEADS, Reduce
from torchshear.pruners.masks._scores import Scorer

_MASKED: Final = frozenset({"out", "in", "bias"})
_BY_DEFAULT: Final = frozenset({"heads", "kv_heads"})


def head_groups(groups: object) -> dict[str, ChannelGroup]:
    """Groups whose units are heads, by name.

    Raises:
        ArgumentError: it is no analysed network.
        MaskError: it has no heads.
    """
    if not isinstance(groups, ChannelGroups):
        raise ArgumentError(
            f"pattern='heads' with groups={type(groups).__name__}; expected the channel groups of the model, "
            f"torchshear.analyze(torchshear.trace(model, inputs)), which say where heads are."
        )
    found = {group.name: group for group in groups if group.role in _BY_DEFAULT | {"q_heads"}}
    if not found:
        raise MaskError(
            f"no channel group of this model is of heads; its roles are "
            f"{', '.join(sorted({group.role for group in groups} & ROLES.keys())) or 'none'}."
        )
    return found


def is_default(group: ChannelGroup) -> bool:
    """Return whether the heads of a group are masked where no group is named; query heads go with what they read."""
    return group.role in _BY_DEFAULT


def weights_of_heads(model: nn.Module, groups: ChannelGroups, chosen: list[ChannelGroup]) -> dict[str, MaskableLayer]:
    """The weights and biases in which heads lie by canonical name, as layers to be scored.

    These are the parameters of which the analysis knows that they make or read heads, and those of registered layers,
    which may use their weights in ways of their own.

    Raises:
        MaskError: a parameter of the groups has another shape in the model.
    """
    layers = {id(layer): layer for layer in find_maskable_layers(model).values()}.values()
    known = {layer.weight: layer for layer in layers}
    of_layers = known.keys() | {layer.bias for layer in layers}
    found: dict[str, MaskableLayer] = {}
    for member in (member for group in chosen for member in group.members):
        name, entry = member.name, groups.graph.state[member.name]
        if entry.kind != "parameter" or not (member.purposes & _MASKED or name in of_layers):
            continue
        layer = known.get(name) or MaskableLayer(name, name, None, LayerWeight(bias=None), entry.tensor)
        if tuple(layer.tensor.shape) != entry.shape:
            raise MaskError(f"{name!r} has another shape in the model than in its channel groups; analyse this model.")
        found[name] = layer
    return found


def head_candidate(
    groups: ChannelGroups,
    group: ChannelGroup,
    weights: Mapping[str, MaskableLayer],
    scorer: Scorer,
    reduce: Reduce,
    previous: Masks | None,
) -> Candidate | LayerReport:
    """The heads of one attention layer.

    s_h = reduce over all weights of head h, in its rows of the projections and its columns of the output projection,
    of their scores. The mean is that of Neural Compressor, where queries, keys and values have equally many weights.
    """
    report = LayerReport(group.name, HEADS, (), HEADS, group.width, 0, 0.0, 0.0)
    members = [member for member in group.members if member.name in weights]
    scored = [member for member in members if weights[member.name].tensor.ndim > 1]  # biases are masked only
    if not scored:
        return replace(report, note="skipped: no projection holds its heads")
    before = {member.name: _before(weights[member.name], previous) for member in members}
    total, count = torch.zeros(group.width, dtype=torch.float64), torch.zeros(group.width, dtype=torch.float64)
    for member in scored:
        scores = scorer(weights[member.name]).cpu().double().masked_fill(~before[member.name], 0.0)
        lines = by_position(member, scores)
        per_line = lines.amax(1) if reduce == "max" else lines.sum(1)
        found = unit_values(member, per_line, group.width, reduce)
        total = torch.maximum(total, found) if reduce == "max" else total + found
        n_values = torch.full((member.size,), float(lines.shape[1]), dtype=torch.float64)
        count += unit_values(member, n_values, group.width)
    is_gone = torch.stack([_gone(member, before[member.name], group.width) for member in scored]).all(0)
    heads = (total / count if reduce == "mean" else total).masked_fill(is_gone, -torch.inf)
    shapes = {member.name: groups.graph.state[member.name].shape for member in members}
    return Candidate(report, heads, 1.0, partial(_build, members, shapes, before))


def _before(layer: MaskableLayer, previous: Masks | None) -> Tensor:
    known = previous.tensors.get(layer.weight) if previous is not None else None
    return torch.ones(layer.tensor.shape, dtype=torch.bool) if known is None else known


def _gone(member: Member, before: Tensor, width: int) -> Tensor:
    left = by_position(member, before).any(1).double()
    return unit_values(member, left, width) == 0


def _build(
    members: list[Member], shapes: Mapping[str, tuple[int, ...]], before: Mapping[str, Tensor], kept: Tensor
) -> Masked:
    masks = dict(before)
    for member in members:
        masks[member.name] = masks[member.name] & mask_of_units(member, shapes[member.name], kept)
    return masks
