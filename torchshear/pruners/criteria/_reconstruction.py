"""Rise of the loss that is left after the best refit of the layers that read a group."""

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
_RIDGES = (1e-2, 1e-1, 1.0)  # of each variance, for the error on samples held out
_SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)  # of the units, at which that is taken
_POOL, _POOL_SHARE = 32, 8  # units that are looked at together: at least so many, and one of so many
_TIE = 1e-9  # units that cost the same stay in the order in which they went


@criterion("reconstruction", needs=("grams", "output_gradients"), comparable=True, whole=True, per_cost=True)
def reconstruction_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by how much its removal raises the loss after all that reads the group is refitted; shape (C,).

    Units go one after another, each time the one with the least

        s_c = sum over readers of  tr((H_cc)^-1 B_cc) / tr(B_0 S),    H = (S + lambda I)^-1,    B = W^T W

    S being the covariance of the reader's inputs and W its weight. That is the error of its output, relative to its
    variance, after the best refit by the inputs that are left; H and B are updated after each removal. Kernels count
    tap by tap, as if what lies under different taps was independent, and so do the inputs of a layer that has more than
    4,608.

    Scores are then what the loss rises by, to second order: the error e of each output on a quarter of the samples,
    which the refit does not see, gives the sum over outputs of f e / 2. f is the squared gradient of the loss by that
    output, summed over positions and averaged over samples, which stands for the curvature (Fisher information). This
    is taken at ten widths of the group, and spread evenly over the units between two of them. Ranked together under a
    budget, groups give way by score for each operation or parameter. Without gradients, as of a model that gives
    integers, errors count relative to the variance of the reader's output.

    Low scores go first: units that others can stand in for. Needs activations: statistics of
    `torchshear.collect(graph, loader, criteria="reconstruction")`, which takes gradients as well, without a `loss_fn`
    those of `loss_fn="dense"`.

    Raises:
        ArgumentError: there are no statistics.
        UnscorableError: no layer reads the units of the group whose inputs were seen, are few enough and vary.
        WeightError: a weight is missing, without values, or not finite.

    Reference: optimal brain surgeon on structures, Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580, and Kurtic et
    al., NeurIPS 2023, arXiv:2302.04089; here over all readers of a group at once, weighed by Fisher information as in
    Theis et al., arXiv:1801.05787, and measured on other samples than those of the fit.
    """
    order, added = _remove_all(group, weights, with_needs(statistics, "reconstruction"))
    scores = torch.zeros(group.width, dtype=torch.float64)
    ranks = torch.arange(group.width, dtype=torch.float64)
    scores[order] = added.cummax(0).values * (1 + _TIE * ranks)
    return scores


def reconstruction_errors(groups: ChannelGroups, statistics: Statistics) -> dict[str, Tensor]:
    """Return the rise of the loss at every width of every group, after the best refit of the layers that read it.

    Args:
        groups: the analysed network, with its weights.
        statistics: what `torchshear.collect(graph, loader, criteria="reconstruction")` gave.

    Returns:
        Name of a group -> rise with 0, 1, ... units removed, shape (C + 1,), float64, estimated on samples held out as
        the criterion `reconstruction` does. Groups that no layer reads whose inputs were seen are left out.

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


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A layer that reads units of a group, and what was seen of its P inputs.

    Attributes:
        covariance: S over all samples, shape (P, P).
        apart: S over the samples to fit to, and over those held out; None where there are too few samples for both.
        products: W^T W over its outputs and taps, relative to the variance of its output, shape (P, P).
        losses: W^T diag(f) W / 2, what an error costs in loss, shape (P, P); the same as `products` without gradients.
        places: positions of each unit, shape (C, s); P where a unit has fewer than s.
    """

    covariance: Tensor
    apart: tuple[Tensor, Tensor] | None
    products: Tensor
    losses: Tensor
    places: Tensor

    def error_without(self, units: Tensor) -> Tensor:
        """Return the error on samples held out when units go and the rest is refitted, at the best of some ridges."""
        assert self.apart is not None
        gone: Tensor = self.places[units].flatten().unique()  # type: ignore[no-untyped-call]
        gone = gone[gone < len(self.covariance)]
        is_left = torch.ones(len(self.covariance), dtype=torch.bool)
        is_left[gone] = False
        left = is_left.nonzero().squeeze(1)
        (fit, seen), cost = self.apart, self.losses[gone][:, gone]
        errors = [(cost * seen[gone][:, gone]).sum()]  # nothing stands in
        own, across = fit[left][:, left], fit[left][:, gone]
        for ridge in _RIDGES if len(left) else ():
            variances = own.diagonal().clamp_min(1e-9 * fit.diagonal().mean())
            map_ = torch.linalg.solve(own + ridge * torch.diag(variances), across)  # what stays for what goes
            crossed = map_.mT @ seen[left][:, gone]
            rest = seen[gone][:, gone] - crossed - crossed.mT + map_.mT @ seen[left][:, left] @ map_
            errors.append((cost * rest).sum())
        return torch.stack(errors).min().clamp_min(0)


@dataclass(slots=True, eq=False)
class _Reader:
    """A layer that reads units of a group.

    Attributes:
        inverse: H, inverse of the covariance of its inputs with a ridge, shape (P, P).
        products: B over its outputs and taps, shape (P, P).
        places: positions of each unit, shape (C, s); P where a unit has fewer than s.
    """

    inverse: Tensor
    products: Tensor
    places: Tensor

    @classmethod
    def of(cls, layer: "_Layer") -> "_Reader":
        """Make the reader of a layer, with all of its inputs."""
        ridge = _RIDGE * layer.covariance.diagonal().mean()
        inverse = torch.linalg.inv(layer.covariance + ridge * torch.eye(len(layer.covariance), dtype=torch.float64))
        return cls(inverse, layer.products, layer.places)

    def costs(self) -> Tensor:
        """Return the error that the removal of each unit adds, shape (C,)."""
        size = len(self.inverse)
        is_none = self.places == size
        index = self.places.clamp_max(size - 1)
        rows, columns = index.unsqueeze(2), index.unsqueeze(1)
        blank = is_none.unsqueeze(2) | is_none.unsqueeze(1)
        inverse, products = self.inverse[rows, columns], self.products[rows, columns]
        if self.places.shape[1] == 1:
            costs: Tensor = torch.where(blank, 0.0, products / inverse).flatten()
            return costs
        eye = torch.eye(self.places.shape[1], dtype=inverse.dtype).expand_as(inverse)
        inverse, products = torch.where(blank, eye, inverse), torch.where(blank, 0.0, products)
        costs = torch.linalg.solve(inverse, products).diagonal(dim1=1, dim2=2).sum(1)
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
        return _Reader(inverse, products, numbers[self.places[units]])


@dataclass(slots=True, eq=False)
class _WideReader:
    """A layer with so many inputs that they count as independent.

    Attributes:
        fixed: relative error that the removal of each unit adds, shape (C,).
        losses: what that costs in loss, shape (C,); the same as `fixed` without gradients.
    """

    fixed: Tensor
    losses: Tensor

    def costs(self) -> Tensor:
        """Return the error that the removal of each unit adds, shape (C,)."""
        return self.fixed

    def remove(self, units: Tensor) -> None:
        """Leave the costs of all other units as they are."""

    def restricted(self, units: Tensor) -> "_WideReader":
        """Return the reader of some units alone."""
        return _WideReader(self.fixed[units], self.losses[units])


def _remove_all(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Remove all units greedily.

    Those with the least costs go one after another while they cost no more than any other did, which needs their own
    part of the matrices alone. All others follow then, and the next ones are taken.

    Returns:
        The units in the order in which they went, shape (C,), and the error that each added, shape (C,).
    """
    layers = list(_find_layers(group, weights, statistics))
    if not layers:
        raise UnscorableError("reconstruction: no layer reads its units, of whose inputs some vary over the data")
    readers = [_Reader.of(layer) if isinstance(layer, _Layer) else layer for layer in layers]
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
    return _held_out_errors(layers, torch.stack(order), torch.stack(added))


