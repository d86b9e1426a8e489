"""Error that is left in the layers that read a group after the best refit of what they read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchshear._arguments import check_kind
from torchshear.calibration import Statistics
from torchshear.calibration._statistics import ValueSums
from torchshear.calibration._sums import wide
from torchshear.dependency import ChannelGroup, ChannelGroups, Member
from torchshear.dependency.groups._purposes import READING_PURPOSES
from torchshear.errors import ArgumentError
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._statistic_sums import with_needs
from torchshear.pruners.criteria._weight_sums import not_finite, readable

_RIDGE = 1e-3  # of the mean variance, as a refit from some hundred samples would take
_POOL, _POOL_SHARE = 32, 8  # units that are looked at together: at least so many, and one of so many
_TIE = 1e-9  # units that cost the same stay in the order in which they went


@criterion("reconstruction", needs=("grams",), comparable=True, whole=True)
def reconstruction_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by the error that its removal adds after all that reads the group is refitted; shape (C,).

    Units go one after another, each time the one with the least

        s_c = sum over readers of  tr((H_cc)^-1 B_cc) / tr(B_0 S),    H = (S + lambda I)^-1,    B = W^T W

    S being the covariance of the reader's inputs and W its weight. The error is that of its output, relative to its
    variance, after the best refit by the inputs that are left; H and B are updated after each removal. Scores never
    fall from one removal to the next. Kernels count tap by tap, as if what lies under different taps was independent,
    and so do the inputs of a layer that has more than 4,608.

    Low scores go first: units that others can stand in for. Needs activations: statistics of
    `torchshear.collect(graph, loader, criteria="reconstruction")`.

    Raises:
        ArgumentError: there are no statistics.
        UnscorableError: no layer reads the units of the group whose inputs were seen, are few enough and vary.
        WeightError: a weight is missing, without values, or not finite.

    Reference: optimal brain surgeon on structures, Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580, and Kurtic et
    al., NeurIPS 2023, arXiv:2302.04089; here over all readers of a group at once, and relative to what each gives.
    """
    order, added = _remove_all(group, weights, with_needs(statistics, "reconstruction"))
    scores = torch.zeros(group.width, dtype=torch.float64)
    ranks = torch.arange(group.width, dtype=torch.float64)
    scores[order] = added.cummax(0).values * (1 + _TIE * ranks)
    return scores


def reconstruction_errors(groups: ChannelGroups, statistics: Statistics) -> dict[str, Tensor]:
    """Return the error that is left at every width of every group, after the best refit of the layers that read it.

    Args:
        groups: the analysed network, with its weights.
        statistics: what `torchshear.collect(graph, loader, criteria="reconstruction")` gave.

    Returns:
        Name of a group -> errors with 0, 1, ... units removed, shape (C + 1,), float64: the sum over the layers that
        read it of their squared errors relative to the variance of their outputs. Groups that no layer reads whose
        inputs were seen are left out.

    Raises:
        ArgumentError: the statistics are of another network, or were collected for other criteria.
        WeightError: a weight is on the meta device, or not finite.
    """
    check_kind("groups", groups, ChannelGroups, "what torchshear.analyze gives")
    check_kind("statistics", statistics, Statistics, "what torchshear.collect gives")
    if statistics.fingerprint != groups.graph.fingerprint:
        raise ArgumentError(
            "the statistics are of another network than the groups; collect them on the graph that was analysed."
        )
    found: dict[str, Tensor] = {}
    weights = {name: entry.tensor for name, entry in groups.graph.state.items()}
    for group in groups.prunable:
        try:
            _, added = _remove_all(group, weights, with_needs(statistics, "reconstruction"))
        except UnscorableError:
            continue
        found[group.name] = torch.cat([added.new_zeros(1), added.cumsum(0)])
    return found


