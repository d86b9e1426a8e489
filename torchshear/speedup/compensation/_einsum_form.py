"""An einsum of a value with a weight as the linear layer that it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchshear.dependency.rules._contraction import explicit_equation

Shape = tuple[int, ...]
Dims = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class EinsumForm:
    """Dimensions of an einsum's operands and result by what they are for.

    Attributes:
        operand: dimensions of the value: those that have a matrix each, those of rows, those summed over.
        weight: dimensions of the weight: those of which each has a matrix, those of outputs, those summed over.
        result: dimensions of the result: the first of both, those of rows, those of outputs.
    """

    operand: Dims
    weight: Dims
    result: Dims

    @classmethod
    def of(cls, equation: str, shapes: tuple[Shape, Shape], place: int) -> "EinsumForm | None":
        """Read an equation.

        Args:
            equation: of two operands.
            shapes: of both operands.
            place: number of the operand that is the weight.

        Returns:
            The form; None where it does more than multiply with matrices, such as to sum one operand alone.
        """
        terms, output = explicit_equation(equation, [len(shape) for shape in shapes])
        x, w = terms[1 - place], terms[place]
        if any(len(set(term)) != len(term) for term in (x, w, output)):
            return None
        sizes = [dict(zip(term, shape, strict=True)) for term, shape in zip(terms, shapes, strict=True)]
        if any(sizes[0][letter] != sizes[1][letter] for letter in x if letter in w):
            return None
        each = [letter for letter in output if letter in x and letter in w]
        rows = [letter for letter in output if letter in x and letter not in w]
        made = [letter for letter in output if letter in w and letter not in x]
        summed = [letter for letter in x if letter in w and letter not in output]
        if len(x) != len(each + rows + summed) or len(w) != len(each + made + summed) or not summed or not rows:
            return None

        def dims(term: str, *parts: list[str]) -> Dims:
            first, second, third = (tuple(term.index(letter) for letter in part) for part in parts)
            return first, second, third

        return cls(dims(x, each, rows, summed), dims(w, each, made, summed), dims(output, each, rows, made))

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as W of shape (G, O, K)."""
        return _flat(weight, self.weight)

    def to_weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Return W as a weight of some shape."""
        order = [dim for part in self.weight for dim in part]
        moved = matrix.reshape([shape[dim] for dim in order])
        return moved.permute([order.index(dim) for dim in range(len(order))])

    def rows(self, operand: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs of shape (G, R, K) and outputs of shape (G, R, O)."""
        return _flat(operand, self.operand), _flat(result, self.result)

    def numbers_along(self, dim: int, shape: Shape) -> Tensor:
        """Return for each row its place along a dimension of the operand, which is one of rows.

        Args:
            dim: the dimension.
            shape: of the operand.
        """
        sizes = [shape[own] for own in self.operand[1]]
        line = [1] * len(sizes)
        line[self.operand[1].index(dim)] = -1
        return torch.arange(shape[dim]).reshape(line).expand(sizes).flatten()


def _flat(value: Tensor, dims: Dims) -> Tensor:
    moved = value.permute([dim for part in dims for dim in part])
    ends = [len(dims[0]), len(dims[0]) + len(dims[1])]
    shape = moved.shape
    return moved.reshape(shape[: ends[0]].numel(), shape[ends[0] : ends[1]].numel(), shape[ends[1] :].numel())
