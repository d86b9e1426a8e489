"""Masked forms of operators: their results on the kept positions of their operands alone, at full size.

Where a norm, a softmax or a mean runs over positions of which some are cut, setting these to zero does not remove them.
The proof of a cut runs the original graph on tensors of their full sizes and, for such an operator, its masked form.
Nothing here imports the rules, so that the proof shares nothing with what it proves.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.errors import ArgumentError
from torchshear.graph._run import arguments_by_name

Kept = Mapping[int, Tensor]  # dimension -> bool mask over its positions, for dimensions that lose some


class MaskedCall:
    """A call of an operator, with operands of their full sizes of which some positions are cut.

    Args:
        node: the call.
        args: values of its arguments by position.
        kwargs: values of its arguments by name.
        kept: returns the masks of an operand: for each dimension that loses positions, those that are kept.
    """

    def __init__(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Callable[[fx.Node], Kept]
    ) -> None:
        self.node = node
        self._values = arguments_by_name(node.target, args, kwargs)
        self._nodes = arguments_by_name(node.target, node.args, node.kwargs)
        self._kept = kept

    def arg(self, name: str) -> Any:
        """Return the value of an argument by its name in the operator's schema; operands are of full size."""
        return self._values.get(name)

    def kept_masks(self, name: str) -> Kept:
        """Return the masks of the kept positions of an operand, for each dimension that loses some."""
        node = self._nodes.get(name)
        return self._kept(node) if isinstance(node, fx.Node) else {}

    def dims(self, name: str, operand: str) -> list[int]:
        """Return the dimensions that an argument names, from the front; all of the operand if it names none."""
        given, rank = self.arg(name), self.arg(operand).ndim
        some = [given] if isinstance(given, int) else list(given) if given else range(rank)
        return [int(dim) % rank for dim in some]

    def select_kept(self, name: str, dims: Iterable[int] | None = None) -> Tensor:
        """Return an operand at the kept positions of some dimensions; of all dimensions if none are named."""
        value: Tensor = self.arg(name)
        for dim, mask in self.kept_masks(name).items():
            if dims is None or dim in dims:
                value = value.index_select(dim, mask.nonzero().flatten())
        return value

    def fill_cut(self, name: str, dims: Iterable[int], number: int | None = None, *, value: float = 0) -> Tensor:
        """Return an operand with a number at the cut positions of some dimensions.

        Args:
            name: name of the argument.
            dims: dimensions; negative ones count from the last.
            number: index of the operand, where the argument is a list of them.
            value: the number.
        """
        node: Any = self._nodes[name] if number is None else self._nodes[name][number]
        operand: Tensor = self._values[name] if number is None else self._values[name][number]
        over = {dim % operand.ndim for dim in dims}
        for dim, mask in (self._kept(node) if isinstance(node, fx.Node) else {}).items():
            if dim in over:
                operand = operand.masked_fill(_broadcast_mask(~mask, dim, operand.ndim), value)
        return operand

    def zero_cut(self, value: Tensor, name: str, dims: Iterable[int]) -> Tensor:
        """Zero a value of an operand's size at the positions that are cut from some dimensions of the operand."""
        for dim, mask in self.kept_masks(name).items():
            if dim in dims:
                value = value.masked_fill(_broadcast_mask(~mask, dim, value.ndim), 0)
        return value

    def scatter_kept(self, value: Tensor, name: str, dims: Iterable[int] | None = None) -> Tensor:
        """Put the positions of a value back where `select_kept` took them from, among zeros."""
        for dim, mask in self.kept_masks(name).items():
            if dims is None or dim in dims:
                value = scatter_into_zeros(value, mask, dim)
        return value

    def run(self, /, **replaced: Any) -> Any:
        """Call the operator itself, with other values for some of its arguments."""
        return self.node.target(**{**self._values, **replaced})  # type: ignore[operator]


MaskedForm = Callable[[MaskedCall], Any]

_FORMS: dict[str, MaskedForm] = {}
_EXACT: set[str] = set()


def masked_operator(*names: str, zeros_are_exact: bool = False) -> Callable[[MaskedForm], MaskedForm]:
    """Register the masked form of operators that mix positions; used as a decorator.

    The function takes a `MaskedCall` and returns the value of the call at its full size; values at cut positions are
    ignored.

    Args:
        names: operator names with namespace and without overload, as in "aten.mean".
        zeros_are_exact: whether the operator itself gives the same where the cut positions are zero, as a sum does.

    Raises:
        ArgumentError: an operator has a masked form already.
    """

    def add(form: MaskedForm) -> MaskedForm:
        for name in names:
            if name in _FORMS:
                raise ArgumentError(f"operator {name!r} has a masked form already: {_FORMS[name].__name__}.")
            _FORMS[name] = form
        _EXACT.update(names if zeros_are_exact else ())
        return form

    return add


def masked_form(node: fx.Node) -> MaskedForm | None:
    """Return the masked form of the operator of a call; None if there is none."""
    target = node.target
    return _FORMS.get(str(target).rpartition(".")[0]) if isinstance(target, torch._ops.OpOverload) else None


def zeros_are_exact(node: fx.Node) -> bool:
    """Return whether the operator of a call gives the same as its masked form where the cut positions are zero."""
    return str(node.target).rpartition(".")[0] in _EXACT


def forget_masked_form(name: str) -> None:
    """Forget the masked form of an operator, if it has one."""
    _FORMS.pop(name, None)
    _EXACT.discard(name)


def scatter_into_zeros(value: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Put the positions of a value along a dimension where a mask is true, and zeros elsewhere.

    Args:
        value: as many positions as the mask has true values.
        mask: bool, one for each position of the result.
        dim: the dimension.

    Returns:
        A value with as many positions as the mask has.
    """
    dim = dim % value.ndim
    shape = [*value.shape[:dim], len(mask), *value.shape[dim + 1 :]]
    return value.new_zeros(shape).index_copy(dim, mask.nonzero().flatten(), value)


def _broadcast_mask(mask: Tensor, dim: int, rank: int) -> Tensor:
    """Return a mask over one dimension in a shape that broadcasts."""
    return mask.reshape([-1 if i == dim else 1 for i in range(rank)])
