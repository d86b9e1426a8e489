"""Forming channel groups: units with the same members are one group."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from torchshear.dependency.algebra._axis import Algebra, Axis
from torchshear.dependency.algebra._units import PAD, Ids
from torchshear.dependency.groups._constraints import (
    blocks_repeat,
    fix_unclear_minimums,
    is_plain,
    keep_crossings,
    minimum_units,
    refine_labels,
    tie_blocks,
)
from torchshear.dependency.groups._groups import ChannelGroup, ChannelGroups, FixedDimension, Member
from torchshear.dependency.groups._roles import assign_roles
from torchshear.dependency.groups._weights import assign_factor_roles, assign_norm_scales
from torchshear.dependency.rules._findings import Facts
from torchshear.graph import Graph
from torchshear.graph._location import locate

_OF_LAYERS = frozenset({"in", "out", "depthwise", "factor"})  # purposes of dimensions of weights


@dataclass(frozen=True, slots=True)
class _Dimension:
    """A dimension of a parameter with the atoms of its positions."""

    name: str
    dim: int
    axis: Axis
    n_blocks: int
    positions: Ids
    atoms: Ids
    layer: str


@dataclass(frozen=True, slots=True)
class _Shared:
    """Equal arrays as one: the layers of a deep network are alike, and so are most positions and units of members."""

    known: dict[tuple[int, bytes], Ids] = field(default_factory=dict)

    def one(self, array: Ids) -> Ids:
        """The first array with these values that was given."""
        array = np.ascontiguousarray(array)
        return self.known.setdefault((len(array), hashlib.blake2b(array.data, digest_size=16).digest()), array)


def form_groups(graph: Graph, algebra: Algebra, facts: Facts, training: Facts | None) -> ChannelGroups:
    """Collect the dimensions of all parameters and buffers and group their units.

    A balanced axis whose units fall into several groups cannot be kept balanced by choosing inside one group; its
    blocks are tied, and groups are formed again.
    """
    while True:
        dimensions = _dimensions(graph, algebra, facts)
        group_of, n_groups = _assign(algebra, dimensions, facts)
        labels = _block_labels(algebra, facts, group_of)
        if labels is not None and not fix_unclear_minimums(algebra, facts, group_of):
            break
    members = _members(facts, dimensions, group_of)
    # Groups whose units are shared out among several dimensions, with the number of those.
    joint: dict[int, int] = {}
    for balance in facts.balances:
        rows = algebra.store.resolve(balance.axis.units)
        if balance.is_joint and rows.shape[1] and is_plain(rows):
            joint[int(group_of[rows.max()])] = balance.n_blocks
    min_units = minimum_units(algebra, facts, group_of)
    keep_crossings(algebra, (dimension.axis for dimension in dimensions), group_of, min_units, joint)
    # Groups whose units an operator computes with over a whole axis, as norms and softmax do.
    mixed = [algebra.store.resolve(axis.units) for axes in facts.cross_channel.values() for axis in axes]
    cross_channel = {group for rows in mixed for group in group_of[rows[rows != PAD]].tolist()}
    read = [node for node in graph if node.op == "get_attr" and node.users]
    first_users = {str(node.target): str(locate(next(iter(node.users)))) for node in read}
    groups: list[ChannelGroup] = []
    names: dict[str, int] = defaultdict(int)  # how many groups have a name already
    shared = _Shared()
    for index in range(n_groups):
        first = members[index][0][0]
        name = f"{first.name}[{first.dim}]"
        names[name] += 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        made = _group(index, name, members[index], labels, index in cross_channel, first_users, joint, shared)
        convolutions = _convolution_groups(graph, facts, made)
        groups.append(replace(made, min_units=min_units.get(index, 1), convolution_groups=convolutions))
    analysed = [(graph, facts)]
    if graph.training is not None and training is not None:
        analysed.append((graph.training, training))
    named = assign_factor_roles(graph, facts, groups)
    described = assign_roles(analysed, algebra, assign_norm_scales(graph, facts, named))
    return ChannelGroups(graph, described, _fixed_dimensions(graph, algebra, facts), algebra, facts, training)


def _dimensions(graph: Graph, algebra: Algebra, facts: Facts) -> list[_Dimension]:
    """Dimensions with units that can be cut; units that stand in buffers and constants alone are left out."""
    found: list[_Dimension] = []
    shared = _Shared()
    for name, axes in facts.state_axes.items():
        blocked = facts.blocked.get(name)
        for dim, own in enumerate(axes):
            is_blocked = blocked is not None and blocked[0] == dim
            axis = blocked[1] if blocked is not None and is_blocked else own
            rows = algebra.store.resolve(axis.units)
            positions, columns = np.nonzero(rows)
            if positions.size:
                n_blocks = blocked[2] if blocked is not None and is_blocked else 0
                atoms = shared.one(rows[positions, columns])
                layer = facts.layers.get(name, "")
                found.append(_Dimension(name, dim, axis, n_blocks, shared.one(positions), atoms, layer))
    in_parameters = np.zeros(len(algebra.store), bool)
    for dimension in found:
        if graph.state[dimension.name].kind == "parameter":
            in_parameters[dimension.atoms] = True
    return [dimension for dimension in found if in_parameters[dimension.atoms].all()]


def _assign(algebra: Algebra, dimensions: list[_Dimension], facts: Facts) -> tuple[Ids, int]:
    """Number of the group of each unit (-1 for none), groups counted in order of first appearance.

    A unit's signature is the sum, over the dimensions in which it stands, of a hash of dimension and multiplicity;
    with its family it tells, say, heads from head dimensions of one weight. Parts that operators cut from an axis count
    as dimensions here: units of different parts are different groups, so that each part keeps something. Dimensions
    that must stay equally wide make one group.
    """
    size = len(algebra.store)
    signature = np.zeros(size, np.uint64)
    first = np.zeros(size, np.int64)
    offset = 0
    for number, dimension in enumerate(dimensions, 1):
        atoms, where, counts = _counted(dimension.atoms)
        new = signature[atoms] == 0
        first[atoms[new]] = offset + dimension.positions[where[new]]
        signature[atoms] += _hash(counts.astype(np.uint64) + np.uint64(number << 32))
        offset += dimension.axis.size
    for number, part in enumerate(facts.nonempty, len(dimensions) + 1):
        rows = algebra.store.resolve(part.units)
        atoms, counts = np.unique(rows[(rows != PAD) & (signature[rows] != 0)], return_counts=True)
        signature[atoms] += _hash(counts.astype(np.uint64) + np.uint64(number << 32))
    atoms = np.flatnonzero(signature)
    keys = _hash(_hash(signature[atoms]) + algebra.store.families(atoms).astype(np.uint64))
    _join(algebra, facts, atoms, keys)
    _, inverse = np.unique(keys, return_inverse=True)
    n_groups = int(inverse.max()) + 1 if atoms.size else 0
    appearance = np.full(n_groups, np.iinfo(np.int64).max)
    np.minimum.at(appearance, inverse, first[atoms])
    rank = np.empty(n_groups, np.int64)
    rank[np.argsort(appearance, kind="stable")] = np.arange(n_groups)
    group_of = np.full(size, -1, np.int64)
    group_of[atoms] = rank[inverse]
    return group_of, n_groups


def _counted(atoms: Ids) -> tuple[Ids, Ids, Ids]:
    """Each atom once, ascending, with its first place and how often it stands there."""
    if (atoms[1:] > atoms[:-1]).all():
        return atoms, np.arange(len(atoms)), np.ones(len(atoms), np.int64)
    return np.unique(atoms, return_index=True, return_counts=True)


def _join(algebra: Algebra, facts: Facts, atoms: Ids, keys: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> None:
    """Give the units of dimensions that must stay equally wide one key, in place.

    Only where each of these dimensions would be a group of its own; `_block_labels` ties the others.
    """
    for balance in facts.balances:
        rows = algebra.store.resolve(balance.axis.units)
        if not balance.is_joint or rows.shape[1] == 0 or not is_plain(rows):
            continue
        blocks = [block[block != PAD] for block in rows[:, 0].reshape(balance.n_blocks, -1)]
        where = [np.searchsorted(atoms, block) for block in blocks]
        are_known = all(at.size and np.isin(block, atoms).all() for at, block in zip(where, blocks, strict=True))
        if are_known and all((keys[at] == keys[at[0]]).all() for at in where):
            keys[np.concatenate(where)] = keys[where[0][0]]


def _hash(values: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """SplitMix64 (Steele et al., OOPSLA 2014): well mixed 64-bit values of small integers."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _block_labels(algebra: Algebra, facts: Facts, group_of: Ids) -> dict[int, dict[int, int]] | None:
    """Block labels of units by group, or None if an axis had to be tied and groups must be formed anew."""
    labels: dict[int, Ids] = {}
    atoms_of: dict[int, Ids] = {}
    for balance in facts.balances:
        rows = algebra.store.resolve(balance.axis.units)
        if rows.shape[1] == 0 or blocks_repeat(rows, balance.n_blocks):
            continue
        units = rows[:, 0]
        free = units != PAD
        groups = np.unique(group_of[units[free]]) if is_plain(rows) else np.array([-1])
        group = int(groups[0])
        whole = np.flatnonzero(group_of == group)
        if len(groups) > 1 or group < 0 or len(whole) != free.sum():
            tie_blocks(algebra, balance)
            return None
        block = (np.arange(len(units)) // (len(units) // balance.n_blocks))[free]
        order = np.argsort(units[free])
        atoms_of[group] = units[free][order]
        new = block[order]
        labels[group] = refine_labels(labels[group], new) if group in labels else new
    return {group: dict(zip(atoms_of[group].tolist(), labels[group].tolist(), strict=True)) for group in labels}


def _members(
    facts: Facts, dimensions: list[_Dimension], group_of: Ids
) -> dict[int, list[tuple[_Dimension, frozenset[str], Ids, Ids]]]:
    """For each group its dimensions, each with roles, positions and atoms, in order of the graph."""
    members: dict[int, list[tuple[_Dimension, frozenset[str], Ids, Ids]]] = defaultdict(list)
    for dimension in dimensions:
        roles = frozenset(facts.purposes.get((dimension.name, dimension.dim), {"raw"}))
        of = group_of[dimension.atoms]
        if (of == of[0]).all():
            members[int(of[0])].append((dimension, roles, dimension.positions, dimension.atoms))
            continue
        for group in np.unique(of):
            here = of == group
            members[int(group)].append((dimension, roles, dimension.positions[here], dimension.atoms[here]))
    return members


def _group(
    index: int,
    name: str,
    members: list[tuple[_Dimension, frozenset[str], Ids, Ids]],
    labels: dict[int, dict[int, int]],
    is_cross_channel: bool,
    users: dict[str, str],
    joint: dict[int, int],
    shared: _Shared,
) -> ChannelGroup:
    # The first dimension holds all units, but of a group that is shared out among several.
    atoms = np.concatenate([atoms for _, _, _, atoms in (members if index in joint else members[:1])])
    _, where, _ = _counted(atoms)
    ordered = atoms[np.sort(where)]
    by_atom = np.argsort(ordered)
    block = labels.get(index)
    units: dict[int, Ids] = {}  # by the identity of the atoms that they number

    def numbered(which: Ids) -> Ids:
        if id(which) not in units:
            units[id(which)] = shared.one(by_atom[np.searchsorted(ordered, which, sorter=by_atom)])
        return units[id(which)]

    made = tuple(
        Member(
            dimension.name,
            dimension.dim,
            roles,
            shared.one(at),
            numbered(which),
            dimension.axis.size,
            dimension.n_blocks,
            layer=dimension.layer,
        )
        for dimension, roles, at, which in members
    )
    where_used = tuple(dict.fromkeys(users[member.name] for member in made if member.name in users))
    return ChannelGroup(
        name=name,
        width=len(ordered),
        members=made,
        balance=None if block is None else np.array([block[int(atom)] for atom in ordered], np.int64),
        is_cross_channel=is_cross_channel,
        atoms=ordered,
        where=where_used[:4],
        n_peers=joint.get(index, 1),
    )


def _convolution_groups(graph: Graph, facts: Facts, group: ChannelGroup) -> int:
    """Return the largest number of groups of a convolution of maps that reads or makes the units, 0 without any."""
    found = [0]
    for member in group.members:
        if len(graph.state[member.name].shape) == 4 and member.purposes & _OF_LAYERS:
            is_whole = member.multiplicity == 1 and len(member.units) == group.width
            found.append(facts.blocked[member.name][2] if is_whole and member.name in facts.blocked else 1)
    return max(found)


def _fixed_dimensions(graph: Graph, algebra: Algebra, facts: Facts) -> tuple[FixedDimension, ...]:
    found: list[FixedDimension] = []
    for name, axes in facts.state_axes.items():
        for dim, axis in enumerate(axes):
            blocked = facts.blocked.get(name)
            if axis.size <= 1 or (blocked is not None and blocked[0] == dim) or not algebra.is_fixed(axis):
                continue
            reason = str(algebra.store.first_reason(axis.units) or "fixed")
            if graph.state[name].kind == "parameter" and not reason.startswith("size of a kernel"):
                found.append(FixedDimension(name, dim, axis.size, reason))
    # Parameters that no operator reads; where only parts are captured, those of the parts.
    captured = (graph, graph.training) if graph.training is not None else (graph,)
    read = {str(node.target) for one in captured for node in one if node.op == "get_attr"}
    inside = tuple(f"{name}." for name in graph.parts.names) if graph.parts is not None else ("",)
    for name, entry in graph.state.items():
        if entry.kind == "parameter" and name not in read and name.startswith(inside):
            sizes = enumerate(entry.shape)
            found += [FixedDimension(name, dim, size, "no operator reads it") for dim, size in sizes if size > 1]
    return tuple(found)