@dataclass(slots=True, eq=False)
class _Reader:
    """A layer that reads units of a group.

    Attributes:
        inverse: H, inverse of the covariance of its inputs with a ridge, shape (P, P).
        products: B = W^T W over its outputs and taps, shape (P, P).
        places: positions of each unit, shape (C, s); P where a unit has fewer than s.
        variance: variance of its output.
    """

    inverse: Tensor
    products: Tensor
    places: Tensor
    variance: Tensor

    def costs(self) -> Tensor:
        """Return the relative error that the removal of each unit adds, shape (C,)."""
        size = len(self.inverse)
        is_none = self.places == size
        index = self.places.clamp_max(size - 1)
        rows, columns = index.unsqueeze(2), index.unsqueeze(1)
        blank = is_none.unsqueeze(2) | is_none.unsqueeze(1)
        inverse, products = self.inverse[rows, columns], self.products[rows, columns]
        if self.places.shape[1] == 1:
            costs: Tensor = torch.where(blank, 0.0, products / inverse).flatten() / self.variance
            return costs
        eye = torch.eye(self.places.shape[1], dtype=inverse.dtype).expand_as(inverse)
        inverse, products = torch.where(blank, eye, inverse), torch.where(blank, 0.0, products)
        costs = torch.linalg.solve(inverse, products).diagonal(dim1=1, dim2=2).sum(1) / self.variance
        return costs

    def remove(self, units: Tensor) -> None:
        """Take the inputs of units away, and refit the weight to those that are left."""
        size = len(self.inverse)
        gone: Tensor = self.places[units].flatten().unique()  # type: ignore[no-untyped-call]
        gone = gone[gone < size]
        rows = self.inverse[gone]
        step = torch.linalg.solve(rows[:, gone], rows)  # (s, P)
        moved = self.products[:, gone] @ step
        self.products = self.products + step.mT @ self.products[gone][:, gone] @ step - moved - moved.mT
        self.inverse = self.inverse - rows.mT @ step
        left = torch.ones(size, dtype=torch.bool)
        left[gone] = False
        numbers = torch.cat([left.cumsum(0) - 1, left.sum().reshape(1)])
        self.inverse, self.products = self.inverse[left][:, left], self.products[left][:, left]
        self.places = numbers[self.places]
        self.places[units] = len(self.inverse)

    def restricted(self, units: Tensor) -> "_Reader":
        """Return the reader of some units alone, which is all that removals among them need."""
        size = len(self.inverse)
        own: Tensor = self.places[units].flatten().unique()  # type: ignore[no-untyped-call]
        own = own[own < size]
        numbers = torch.full((size + 1,), len(own))
        numbers[own] = torch.arange(len(own))
        inverse, products = self.inverse[own][:, own], self.products[own][:, own]
        return _Reader(inverse, products, numbers[self.places[units]], self.variance)


@dataclass(slots=True, eq=False)
class _WideReader:
    """A layer with so many inputs that they count as independent.

    Attributes:
        fixed: relative error that the removal of each unit adds, shape (C,).
    """

    fixed: Tensor

    def costs(self) -> Tensor:
        """Return the relative error that the removal of each unit adds, shape (C,)."""
        return self.fixed

    def remove(self, units: Tensor) -> None:
        """Leave the costs of all other units as they are."""

    def restricted(self, units: Tensor) -> "_WideReader":
        """Return the reader of some units alone."""
        return _WideReader(self.fixed[units])


