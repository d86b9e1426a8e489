"""Fit of queries and keys to their products: sums over pairs of rows, and alternating least squares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from torchshear.calibration._processes import is_distributed, sum_over_processes

N_ALTERNATIONS: Final = 2
_RIDGE: Final = 1e-6
_TOLERANCE: Final = 1e-9
_MAX_STEPS: Final = 50


@dataclass(frozen=True, slots=True, eq=False)
class HeadSums:
    """Sums over the rows of n pairs of matrices: q and k to be mapped, and those whose products are wanted.

    Attributes:
        queries: sum of q q^T for each pair, shape (n, P, P), float64.
        keys: sum of k k^T, likewise.
        wanted: q^T (Q K^T) k, likewise, where Q and K are those of the original.
    """

    queries: Tensor
    keys: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, dense_q: Tensor, dense_k: Tensor) -> "HeadSums":
        """Sum up rows; all of shape (n, rows, dimensions). Pairs with values that are not finite are left out."""
        sums = cls(q.mT @ q, k.mT @ k, (q.mT @ dense_q) @ (dense_k.mT @ k))
        is_finite = torch.stack([one.isfinite().all(2).all(1) for one in (sums.queries, sums.keys, sums.wanted)]).all(0)
        return cls(sums.queries[is_finite], sums.keys[is_finite], sums.wanted[is_finite])

    @classmethod
    def joined(cls, parts: Sequence["HeadSums"]) -> "HeadSums":
        """Return the sums of several batches."""
        names = ("queries", "keys", "wanted")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """Maps of queries and keys to fewer dimensions, each of shape (D', P); one of queries for each head."""

    queries: tuple[Tensor, ...]
    keys: Tensor


def fit_maps(heads: Sequence[HeadSums], width: int) -> Iterator[tuple[str, Maps]]:
    """Give maps of the queries of some heads and of their common keys that keep their products.

        min over M_q, M_k of  sum over pairs || (q M_q^T) (k M_k^T)^T - Q K^T ||^2

    First those of the best approximation of rank D' where all pairs have the same second moments, which has a closed
    form; then one side in turn by least squares for the other.

    Args:
        heads: sums of each head.
        width: D'.

    Yields:
        How they were found, and the maps.

    Reference: fit to the logits as in CORP, arXiv:2602.05243; here to those of the pruned network's own inputs.
    """
    maps = _closed_form(heads, width)
    if maps is None:
        return
    yield "closed form", maps
    for _ in range(N_ALTERNATIONS):
        queries = []
        for head, own in zip(heads, maps.queries, strict=True):
            inner = maps.keys @ head.keys @ maps.keys.T
            found = _solve([(head.queries, inner)], head.wanted.sum(0) @ maps.keys.T, own)
            if found is None:
                return
            queries.append(found)
        pairs = [(head.keys, own @ head.queries @ own.T) for head, own in zip(heads, queries, strict=True)]
        right = sum(head.wanted.sum(0).T @ own.T for head, own in zip(heads, queries, strict=True))
        assert isinstance(right, Tensor), "there is at least one head"
        keys = _solve(pairs, right, maps.keys)
        if keys is None:
            return
        maps = Maps(tuple(queries), keys)
        yield "alternating least squares", maps


def _closed_form(heads: Sequence[HeadSums], width: int) -> Maps | None:
    """Return the maps of the best approximation of rank D' under the mean second moments; None where there are none."""
    count = _total(torch.tensor([len(head.queries) for head in heads], dtype=torch.float64))
    if not bool((count > 0).all()):
        return None
    counts = count.tolist()
    left = [_factor(_total(head.queries.sum(0)) / n) for head, n in zip(heads, counts, strict=True)]
    keys = torch.stack([_total(head.keys.sum(0)) for head in heads]).sum(0) / sum(counts)
    right = _factor(keys)
    rows = []
    for head, n, factor in zip(heads, counts, left, strict=True):
        half = torch.linalg.solve_triangular(factor, _total(head.wanted.sum(0)) / n, upper=False)
        rows.append(torch.linalg.solve_triangular(right, half.T, upper=False).T)
    u, s, v = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    root = s[:width].sqrt()
    parts = (u[:, :width] * root).split([len(row) for row in rows])
    queries = [torch.linalg.solve_triangular(one.T, part, upper=True).T for one, part in zip(left, parts, strict=True)]
    return Maps(tuple(queries), torch.linalg.solve_triangular(right.T, v[:width].T * root, upper=True).T)


def _factor(moments: Tensor) -> Tensor:
    """Return the Cholesky factor of second moments with a small ridge."""
    factor: Tensor = torch.linalg.cholesky(_with_ridge(moments))
    return factor


def _with_ridge(matrix: Tensor) -> Tensor:
    size = matrix.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return matrix + torch.diag(_RIDGE * size.expand(len(matrix)))


def _solve(pairs: Sequence[tuple[Tensor, Tensor]], right: Tensor, present: Tensor) -> Tensor | None:
    """Return the X^T next to the present one with  sum over n of  A_n X B_n = R;  None where it cannot be found.

    By conjugate gradients, with the inverse of  X -> n mean(A) X mean(B)  in front: what the system is where all pairs
    have the same second moments. Each step lowers the error of the products, so that an early end does no harm.

    Args:
        pairs: A, shape (n, P, P), and B, shape (n, D', D'), of each head.
        right: R, shape (P, D').
        present: X^T, shape (D', P).
    """
    count = _total(torch.tensor(float(sum(len(outer) for outer, _ in pairs)), dtype=torch.float64))
    means = [_total(torch.stack([pair[place].sum(0) for pair in pairs]).sum(0)) / count.item() for place in (0, 1)]
    factors = [torch.linalg.cholesky_ex(_with_ridge(mean)) for mean in means]
    if any(bool(failed) for _, failed in factors):
        return None
    ridge = _RIDGE * count.item() * float(means[0].diagonal().mean() * means[1].diagonal().mean())

    def apply(x: Tensor) -> Tensor:
        return _total(torch.stack([(outer @ x @ inner).sum(0) for outer, inner in pairs]).sum(0)) + ridge * x

    def precondition(rest: Tensor) -> Tensor:
        half = torch.cholesky_solve(rest, factors[0][0])
        return torch.cholesky_solve(half.T, factors[1][0]).T / count.item()

    right, x = _total(right), present.T
    rest = right - apply(x) + ridge * x
    enough = _TOLERANCE * float(right.norm())
    found = direction = precondition(rest)
    product = float((rest * found).sum())
    for _ in range(_MAX_STEPS):
        if float(rest.norm()) <= enough or not product > 0:
            break
        image = apply(direction)
        length = product / float((direction * image).sum())
        x, rest = x + length * direction, rest - length * image
        found = precondition(rest)
        product, last = float((rest * found).sum()), product
        direction = found + product / last * direction
    return x.T


def product_error(q: Tensor, k: Tensor, dense_q: Tensor, dense_k: Tensor) -> Tensor:
    """Return sums over all products of finite pairs: squared errors, squares, values, and how many there are.

    The squares are taken apart into products of sums, so that the logits themselves need no memory:

        || q k^T - Q K^T ||^2 = tr(q^T q k^T k) - 2 tr(q^T Q K^T k) + tr(Q^T Q K^T K)

    Args:
        q: queries, shape (n, rows, D').
        k: keys, likewise.
        dense_q: queries of the original, shape (n, rows, D).
        dense_k: keys of the original, likewise.
    """

    def trace(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum((1, 2))

    square = trace(dense_q.mT @ dense_q, dense_k.mT @ dense_k)
    error = trace(q.mT @ q, k.mT @ k) - 2 * trace(q.mT @ dense_q, k.mT @ dense_k) + square
    value = (dense_q.sum(1) * dense_k.sum(1)).sum(1)
    count = torch.full_like(value, q.shape[1] * k.shape[1])
    found = torch.stack([error.clamp_min(0), square, value, count])
    return found[:, found.isfinite().all(0)].sum(1)


def relative_error(sums: Tensor) -> float:
    """Return the squared error relative to the variance, from the sums of `product_error` over all processes."""
    error, square, value, count = map(float, sums)
    variance = square - value * value / max(count, 1.0)
    return max(error, 0.0) / max(variance, torch.finfo(torch.float64).tiny)


def _total(value: Tensor) -> Tensor:
    return sum_over_processes(value) if is_distributed() else value
