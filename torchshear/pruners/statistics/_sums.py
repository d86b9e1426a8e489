"""Running sums, one object for each thing that is watched. Each number is read in pieces that stay in the cache."""

import math
from collections.abc import Callable, Collection, Sequence

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
            wide = piece if piece.dtype in (torch.float32, torch.float64) else piece.to(torch.float32)
            for word in self._totals:
                if word != "magnitude" or not self._copied:
                    self._totals[word] = self._totals[word] + self._sum(word, wide)
        self.count += math.prod(value.shape) // value.shape[self._dim]

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
    """Sums over batches for each number of a parameter, and for its rows; in float32 whatever the parameter's dtype.

    Args:
        weight: the parameter.
        wanted: which sums to take.
        row_dim: dimension of its rows; None if what rows add up to is not asked for.
    """

    def __init__(self, weight: Tensor, wanted: Collection[Sum], row_dim: int | None) -> None:
        self._weight = weight.detach()
        self._row_dim = row_dim
        self.sums: dict[Sum, Tensor] = {
            word: torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
            for word in sorted(SUMS_OF_WEIGHTS & set(wanted))
        }

    def add(self, gradient: Tensor) -> tuple[Tensor | None, bool]:
        """Count the gradient of a batch in.

        Returns:
            For each row the sum of weight times gradient, float64 on the CPU, or None if that is not asked for; and
            whether all of the gradient is finite.
        """
        rows: list[Tensor] = []
        is_finite = True
        pieces = [pieces_of(tensor, 0) for tensor in (self._weight, gradient, *self.sums.values())]
        for weight, part, *sums in zip(*pieces, strict=True):
            wide = part.to(torch.float32)
            is_finite &= math.isfinite(float(wide.sum())) or bool(torch.isfinite(wide).all())
            if self._row_dim is None and not sums:
                continue
            product = weight.to(torch.float32) * wide
            if self._row_dim is not None:
                rows.append(sum_but(product, [self._row_dim]).double().cpu())
            self._count_in(dict(zip(self.sums, sums, strict=True)), product, wide)
        if self._row_dim is None:
            return None, is_finite
        return (torch.cat(rows) if self._row_dim == 0 else torch.stack(rows).sum(0)), is_finite

    @staticmethod
    def _count_in(sums: dict[Sum, Tensor], product: Tensor, gradient: Tensor) -> None:
        if "taylor" in sums:
            sums["taylor"].addcmul_(product, product)
        if "saliency" in sums or "momentum" in sums:
            product.abs_()
        if "saliency" in sums:
            sums["saliency"].add_(product)
        if "momentum" in sums:
            torch.add(product, sums["momentum"], alpha=MOMENTUM, out=sums["momentum"])
        if "gradient" in sums:
            sums["gradient"].add_(gradient.abs())

    def skip(self) -> None:
        """A batch whose loss does not depend on the parameter: its gradient is zero."""
        if "momentum" in self.sums:
            self.sums["momentum"] *= MOMENTUM

    def result(self) -> WeightSums:
        """What was summed."""
        return WeightSums(**{word: self.sums.get(word, _nothing().float()) for word in SUMS_OF_WEIGHTS})


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


class GateAccumulator:
    """Sums over samples and batches of the gradients of a group's gates."""

    def __init__(self, width: int) -> None:
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._batches: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        """Count the gradients of a batch in, shape (samples, width)."""
        wide = gradient.double().cpu()
        self._squares += wide.square().sum(0)
        self._batches.append(wide.sum(0).float())

    def result(self) -> GateSums:
        """What was summed."""
        batches = (
            torch.stack(self._batches, 1) if self._batches else self._squares.new_zeros(len(self._squares), 0).float()
        )
        return GateSums(self._squares, batches)
