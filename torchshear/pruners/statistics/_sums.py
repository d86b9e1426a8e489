"""Running sums, one object for each thing that is watched."""

import math

import torch
from torch import Tensor

from torchshear.pruners.statistics._statistics import MOMENTUM, GateSums, RowSums, ValueSums, WeightSums


class ValueAccumulator:
    """Sums over all dimensions of a value but one."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None  # zeros, total, magnitude, squares

    def add(self, value: Tensor, dim: int) -> None:
        """Count another value in; half precision is summed in float32, and all batches together in float64."""
        value = value.detach()
        value = value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)
        others = [d for d in range(value.ndim) if d != dim % value.ndim]
        n_positions = value.shape[dim]
        n_seen = math.prod(value.shape) // n_positions
        if others:
            parts = (
                n_seen - torch.count_nonzero(value, others),
                value.sum(others),
                torch.linalg.vector_norm(value, 1, others),
                torch.linalg.vector_norm(value, 2, others).double().square(),
            )
        else:
            parts = ((value == 0).long(), value, value.abs(), value.double().square())
        new = torch.stack([part.double() for part in parts]).cpu()
        self.sums = new if self.sums is None else self.sums + new
        self.count += n_seen

    def result(self) -> ValueSums:
        """What was summed."""
        assert self.sums is not None
        zeros, total, magnitude, squares = self.sums
        return ValueSums(self.count, zeros, total, magnitude, squares)


class WeightAccumulator:
    """Sums over batches for each number of a parameter; in float32 whatever the dtype of the parameter."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.taylor, self.saliency, self.momentum, self.magnitude = (
            torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for _ in range(4)
        )

    def add(self, gradient: Tensor) -> Tensor:
        """Count the gradient of a batch in; gives weight times gradient."""
        gradient = gradient.to(torch.float32)
        product = self.weight.detach().to(torch.float32) * gradient
        self.taylor.addcmul_(product, product)
        magnitude = product.abs()
        self.saliency += magnitude
        self.momentum.mul_(MOMENTUM).add_(magnitude)
        self.magnitude += gradient.abs()
        return product

    def skip(self) -> None:
        """A batch whose loss does not depend on the parameter: its gradient is zero."""
        self.momentum *= MOMENTUM

    def result(self) -> WeightSums:
        """What was summed."""
        return WeightSums(self.taylor, self.saliency, self.momentum, self.magnitude)


class RowAccumulator:
    """Sums over batches of what a layer's rows add up to."""

    def __init__(self, length: int) -> None:
        self.squares, self.magnitude = (
            torch.zeros(length, dtype=torch.float64),
            torch.zeros(length, dtype=torch.float64),
        )

    def add(self, product: Tensor, dim: int, bias: Tensor | None) -> None:
        """Count weight times gradient of a batch in, with the same of the bias."""
        others = [d for d in range(product.ndim) if d != dim]
        rows = (product.sum(others) if others else product).double().cpu()
        rows = rows if bias is None else rows + bias.double().cpu()
        self.squares += rows.square()
        self.magnitude += rows.abs()

    def result(self) -> RowSums:
        """What was summed."""
        return RowSums(self.squares, self.magnitude)


class GateAccumulator:
    """Sums over samples and batches of the gradients of a group's gates."""

    def __init__(self, width: int) -> None:
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.batches: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        """Count the gradients of a batch in, shape (samples, width)."""
        wide = gradient.double().cpu()
        self.squares += wide.square().sum(0)
        self.batches.append(wide.sum(0).float())

    def result(self) -> GateSums:
        """What was summed."""
        return GateSums(self.squares, torch.stack(self.batches, 1))
