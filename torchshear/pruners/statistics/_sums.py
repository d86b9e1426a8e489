"""Running sums, one object for each thing that is watched. Each number is read in pieces that stay in the cache."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from torchshear.pruners.statistics._statistics import (
    MOMENTUM,
    SUMS_OF_WEIGHTS,
    GateSums,
    RowSums,
    Sum,
    ValueSums,
    WeightSums,
)

_PIECE = 1 << 18  # elements that are worked on at a time, with what is computed from them


def _zeros(piece: Tensor) -> Tensor:
    return torch.eq(piece, 0, out=torch.empty_like(piece))  # as numbers: truth values are summed ten times slower


_TERMS: dict[Sum, Callable[[Tensor], Tensor]] = {
    "zeros": _zeros,
    "total": lambda piece: piece,
    "magnitude": lambda piece: piece.abs(),
    "squares": lambda piece: piece * piece,
}


class ValueAccumulator:
    """Sums over all dimensions of a value but one.

    Args:
        dim: that dimension, from 0.
        wanted: which sums to take.
        is_nonnegative: whether no number is below zero, so that sizes add up to what the numbers do.
    """

    def __init__(self, dim: int, wanted: Collection[Sum], is_nonnegative: bool) -> None:
        self.count = 0
        self._dim = dim
        self._totals: dict[Sum, Tensor | int] = dict.fromkeys([word for word in _TERMS if word in wanted], 0)
        self._copied = is_nonnegative and {"total", "magnitude"} <= self._totals.keys()
        self._is_nonnegative = is_nonnegative

    def add(self, value: Tensor) -> None:
        """Count another value in; half precision is summed in float32, and all batches together in float64."""
        value = value.detach()
        for piece in pieces_of(value, 1 if self._dim == 0 else 0):
            numbers = wide(piece)
            for word in self._totals:
                if word != "magnitude" or not self._copied:
                    self._totals[word] = self._totals[word] + self._sum(word, numbers)
        self.count += math.prod(value.shape) // value.shape[self._dim]

    @property
    def is_finite(self) -> bool:
        """Whether the sums are, so far; one tells of all, and that of zeros of none."""
        totals = [total for word, total in self._totals.items() if word != "zeros" and isinstance(total, Tensor)]
        return not totals or math.isfinite(float(totals[-1].sum()))

    def _sum(self, word: Sum, piece: Tensor) -> Tensor:
        word = "total" if word == "magnitude" and self._is_nonnegative else word
        return sum_but(_TERMS[word](piece), [self._dim]).double()

    def result(self) -> ValueSums:
        """What was summed."""
        totals = {word: total.cpu() for word, total in self._totals.items() if isinstance(total, Tensor)}
        if self._copied:
            totals["magnitude"] = totals["total"].clone()
        return ValueSums(self.count, **{word: totals.get(word, _nothing()) for word in _TERMS})


def _nothing() -> Tensor:
    """In place of sums that were not asked for."""
    return torch.zeros(0, dtype=torch.float64)


def wide(value: Tensor) -> Tensor:
    """A value in float32, or in float64 if that is what it comes in."""
    return value.to(_wide_dtype(value))


def _wide_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def pieces_of(value: Tensor, along: int) -> Sequence[Tensor]:
    """A value cut along a dimension, if it is larger than a piece and its processor has a cache that is worth it."""
    if value.numel() <= _PIECE or value.device.type != "cpu" or along >= value.ndim:
        return (value,)
    return value.chunk(-(-value.numel() // _PIECE), along)


def sum_but(value: Tensor, dims: Collection[int]) -> Tensor:
    """The sum over all dimensions but some."""
    others = [dim for dim in range(value.ndim) if dim not in dims]
    return value.sum(others) if others else value


class WeightAccumulator:
    """Sums over batches for each number of a parameter, and for its rows or columns; in float32 at least.

    Args:
        weight: the parameter.
        wanted: which sums to take.
        lines: dimensions along which to add up weight times gradient at each position, with their numbers of blocks;
            see `torchshear.dependency.Member`.
        n_processes: how many run a batch each in a step, this one among them.
    """

    def __init__(self, weight: Tensor, wanted: Collection[Sum], lines: Mapping[int, int], n_processes: int = 1) -> None:
        self._weight = weight.detach()
        self._decay = MOMENTUM**n_processes  # of a step, in which each process adds one batch of a common sequence
        self._lines = lines
        self.sums: dict[Sum, Tensor] = {
            word: torch.zeros(weight.shape, dtype=_wide_dtype(weight), device=weight.device)
            for word in sorted(SUMS_OF_WEIGHTS & set(wanted))
        }

    def add(self, gradient: Tensor) -> tuple[dict[int, Tensor], bool]:
        """Count the gradient of a batch in.

        Returns:
            For each dimension that is asked for, the sum of weight times gradient at each position, float64 on the CPU;
            and whether all of the gradient is finite.
        """
        lines: dict[int, list[Tensor]] = {dim: [] for dim in self._lines}
        is_finite = True
        pieces = [pieces_of(tensor, 0) for tensor in (self._weight, gradient, *self.sums.values())]
        for weight, part, *sums in zip(*pieces, strict=True):
            numbers = wide(part)
            is_finite &= math.isfinite(float(numbers.sum())) or bool(torch.isfinite(numbers).all())
            if not lines and not sums:
                continue
            product = wide(weight) * numbers
            for dim, found in lines.items():
                sums_here = sum_but(product, {0, dim} if self._lines[dim] else {dim})
                found.append(sums_here.to("cpu", torch.float64, copy=True))  # the product is written to below
            self._count_in(dict(zip(self.sums, sums, strict=True)), product, numbers)
        return {dim: _joined(found, dim, self._lines[dim]) for dim, found in lines.items()}, is_finite

    def _count_in(self, sums: dict[Sum, Tensor], product: Tensor, gradient: Tensor) -> None:
        if "taylor" in sums:
            sums["taylor"].addcmul_(product, product)
        if "saliency" in sums or "momentum" in sums:
            product.abs_()
        if "saliency" in sums:
            sums["saliency"].add_(product)
        if "momentum" in sums:
            torch.add(product, sums["momentum"], alpha=self._decay, out=sums["momentum"])
        if "gradient" in sums:
            sums["gradient"].add_(gradient.abs())

    def skip(self) -> None:
        """A batch whose loss does not depend on the parameter: its gradient is zero."""
        if "momentum" in self.sums:
            self.sums["momentum"] *= self._decay

    def result(self) -> WeightSums:
        """What was summed."""
        return WeightSums(**{word: self.sums.get(word, _nothing().float()) for word in SUMS_OF_WEIGHTS})


def _joined(lines: Sequence[Tensor], dim: int, n_blocks: int) -> Tensor:
    """What pieces of a weight along dimension 0 add up to at each position of a dimension, its blocks in turn."""
    if n_blocks:
        rows = torch.cat(list(lines))
        return rows.reshape(n_blocks, -1, rows.shape[1]).sum(1).flatten()
    return torch.cat(list(lines)) if dim == 0 else torch.stack(list(lines)).sum(0)


class RowAccumulator:
    """Sums over batches of what a layer's rows add up to."""

    def __init__(self, length: int) -> None:
        self._squares = torch.zeros(length, dtype=torch.float64)
        self._magnitude = torch.zeros(length, dtype=torch.float64)

    def add(self, rows: Tensor, bias: Tensor | None) -> None:
        """Count what the rows of a weight and of its bias add up to in a batch in."""
        rows = rows if bias is None else rows + bias
        self._squares += rows.square()
        self._magnitude += rows.abs()

    def result(self) -> RowSums:
        """What was summed."""
        return RowSums(self._squares, self._magnitude)


