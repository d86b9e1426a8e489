"""Least squares for one linear layer: sums over samples, the fit with ridge, and its error on samples held out.

A layer with too many inputs for one system is fitted in `_least_squares_wide.py`.

A layer gives y = W u + b. With rows of u and y summed up, the error of any W and b follows from the sums alone, so
that samples need not be kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from torchshear.calibration._processes import is_distributed, sum_over_processes

RIDGES: Final = (1e-8, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, as shares of the mean of the diagonal of the centred Gram matrix."""


class Moments:
    """Sums over rows of u and y, in float64, for G systems that share nothing.

    Args:
        n_groups: G.
        n_in: length of u, K.
        n_out: length of y, O.
        device: where to sum.

    Attributes:
        n: number of rows.
        u: sum of u, shape (G, K).
        y: sum of y, shape (G, O).
        uu: sum of u u^T, shape (G, K, K).
        uy: sum of u y^T, shape (G, K, O).
        yy: sum of y^2, shape (G, O).
    """

    def __init__(self, n_groups: int, n_in: int, n_out: int, device: torch.device) -> None:
        zeros = torch.zeros(n_groups, n_in + n_out, dtype=torch.float64, device=device)
        self.n = 0
        self.u, self.y, self.yy = zeros[:, :n_in].clone(), zeros[:, n_in:].clone(), zeros[:, n_in:].clone()
        self.uu = zeros.new_zeros(n_groups, n_in, n_in)
        self.uy = zeros.new_zeros(n_groups, n_in, n_out)

    def add(self, u: Tensor, y: Tensor) -> None:
        """Add rows.

        Args:
            u: inputs, shape (G, rows, K).
            y: outputs that are wanted, shape (G, rows, O).
        """
        u, y = u.double(), y.double()
        sums = u.sum(1), y.sum(1)
        if not all(bool(one.isfinite().all()) for one in sums):  # a softmax over nothing gives NaN
            is_finite = u.isfinite().all(2).all(0) & y.isfinite().all(2).all(0)
            u, y = u[:, is_finite], y[:, is_finite]
            sums = u.sum(1), y.sum(1)
        self.n += u.shape[1]
        self.u += sums[0]
        self.y += sums[1]
        self.yy += torch.linalg.vecdot(y, y, dim=1)
        self.uu += u.mT @ u
        self.uy += u.mT @ y

    def merge(self, other: "Moments") -> None:
        """Add the sums of other rows."""
        self.n += other.n
        for name in ("u", "y", "yy", "uu", "uy"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def reduce(self) -> None:
        """Add up the sums of all processes."""
        self.n = int(sum_over_processes(torch.tensor(self.n)))
        for name in ("u", "y", "yy", "uu", "uy"):
            setattr(self, name, sum_over_processes(getattr(self, name)))

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return the squared error of a layer, divided by the variance of what is wanted.

        Args:
            weight: W, shape (G, O, K).
            bias: b, shape (G, O).
        """
        explained = (weight.mT * self.uy).sum(1)
        square = ((weight @ self.uu) * weight).sum(2)
        offset = (weight @ self.u.unsqueeze(2)).squeeze(2) - self.y
        total = self.yy - 2 * explained + square + 2 * bias * offset + self.n * bias.square()
        variance = self.yy - self.y.square() / max(self.n, 1)
        return float(total.sum().clamp_min(0) / variance.sum().clamp_min(torch.finfo(torch.float64).tiny))


def sum_apart(rows: Iterable[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, int, int]) -> tuple[Moments, Moments]:
    """Sum up rows, apart for samples to fit to and for samples held out, over all processes.

    Args:
        rows: for each batch u, y, and a mask of the rows of samples that are held out.
        shape: G, the length of u, and that of y.
    """
    both: tuple[Moments, Moments] | None = None
    for u, y, is_held_out in rows:
        both = both or (Moments(*shape, u.device), Moments(*shape, u.device))
        for moments, chosen in zip(both, (~is_held_out, is_held_out), strict=True):
            index = chosen.nonzero().squeeze(1).to(u.device)
            moments.add(u.index_select(1, index), y.index_select(1, index))
    assert both is not None, "there is at least one batch"
    for moments in both if is_distributed() else ():
        moments.reduce()
    return both


@dataclass(frozen=True, slots=True, eq=False)
class LinearFit:
    """Weight and bias of a layer, fitted or as they were.

    Attributes:
        weight: shape (G, O, K), float64.
        bias: shape (G, O), float64; zero where the layer has none.
        error_before: squared error on samples held out with the weights as they were, relative to the variance of the
            output.
        error_after: the same with these weights.
        method: how it was fitted; "" where the layer stayed as it was.
    """

    weight: Tensor
    bias: Tensor
    error_before: float
    error_after: float
    method: str


def fit_linear(
    fitting: Moments,
    held_out: Moments,
    weight: Tensor,
    bias: Tensor,
    has_bias: bool,
    ridges: Sequence[float] = RIDGES,
) -> LinearFit:
    """Fit a layer around its present weights, and keep what does best on samples held out.

        W = W_0 + (C - G W_0^T)^T (G + lambda I)^-1,    b = mean(y) - W mean(u)

    where G and C are the centred sums of u u^T and u y^T. Without a bias the sums are not centred. Candidates are
    rounded to the type of the present weights before their errors are compared: large weights that cancel suffer.

    Args:
        fitting: sums over the samples to fit to.
        held_out: sums over other samples.
        weight: W_0, shape (G, O, K).
        bias: shape (G, O); zeros where there is none.
        has_bias: True if the bias is fitted as well.
        ridges: shares of the mean of the diagonal of the centred Gram matrix that are tried.

    Returns:
        The fit; the layer as it was where no ridge lowers the error on the samples held out.
    """
    dtype = weight.dtype
    weight, bias = weight.double(), bias.double()
    n = max(fitting.n, 1)
    gram, cross = fitting.uu, fitting.uy
    mean_u, mean_y = fitting.u / n, fitting.y / n
    if has_bias:
        gram = gram - n * mean_u.unsqueeze(2) * mean_u.unsqueeze(1)
        cross = cross - n * mean_u.unsqueeze(2) * mean_y.unsqueeze(1)
    rest = cross - gram @ weight.mT
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    before = held_out.error(weight, bias)
    best = LinearFit(weight, bias, before, before, "")
    for step in ridge_solutions(gram, rest, size, ridges):
        fitted = (weight + step.mT).to(dtype).double()
        shift = (mean_y - (fitted @ mean_u.unsqueeze(2)).squeeze(2)).to(dtype).double() if has_bias else bias
        error = held_out.error(fitted, shift)
        if error < best.error_after:
            best = LinearFit(fitted, shift, before, error, "least squares")
    return best


def ridge_solutions(gram: Tensor, right: Tensor, size: Tensor, ridges: Sequence[float] = RIDGES) -> Iterator[Tensor]:
    """Give (gram + lambda I)^-1 right for each ridge lambda, without those for which that has no Cholesky factor.

    Args:
        gram: shape (G, N, N).
        right: shape (G, N, M).
        size: what the ridges are shares of, shape (G,).
        ridges: those that are tried.
    """
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for ridge in ridges:
        factor, failed = torch.linalg.cholesky_ex(gram + (ridge * size)[:, None, None] * eye)
        if not bool(failed.any()):
            yield torch.cholesky_solve(right, factor)