def _remove_all(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Remove all units greedily.

    Those with the least costs go one after another while they cost no more than any other did, which needs their own
    part of the matrices alone. All others follow then, and the next ones are taken.

    Returns:
        The units in the order in which they went, shape (C,), and the error that each added, shape (C,).
    """
    readers = list(_find_readers(group, weights, statistics))
    if not readers:
        raise UnscorableError("reconstruction: no layer reads its units, of whose inputs some vary over the data")
    order: list[Tensor] = []
    added: list[Tensor] = []
    is_gone = torch.zeros(group.width, dtype=torch.bool)
    while not bool(is_gone.all()):
        costs = torch.stack([reader.costs() for reader in readers]).sum(0).masked_fill(is_gone, torch.inf)
        n_left = int((~is_gone).sum())
        ranked = costs.argsort(stable=True)[:n_left]
        pool, others = ranked.tensor_split((max(_POOL, n_left // _POOL_SHARE),))
        limit = costs[others[0]] if len(others) else torch.tensor(torch.inf)
        parts = [reader.restricted(pool) for reader in readers]
        is_taken = torch.zeros(len(pool), dtype=torch.bool)
        while not bool(is_taken.all()):
            own = torch.stack([part.costs() for part in parts]).sum(0).masked_fill(is_taken, torch.inf)
            place = own.argmin()
            if bool(is_taken.any()) and own[place] > limit:
                break
            is_taken[place] = True
            order.append(pool[place])
            added.append(own[place].clamp_min(0))
            for part in parts:
                part.remove(place.reshape(1))
        is_gone[pool[is_taken]] = True
        for reader in readers:
            reader.remove(pool[is_taken])
    return torch.stack(order), torch.stack(added)


def _find_readers(
    group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics
) -> Iterator[_Reader | _WideReader]:
    """Find the layers that read units of a group and whose inputs were seen."""
    for member in group.members:
        if member.name not in weights or not member.purposes & READING_PURPOSES:
            continue
        calls = [call for call in statistics.layers if call.weight == member.name and call.inputs == member.dim]
        sums = [statistics.values.get((call.source, call.dim)) for call in calls if call.dim is not None]
        seen = [one for one in sums if one is not None]
        grams = [one.grams for one in seen if len(one.grams) == member.size + 1]
        if grams:
            yield from _reader(member, group.width, weights[member.name], torch.stack(grams).sum(0))
        elif seen and all(len(one.squares) == len(one.total) == member.size for one in seen):
            yield from _wide_reader(member, group.width, weights[member.name], seen)


def _reader(member: Member, width: int, weight: Tensor, grams: Tensor) -> Iterator[_Reader]:
    """Make a reader from the products of its inputs, unless its output is constant."""
    count, mean = grams[-1, -1], grams[-1, :-1] / grams[-1, -1]
    covariance = grams[:-1, :-1] / count - mean.unsqueeze(1) * mean
    rows = _rows(member, weight)
    products: Tensor = torch.block_diag(*(rows @ rows.mT))  # type: ignore[no-untyped-call]
    variance = (products * covariance).sum()
    if variance > 0:
        ridge = _RIDGE * covariance.diagonal().mean()
        inverse = torch.linalg.inv(covariance + ridge * torch.eye(member.size, dtype=torch.float64))
        yield _Reader(inverse, products, _places(member, width), variance)


def _wide_reader(member: Member, width: int, weight: Tensor, seen: list[ValueSums]) -> Iterator[_WideReader]:
    """Make a reader from the variance of each input alone."""
    count = sum(one.count for one in seen)
    mean = torch.stack([one.total for one in seen]).sum(0) / count
    variances = (torch.stack([one.squares for one in seen]).sum(0) / count - mean.square()).clamp_min(0)
    shares = variances * _rows(member, weight).square().sum(2).flatten()
    if shares.sum() > 0:
        units, positions = torch.from_numpy(member.units), torch.from_numpy(member.positions)
        costs = torch.zeros(width, dtype=torch.float64).index_add_(0, units, shares[positions])
        yield _WideReader(costs / shares.sum())


def _rows(member: Member, weight: Tensor) -> Tensor:
    """Return a weight as blocks of rows, one for each position; shape (blocks, P / blocks, numbers), float64."""
    value = wide(readable(member, weight)).cpu()
    if not bool(value.isfinite().all()):
        raise not_finite(member, weight)
    blocks = value.reshape(max(member.n_blocks, 1), -1, *value.shape[1:]) if member.n_blocks else value.unsqueeze(0)
    return blocks.movedim(member.dim + 1, 1).flatten(2).double()


def _places(member: Member, width: int) -> Tensor:
    """Return the positions of each unit, shape (C, s), filled up with the number of all positions."""
    found: list[list[int]] = [[] for _ in range(width)]
    for position, unit in zip(member.positions.tolist(), member.units.tolist(), strict=True):
        found[unit].append(position)
    most = max(map(len, found))
    return torch.tensor([places + [member.size] * (most - len(places)) for places in found])
