"""Fit of a layer with more unknowns than one system can have, from some thousand rows."""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from torchshear.calibration._processes import is_distributed, sum_over_processes
from torchshear.speedup.compensation._least_squares import LinearFit, ridge_solutions

_ELEMENTS: Final = 1 << 27  # of all rows together
_MAX_ROWS: Final = 4096
_CHUNK: Final = 1 << 24  # elements that are widened to float64 at a time


class WideRows:
    """Rows of a layer: u, wanted y, and whether their samples are held out.

    Attributes:
        inputs: u, shape (G, rows, K), in the type of the network.
        outputs: y, shape (G, rows, O), float64.
        is_held_out: shape (rows,).
    """

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    @staticmethod
    def count_for(n_in: int) -> int:
        """Return how many rows of so many inputs are drawn."""
        return max(256, min(_MAX_ROWS, _ELEMENTS // n_in))

    def add(self, inputs: Tensor, outputs: Tensor, is_held_out: Tensor) -> None:
        """Add rows, without those that are not finite."""
        is_finite = inputs.isfinite().all(2).all(0) & outputs.isfinite().all(2).all(0)
        self._found.append((inputs[:, is_finite], outputs[:, is_finite].double(), is_held_out[is_finite.cpu()]))

    def parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (u, y) of the rows to fit to and of the rows held out."""
        inputs, outputs = (torch.cat([found[place] for found in self._found], 1) for place in (0, 1))
        is_held_out = torch.cat([found[2] for found in self._found])
        self._found.clear()
        fitting, held_out = (chosen.nonzero().squeeze(1).to(inputs.device) for chosen in (~is_held_out, is_held_out))
        return (inputs[:, fitting], outputs[:, fitting]), (inputs[:, held_out], outputs[:, held_out])


def fit_wide(
    rows: WideRows, weight: Tensor, bias: Tensor, has_bias: bool, candidates: Mapping[str, tuple[Tensor, Tensor]]
) -> LinearFit | None:
    """Choose among candidates, each also with a scale and a shift for each output, and go on from the best by ridge.

    With fewer rows than unknowns the system is solved in the rows:

        W = W_0 + ((U U^T + lambda I)^-1 R)^T U

    where U are the centred inputs and R what the best candidate W_0 leaves. All is judged on rows of samples held out.

    Args:
        rows: rows of the layer.
        weight: the present weight, shape (G, O, K).
        bias: the present bias, shape (G, O); zeros where there is none.
        has_bias: True if the bias is fitted as well.
        candidates: method -> other weight and bias, float64.

    Returns:
        The fit; None where no row has finite values.
    """
    (u, y), (held_u, held_y) = rows.parts()
    if not _total(torch.tensor(u.shape[1])) or not _total(torch.tensor(held_u.shape[1])):
        return None
    sums = _total(torch.stack([held_y.sum((0, 1)).sum() * 0 + held_y.shape[1], held_y.square().sum()]))
    mean = _total(held_y.sum(1)) / sums[0]
    variance = (sums[1] - sums[0] * mean.square().sum()).clamp_min(torch.finfo(torch.float64).tiny)

    def error(one: Tensor, shift: Tensor) -> float:
        return float(_total((_apply(one, shift, held_u) - held_y).square().sum()) / variance)

    start = weight.double(), bias.double()
    before = error(*start)
    best = LinearFit(*start, before, before, "")
    for method, (one, shift) in {"": start, **candidates}.items():
        scaled = _rounded(*_scaled(one, shift, u, y, has_bias), weight.dtype)
        for tried, suffix in (
            (_rounded(one, shift, weight.dtype), ""),
            (scaled, " with a scale" if method else "a scale"),
        ):
            found = error(*tried)
            if found < best.error_after:
                best = LinearFit(*tried, before, found, method + suffix)
    if is_distributed():  # rows are of one process; sums of all decided so far
        return best
    first = f"{best.method}, then " if best.method else ""
    for fitted, shift in _ridge_fits(best, u, y, has_bias):
        tried = _rounded(fitted, shift, weight.dtype)
        found = error(*tried)
        if found < best.error_after:
            best = LinearFit(*tried, before, found, f"{first}least squares on {u.shape[1]:,} rows")
    return best


def _total(value: Tensor) -> Tensor:
    return sum_over_processes(value) if is_distributed() else value


def _rounded(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weight.to(dtype).double(), bias.to(dtype).double()


def _columns(inputs: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Give the inputs in float64, some columns at a time."""
    step = max(1, _CHUNK // max(inputs.shape[0] * inputs.shape[1], 1))
    for start in range(0, inputs.shape[2], step):
        columns = slice(start, start + step)
        yield columns, inputs[:, :, columns].double()


def _apply(weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    """Return W u + b of all rows, shape (G, rows, O)."""
    outputs = bias.unsqueeze(1).expand(-1, inputs.shape[1], -1).clone()
    for columns, part in _columns(inputs):
        outputs += part @ weight[:, :, columns].mT
    return outputs


def _scaled(weight: Tensor, bias: Tensor, u: Tensor, y: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Return a weight and a bias with the factor and the shift for each output that bring it nearest to y."""
    given = _apply(weight, bias, u)
    n = _total(torch.tensor(float(u.shape[1]), dtype=torch.float64))
    if not has_bias:
        product, square = _total((given * y).sum(1)), _total(given.square().sum(1))
        return weight * torch.where(square > 0, product / square, 1.0).unsqueeze(2), bias
    x, z, xx, xz = (_total(v.sum(1)) / n for v in (given, y, given.square(), given * y))
    spread = xx - x.square()
    factor = torch.where(spread > 1e-12 * xx, (xz - x * z) / spread, 1.0)
    return weight * factor.unsqueeze(2), bias * factor + z - factor * x


def _ridge_fits(best: LinearFit, u: Tensor, y: Tensor, has_bias: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Give a weight and a bias for each ridge, around the best so far."""
    rest = y - _apply(best.weight, best.bias, u)
    mean = u.new_zeros(u.shape[0], 1, u.shape[2], dtype=torch.float64)
    if has_bias:
        mean = torch.cat([part.mean(1, keepdim=True) for _, part in _columns(u)], 2)
    moved = rest.mean(1, keepdim=True) if has_bias else torch.zeros_like(rest[:, :1])
    gram = u.new_zeros(u.shape[0], u.shape[1], u.shape[1], dtype=torch.float64)
    for columns, part in _columns(u):
        part = part - mean[:, :, columns]
        gram += part @ part.mT
    size = (gram.diagonal(dim1=1, dim2=2).sum(1) / u.shape[2]).clamp_min(torch.finfo(torch.float64).tiny)
    for solved in ridge_solutions(gram, rest - moved, size):
        step = torch.cat([solved.mT @ (part - mean[:, :, columns]) for columns, part in _columns(u)], 2)
        yield best.weight + step, best.bias + moved[:, 0] - (step @ mean.mT).squeeze(2)
