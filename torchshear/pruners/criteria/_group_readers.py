"""Layers that read the units of a group, and what a refit of them can make up for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import ValueSums
from torchshear.calibration._sums import wide
from torchshear.calibration._weight_calls import WeightCall
from torchshear.dependency import ChannelGroup, Member
from torchshear.dependency.groups._purposes import READING_PURPOSES
from torchshear.pruners.criteria._weight_sums import not_finite, readable

_RIDGE = 1e-3  # of the mean variance, as a refit from some hundred samples would take
_RIDGES = (1e-2, 1e-1, 1.0)  # of each variance, for the error on samples held out


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
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
class Reader:
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
    def of(cls, layer: "Layer") -> "Reader":
        """Make the reader of a layer, with all of its inputs."""
        ridge = _RIDGE * layer.covariance.diagonal().mean()
        inverse = torch.linalg.inv(layer.covariance + ridge * torch.eye(len(layer.covariance), dtype=torch.float64))
        return cls(inverse, layer.products, layer.places)

    def costs(self) -> Tensor:
        """Return the error that the removal of each unit adds, shape (C,)."""
        size = len(self.inverse)
        if not size:
            return torch.zeros(len(self.places), dtype=torch.float64)
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

    def restricted(self, units: Tensor) -> "Reader":
        """Return the reader of some units alone, which is all that removals among them need."""
        size = len(self.inverse)
        own: Tensor = self.places[units].flatten().unique()  # type: ignore[no-untyped-call]
        own = own[own < size]
        numbers = torch.full((size + 1,), len(own))
        numbers[own] = torch.arange(len(own))
        inverse, products = self.inverse[own][:, own], self.products[own][:, own]
        return Reader(inverse, products, numbers[self.places[units]])


@dataclass(slots=True, eq=False)
class WideReader:
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

    def restricted(self, units: Tensor) -> "WideReader":
        """Return the reader of some units alone."""
        return WideReader(self.fixed[units], self.losses[units])


def find_layers(
    group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics
) -> Iterator[Layer | WideReader]:
    """Find the layers that read units of a group and whose inputs were seen."""
    for member in group.members:
        if member.name not in weights or not member.purposes & READING_PURPOSES:
            continue
        calls, seen = _inputs_of(member, statistics)
        found = [
            statistics.output_gradients[call.output] for call in calls if call.output in statistics.output_gradients
        ]
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


def _inputs_of(member: Member, statistics: Statistics) -> tuple[list[WeightCall], list[ValueSums]]:
    """Return the calls that sum over a dimension of a weight, and what was seen of their inputs that tells errors."""
    calls = [call for call in statistics.layers if call.weight == member.name and call.inputs == member.dim]
    sums = [statistics.values.get((call.source, call.dim)) for call in calls if call.dim is not None]
    return calls, [one for one in sums if one is not None and (len(one.grams) or len(one.squares))]


def are_seen(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics) -> bool:
    """Return whether each unit that layers read was seen in the inputs of one of them; others would seem free."""
    is_read, is_seen = torch.zeros(2, group.width, dtype=torch.bool)
    for member in group.members:
        if member.name in weights and member.purposes & READING_PURPOSES:
            units = torch.from_numpy(member.units)
            is_read[units] = True
            is_seen[units] |= bool(_inputs_of(member, statistics)[1])
    return not bool((is_read & ~is_seen).any())


def _layer(
    member: Member, width: int, rows: Tensor, costly: Tensor | None, grams: Tensor, held_out: Tensor
) -> Iterator[Layer]:
    """Make a layer from the products of its inputs, unless its output is constant."""
    has_both = bool(held_out[-1, -1] > 0 and grams[-1, -1] > 0)
    covariance = _covariance(grams + held_out)
    products: Tensor = torch.block_diag(*(rows @ rows.mT))  # type: ignore[no-untyped-call]
    variance = (products * covariance).sum()
    if variance > 0:
        products = products / variance
        losses = products if costly is None else torch.block_diag(*(costly @ costly.mT)) / 2  # type: ignore[no-untyped-call]
        apart = (_covariance(grams), _covariance(held_out)) if has_both else None
        yield Layer(covariance, apart, products, losses, _places(member, width))


def _covariance(grams: Tensor) -> Tensor:
    mean = grams[-1, :-1] / grams[-1, -1]
    return grams[:-1, :-1] / grams[-1, -1] - mean.unsqueeze(1) * mean


def _wide_reader(
    member: Member, width: int, rows: Tensor, costly: Tensor | None, seen: list[ValueSums]
) -> Iterator[WideReader]:
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
        yield WideReader(relative, relative if costly is None else of_units(costly) / 2)


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
