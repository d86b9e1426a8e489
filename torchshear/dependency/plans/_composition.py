"""Composition of two plans: the units that are left when a second cuts what a first one leaves; and its inverse."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from torchshear.dependency.groups._groups import ChannelGroup, ChannelGroups
from torchshear.dependency.plans._cut import Bools, Cut
from torchshear.dependency.plans._tensor_plans import StatePlan
from torchshear.errors import PlanError

Indices = npt.NDArray[np.int64]


def compose_units(
    groups: ChannelGroups, first: Mapping[str, Indices], second: Mapping[str, StatePlan]
) -> dict[str, Indices]:
    """Return the units of a network that stay when what is left of its parameters is cut again.

    Groups of the smaller network may have other names and come in another order (those of one dimension, as heads and
    their widths, are named by their sizes), so plans meet in positions of parameters: a unit stays if any position
    that depends on it does.

    Args:
        groups: the analysed network.
        first: group name -> units that the first plan keeps.
        second: name of a parameter or buffer -> what the second plan keeps of what the first leaves of it.

    Returns:
        Group name -> kept units, ascending.

    Raises:
        PlanError: the second plan cuts positions that no units of the network stand for.
    """
    before = Cut(groups, first)
    saved = [name for name, entry in groups.graph.state.items() if entry.is_saved and name in groups.facts.state_axes]
    left = {name: _kept_by_both(before, name, second.get(name)) for name in saved}
    kept = {group.name: _units(group, left) for group in groups}
    after = Cut(groups, kept)
    for name, masks in left.items():
        if not all(np.array_equal(*pair) for pair in zip(after.state_keep(name)[0], masks, strict=True)):
            raise PlanError(
                f"the second plan cuts positions of {name!r} that no units of the first plan's groups stand for: it is "
                f"not a plan for the pruned model."
            )
    return kept


def _kept_by_both(cut: Cut, name: str, entry: StatePlan | None) -> list[Bools]:
    """Return masks of the positions of each dimension that both plans keep, in the dense network."""
    masks, _ = cut.state_keep(name)
    found = []
    for dim, mask in enumerate(masks):
        positions = np.flatnonzero(mask)
        if entry is not None and dim in entry.kept:
            size = entry.shape[dim] * max(entry.blocks.get(dim, 0), 1)
            if size != len(positions):
                raise PlanError(
                    f"the second plan cuts {size} positions of dimension {dim} of {name!r}, of which the first leaves "
                    f"{len(positions)}: it is not a plan for the pruned model."
                )
            positions = positions[entry.kept[dim]]
        both = np.zeros(len(mask), bool)
        both[positions] = True
        found.append(both)
    return found


def _units(group: ChannelGroup, left: Mapping[str, list[Bools]]) -> Indices:
    """Return the units of a group of which a position is left; all of a group that no saved tensor holds."""
    members = [member for member in group.members if member.name in left]
    stays = np.full(group.width, not members)
    for member in members:
        stays[member.units[left[member.name][member.dim][member.positions]]] = True
    return np.flatnonzero(stays)


def state_between(first: Mapping[str, StatePlan], second: Mapping[str, StatePlan]) -> dict[str, StatePlan]:
    """Return what a plan keeps of what another plan for the same model, which keeps all of that and more, leaves.

    Args:
        first: canonical name -> what the one keeps that keeps more.
        second: the same of the other.

    Returns:
        Canonical name -> what has to go of the tensor that the first leaves; those that stay as they are left out.
    """
    found = {}
    for name, entry in second.items():
        before = first.get(name)
        if before is None:
            found[name] = entry
            continue
        # Positions run over blocks of equally many, so that their numbers among those that are left are their ranks.
        kept = {
            dim: np.searchsorted(before.kept[dim], positions) if dim in before.kept else positions
            for dim, positions in entry.kept.items()
            if dim not in before.kept or len(before.kept[dim]) != len(positions)
        }
        if kept:
            blocks = {dim: n for dim, n in entry.blocks.items() if dim in kept}
            found[name] = StatePlan(before.new_shape, kept, blocks, is_saved=entry.is_saved)
    return found
