"""Fit of one norm: sums over samples, candidates for its tensors, and their errors on samples held out."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchshear.calibration._processes import sum_over_processes


class AffineSums:
    """Sums of x, y and of what a norm reads, for each channel."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: Tensor | None = None  # of x, y, x^2, xy, y^2, inner, inner^2; shape (7, C)

    def add(self, x: Tensor, y: Tensor, inner: Tensor) -> None:
        """Add values of shape (C, n)."""
        values = torch.stack([torch.ones_like(x), x, y, inner], 1)  # (C, 4, n)
        products = values @ values.mT
        if not bool(products.isfinite().all()):
            values = values[:, :, values.isfinite().all(1).all(0)]
            products = values @ values.mT
        one, x_, y_, z = range(4)
        places = ((one, x_), (one, y_), (x_, x_), (x_, y_), (y_, y_), (one, z), (z, z))
        found = torch.stack([products[:, row, column] for row, column in places])
        self.n += values.shape[2]
        self.sums = found if self.sums is None else self.sums + found

    def reduce(self) -> None:
        """Add up the sums of all processes."""
        assert self.sums is not None, "each process has at least one batch"
        self.n, self.sums = int(sum_over_processes(torch.tensor(self.n))), sum_over_processes(self.sums)

    @property
    def _means(self) -> Tensor:
        assert self.sums is not None, "there is at least one batch"
        return self.sums / max(self.n, 1)

    def ones(self) -> Tensor:
        """Return a one for each channel."""
        return torch.ones_like(self._means[0])

    def least_squares(self) -> tuple[Tensor, Tensor]:
        """Return factor and shift for y = factor x + shift, each of shape (C,)."""
        x, y, xx, xy = self._means[:4]
        variance = xx - x * x
        factor = torch.where(variance > 1e-12 * xx.clamp_min(1e-30), (xy - x * y) / variance.clamp_min(1e-30), 1.0)
        return factor, y - factor * x

    def inner_statistics(self, old_variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of what the norm reads, each of shape (C,).

        A channel that is constant over the samples keeps its old variance: with none, the norm would multiply whatever
        comes there on other data by some hundreds.
        """
        mean, square = self._means[5:]
        variance = square - mean * mean
        return mean, torch.where(variance > 1e-12 * square, variance, old_variance)

    def error(self, factor: Tensor, shift: Tensor) -> float:
        """Return the squared error of factor x + shift, divided by the variance of y."""
        x, y, xx, xy, yy = self._means[:5]
        total = factor.square() * xx + shift.square() + yy + 2 * factor * shift * x - 2 * factor * xy - 2 * shift * y
        return float(total.sum().clamp_min(0) / (yy - y * y).sum().clamp_min(1e-300))


@dataclass(frozen=True, slots=True, eq=False)
class NormFit:
    """Tensors of a norm, fitted or as they were.

    Attributes:
        method: "affine" for new scale and shift, "statistics" for new mean and variance; "" where the norm stayed as it
            was.
        error_before: squared error on samples held out with the tensors as they were, relative to the variance of the
            output.
        error_after: the same with these tensors.
        tensors: "scale", "shift", "mean" or "variance" -> its new value, shape (C,), float64.
    """

    method: str
    error_before: float
    error_after: float
    tensors: Mapping[str, Tensor]


def fit_norm(fitting: AffineSums, held_out: AffineSums, present: Mapping[str, Tensor], eps: float) -> NormFit:
    """Bring the output of a norm nearest to what it was before the cut, and keep what does best on samples held out.

    New scale and shift are those of least squares; new statistics are mean and variance of what the norm reads. Either
    moves each channel of the present output by a factor and a shift, so that sums over that output tell both errors.
    Candidates are rounded to the type of the present tensors before.

    Args:
        fitting: sums over the samples to fit to.
        held_out: sums over other samples.
        present: "scale", "shift", "mean" and "variance" as far as the norm has them, each of shape (C,).
        eps: added to the variance.
    """
    dtype = next(iter(present.values())).dtype
    present = {name: tensor.double() for name, tensor in present.items()}
    ones = fitting.ones()
    scale, shift = present.get("scale", ones), present.get("shift", torch.zeros_like(ones))
    tensors: dict[str, Mapping[str, Tensor]] = {"": {}}
    moves = {"": (ones, torch.zeros_like(ones))}  # factor and shift of the present output
    if {"scale", "shift"} <= present.keys():
        factor, moved = fitting.least_squares()
        new_scale, new_shift = (one.to(dtype).double() for one in (scale * factor, shift * factor + moved))
        factor = torch.where(scale != 0, new_scale / scale, 1.0)
        moves["affine"] = factor, new_shift - shift * factor
        tensors["affine"] = {"scale": new_scale, "shift": new_shift}
    if {"mean", "variance"} <= present.keys():
        mean, variance = (one.to(dtype).double() for one in fitting.inner_statistics(present["variance"]))
        factor = ((present["variance"] + eps) / (variance + eps)).sqrt()
        moves["statistics"] = (
            factor,
            shift * (1 - factor) + (present["mean"] - mean) * scale / (variance + eps).sqrt(),
        )
        tensors["statistics"] = {"mean": mean, "variance": variance}
    errors = {method: held_out.error(*move) for method, move in moves.items()}
    best = min(errors, key=lambda method: errors[method])
    return NormFit(best, errors[""], errors[best], tensors[best])