class HeadAccumulator:
    """Sums over batches of the gradients of a group's gates, each of which multiplies what layers read of one unit.

    Args:
        width: number of units.
        columns: for each dimension of a weight that reads them, (name, dimension) -> (positions, units).
    """

    def __init__(self, width: int, columns: Mapping[tuple[str, int], tuple[Tensor, Tensor]]) -> None:
        self.columns = columns
        self._magnitude = torch.zeros(width, dtype=torch.float64)

    def add(self, lines: Mapping[tuple[str, int], Tensor]) -> None:
        """Count what columns add up to in a batch in; those that the loss does not depend on are left out."""
        gates = torch.zeros_like(self._magnitude)
        for key, (positions, units) in self.columns.items():
            if key in lines:
                gates.index_add_(0, units, lines[key][positions])
        self._magnitude += gates.abs()

    def result(self) -> Tensor:
        """What was summed."""
        return self._magnitude.clone()


class GateAccumulator:
    """Sums over samples and batches of the gradients of a group's gates."""

    def __init__(self, width: int) -> None:
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._batches: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        """Count the gradients of a batch in, shape (samples, width)."""
        each = gradient.double().cpu()
        self._squares += each.square().sum(0)
        self._batches.append(each.sum(0))

    def result(self) -> GateSums:
        """What was summed."""
        batches = torch.stack(self._batches, 1) if self._batches else self._squares.new_zeros(len(self._squares), 0)
        return GateSums(self._squares, batches)
