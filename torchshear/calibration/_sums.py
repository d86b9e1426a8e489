"""Running sums, one object for each thing that is watched. Each number is read in pieces that stay in the cache."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from torchshear.calibration._samples import sample_numbers
from torchshear.calibration._statistics import GateSums, RowSums, Sum, ValueSums

ROWS_PER_NUMBER = 4  # places of a batch of which products are taken, for each number at a place
MIN_ROWS = 1024
PIECE = 1 << 18  # elements that are worked on at a time, with what is computed from them


def _zeros(piece: Tensor, dim: int) -> Tensor:
    found = torch.eq(piece, 0, out=torch.empty_like(piece))  # as numbers: truth values are summed ten times slower
    return sum_but(found, [dim])


def _squares(piece: Tensor, dim: int) -> Tensor:
    behind = range(dim + 1, piece.ndim)
    if not behind:
        return sum_but(piece * piece, [dim])
    return sum_but(torch.linalg.vector_norm(piece, 2, tuple(behind)).square(), [dim])  # writes no squares to memory


_SUMS: dict[Sum, Callable[[Tensor, int], Tensor]] = {
    "zeros": _zeros,
    "total": lambda piece, dim: sum_but(piece, [dim]),
    "magnitude": lambda piece, dim: sum_but(piece.abs(), [dim]),
    "squares": _squares,
}


class ValueAccumulator:
    """Sums over all dimensions of a value but one.

    Args:
        dim: that dimension, from 0.
        wanted: which sums to take.
        is_nonnegative: whether no number is below zero, so that sizes add up to what the numbers do.
        batch_dim: the dimension that holds the batch, for products of samples that are held out.
    """

    def __init__(self, dim: int, wanted: Collection[Sum], is_nonnegative: bool, batch_dim: int = 0) -> None:
        self.count = 0
        self._dim, self._batch_dim = dim, batch_dim
        self._grams = self._held_out = nothing() if "grams" in wanted else None
        self._totals: dict[Sum, Tensor | int] = dict.fromkeys([word for word in _SUMS if word in wanted], 0)
        self._copied = is_nonnegative and {"total", "magnitude"} <= self._totals.keys()
        self._is_nonnegative = is_nonnegative

    def add(self, value: Tensor, is_held_out: Tensor | None = None) -> None:
        """Count another value in; half precision is summed in float32, and all batches together in float64.

        Args:
            value: the value.
            is_held_out: for each sample that it is of whether it is held out; None: none is.
        """
        value = value.detach()
        if self._grams is not None and self._held_out is not None:
            held_out, rest = self._products_apart(value, is_held_out)
            self._grams = self._grams + rest if len(self._grams) else rest
            self._held_out = self._held_out + held_out if len(self._held_out) else held_out
        for piece in pieces_of(value, 1 if self._dim == 0 else 0) if self._totals else ():
            numbers = wide(piece)
            for word in self._totals:
                if word != "magnitude" or not self._copied:
                    self._totals[word] = self._totals[word] + self._sum(word, numbers)
        self.count += math.prod(value.shape) // value.shape[self._dim]

    def _products_apart(self, value: Tensor, is_held_out: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return products over samples that are held out, and over all others."""
        if is_held_out is None or self._batch_dim == self._dim:  # the latter of one sample, without a batch
            found = products_of(value.unsqueeze(0)).cpu()
            return torch.zeros_like(found), found
        samples = sample_numbers(value.shape[self._batch_dim], len(is_held_out)) % len(is_held_out)
        is_held_out = is_held_out[samples]
        parts = (
            value.index_select(self._batch_dim, one.nonzero().squeeze(1).to(value.device))
            for one in (is_held_out, ~is_held_out)
        )
        held_out, rest = (products_of(part.movedim(self._dim, -1)).cpu() for part in parts)
        return held_out, rest

    @property
    def is_finite(self) -> bool:
        """Return whether the sums so far are finite; one sum tells of all, but not that of zeros."""
        totals = [total for word, total in self._totals.items() if word != "zeros" and isinstance(total, Tensor)]
        totals += [] if self._grams is None else [self._grams]
        return not totals or math.isfinite(float(totals[-1].sum()))

    def _sum(self, word: Sum, piece: Tensor) -> Tensor:
        word = "total" if word == "magnitude" and self._is_nonnegative else word
        return _SUMS[word](piece, self._dim).double()

    def result(self) -> ValueSums:
        """Return the sums."""
        totals = {word: total.cpu() for word, total in self._totals.items() if isinstance(total, Tensor)}
        if self._copied:
            totals["magnitude"] = totals["total"].clone()
        grams, held_out = (nothing() if one is None else one for one in (self._grams, self._held_out))
        found = {word: totals.get(word, nothing()) for word in _SUMS}
        return ValueSums(self.count, **found, grams=grams, held_out=held_out)


def products_of(value: Tensor) -> Tensor:
    """Return the sum of products of the numbers along the last dimension, and a one behind them, pair by pair.

    Of more than four places a number only some are taken, evenly.

    Returns:
        Shape (P + 1, P + 1), float64; the last row holds the sums of the numbers, and how many places there were.
    """
    rows = value.reshape(-1, value.shape[-1])
    most = max(ROWS_PER_NUMBER * rows.shape[1], MIN_ROWS)
    if len(rows) > most:
        rows = rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
    rows = wide(rows)
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return (rows.mT @ rows).double()


def nothing() -> Tensor:
    """In place of sums that were not asked for."""
    return torch.zeros(0, dtype=torch.float64)


def wide(value: Tensor) -> Tensor:
    """A value in float32, or in float64 if that is what it comes in."""
    return value.to(wide_dtype(value))


def wide_dtype(value: Tensor) -> torch.dtype:
    """Of a value in which it can be summed."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def pieces_of(value: Tensor, along: int) -> Sequence[Tensor]:
    """A value cut along a dimension, if it is larger than a piece and its processor has a cache that is worth it."""
    if value.numel() <= PIECE or value.device.type != "cpu" or along >= value.ndim:
        return (value,)
    return value.chunk(-(-value.numel() // PIECE), along)


def sum_but(value: Tensor, dims: Collection[int]) -> Tensor:
    """The sum over all dimensions but some."""
    others = [dim for dim in range(value.ndim) if dim not in dims]
    return value.sum(others) if others else value


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
        """Return the sums."""
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
        """Return the sums."""
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
        """Return the sums."""
        batches = torch.stack(self._batches, 1) if self._batches else self._squares.new_zeros(len(self._squares), 0)
        return GateSums(self._squares, batches)