def _held_out_errors(layers: list["_Layer | _WideReader"], order: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the errors that each unit added by those on samples held out, taken at some widths.

    The error of the fit itself says nothing where there are fewer samples than inputs: it is zero there.
    """
    if any(isinstance(layer, _Layer) and layer.apart is None for layer in layers):
        return order, added
    width = len(order)
    counts = sorted({max(1, round(width * share)) for share in _SHARES})
    errors = [
        sum(
            (
                layer.error_without(order[:count]) if isinstance(layer, _Layer) else layer.losses[order[:count]].sum()
                for layer in layers
            ),
            order.new_zeros((), dtype=torch.float64),
        )
        for count in counts
    ]
    rises = torch.stack(errors).cummax(0).values.diff(prepend=order.new_zeros(1, dtype=torch.float64))
    sizes = torch.tensor(counts).diff(prepend=torch.zeros(1, dtype=torch.int64))
    return order, (rises / sizes).repeat_interleave(sizes)


def _find_layers(
    group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics
) -> Iterator[_Layer | _WideReader]:
    """Find the layers that read units of a group and whose inputs were seen."""
    for member in group.members:
        if member.name not in weights or not member.purposes & READING_PURPOSES:
            continue
        calls = [call for call in statistics.layers if call.weight == member.name and call.inputs == member.dim]
        sums = [statistics.values.get((call.source, call.dim)) for call in calls if call.dim is not None]
        seen = [one for one in sums if one is not None]
        found = [statistics.output_gradients[call.node] for call in calls if call.node in statistics.output_gradients]
        rows = _rows(member, weights[member.name])
        shape = weights[member.name].shape
        costly = _weigh_outputs(member, rows, shape, torch.stack(found).sum(0)) if found else None
        products = [one for one in seen if len(one.grams) == member.size + 1]
        if products:
            grams = torch.stack([one.grams for one in products]).sum(0)
            held_out = torch.stack([one.held_out for one in products]).sum(0)
            yield from _layer(member, group.width, rows, costly, grams, held_out)
        elif seen and all(len(one.squares) == len(one.total) == member.size for one in seen):
            yield from _wide_reader(member, group.width, rows, costly, seen)


def _layer(
    member: Member, width: int, rows: Tensor, costly: Tensor | None, grams: Tensor, held_out: Tensor
) -> Iterator[_Layer]:
    """Make a layer from the products of its inputs, unless its output is constant."""
    has_both = bool(held_out[-1, -1] > 0 and grams[-1, -1] > 0)
    covariance = _covariance(grams + held_out)
    products: Tensor = torch.block_diag(*(rows @ rows.mT))  # type: ignore[no-untyped-call]
    variance = (products * covariance).sum()
    if variance > 0:
        products = products / variance
        losses = products if costly is None else torch.block_diag(*(costly @ costly.mT)) / 2  # type: ignore[no-untyped-call]
        apart = (_covariance(grams), _covariance(held_out)) if has_both else None
        yield _Layer(covariance, apart, products, losses, _places(member, width))


def _covariance(grams: Tensor) -> Tensor:
    mean = grams[-1, :-1] / grams[-1, -1]
    return grams[:-1, :-1] / grams[-1, -1] - mean.unsqueeze(1) * mean


def _wide_reader(
    member: Member, width: int, rows: Tensor, costly: Tensor | None, seen: list[ValueSums]
) -> Iterator[_WideReader]:
    """Make a reader from the variance of each input alone."""
    count = sum(one.count for one in seen)
    mean = torch.stack([one.total for one in seen]).sum(0) / count
    variances = (torch.stack([one.squares for one in seen]).sum(0) / count - mean.square()).clamp_min(0)
    units, positions = torch.from_numpy(member.units), torch.from_numpy(member.positions)

    def of_units(weighed: Tensor) -> Tensor:
        shares = variances * weighed.square().sum(2).flatten()
        return torch.zeros(width, dtype=torch.float64).index_add_(0, units, shares[positions])

    total = (variances * rows.square().sum(2).flatten()).sum()
    if total > 0:
        relative = of_units(rows) / total
        yield _WideReader(relative, relative if costly is None else of_units(costly) / 2)


def _rows(member: Member, weight: Tensor) -> Tensor:
    """Return a weight as blocks of rows, one for each position; shape (blocks, P / blocks, numbers), float64."""
    value = wide(readable(member, weight)).cpu()
    if not bool(value.isfinite().all()):
        raise not_finite(member, weight)
    blocks = value.reshape(max(member.n_blocks, 1), -1, *value.shape[1:]) if member.n_blocks else value.unsqueeze(0)
    return blocks.movedim(member.dim + 1, 1).flatten(2).double()


def _weigh_outputs(member: Member, rows: Tensor, shape: torch.Size, gradients: Tensor) -> Tensor:
    """Multiply the numbers of rows by the root of the squared gradient of the output that they make.

    Args:
        member: the dimension of the weight that the rows are of.
        rows: shape (blocks, P / blocks, numbers).
        shape: that of the weight.
        gradients: f of each output, of all blocks one after another.
    """
    n_outputs, n_blocks = len(gradients) // len(rows), len(rows)
    if n_outputs * n_blocks != len(gradients) or not n_outputs or rows.shape[2] % n_outputs:
        return rows * gradients.mean().sqrt()
    roots, n_times = gradients.sqrt().reshape(n_blocks, 1, n_outputs), rows.shape[2] // n_outputs
    first = next(size for dim, size in enumerate(shape) if dim != member.dim)
    if first == len(gradients):  # outputs, and the taps of a kernel behind them
        return rows * roots.repeat_interleave(n_times, 2)
    return rows * roots.repeat(1, 1, n_times)  # experts, and outputs behind them


def _places(member: Member, width: int) -> Tensor:
    """Return the positions of each unit, shape (C, s), filled up with the number of all positions."""
    found: list[list[int]] = [[] for _ in range(width)]
    for position, unit in zip(member.positions.tolist(), member.units.tolist(), strict=True):
        found[unit].append(position)
    most = max(map(len, found))
    return torch.tensor([places + [member.size] * (most - len(places)) for places in found])
