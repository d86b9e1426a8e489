"""Ties: where values that are equal up to rounding are put in order, any of their orders is right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from torchshear.graph.numerics._dispatch import LeanDispatchMode

_aten = torch.ops.aten

_ORDERING: Final = frozenset(
    {
        _aten.topk.default,
        _aten.sort.default,
        _aten.sort.stable,
        _aten.max.dim,
        _aten.min.dim,
        _aten.kthvalue.default,
        _aten.median.dim,
        _aten.nanmedian.dim,
        _aten.argmax.default,
        _aten.argmin.default,
    }
)
_OF_ONE_RESULT: Final = (_aten.argmax.default, _aten.argmin.default)


class TieBreaker:
    """The positions that top-k, sort, argmax and the like chose in one run, in the order of the calls.

    Two runs of one network that round differently may choose differently among values that are equal up to rounding,
    and all that is gathered at those positions then differs. To compare such runs, keep the choices of one, and have
    the other choose alike wherever its own values allow it. That is where the values at those positions are the ones
    that it would choose itself, in the same order, up to a tolerance. A difference that is no tie is never hidden.

    Attributes:
        n_replayed: how many choices the last block of `replay` took over from the run that was kept.

    Example:
        >>> choices, x = TieBreaker(), torch.tensor([1.0, 3.0, 3.0])
        >>> with choices.record():
        ...     kept = (x + torch.tensor([0.0, 0.0, 1e-12]).double()).argmax()
        >>> with choices.replay(tolerance=1e-9):
        ...     followed = (x + torch.tensor([0.0, 1e-12, 0.0]).double()).argmax()
        >>> int(kept), int(followed), choices.n_replayed
        (2, 2, 1)
    """

    def __init__(self) -> None:
        self.n_replayed = 0
        self._made: list[tuple[Any, tuple[int, ...], Tensor]] = []  # operator, shape of the operand, positions

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep the choices of what runs in the block; those of an earlier run are dropped."""
        self._made.clear()

        def keep(func: Any, operand: Tensor, dim: int | None, result: Any) -> Any:
            self._made.append((func, tuple(operand.shape), _positions(func, result).clone()))
            return result

        with _Ordering(keep):
            yield

    @contextmanager
    def replay(self, tolerance: float) -> Iterator[None]:
        """Have what runs in the block choose as the kept run did, wherever that is a tie.

        Args:
            tolerance: how far apart values may be that count as equal, relative to them and to their median.
        """
        waiting = list(self._made)
        self.n_replayed = 0

        def follow(func: Any, operand: Tensor, dim: int | None, result: Any) -> Any:
            while waiting:  # a call that only one of the runs makes is passed over
                known, shape, positions = waiting.pop(0)
                if (known, shape) == (func, tuple(operand.shape)):
                    return self._taken(func, operand, dim, result, positions, tolerance)
            return result

        with _Ordering(follow):
            yield

    def _taken(
        self, func: Any, operand: Tensor, dim: int | None, result: Any, positions: Tensor, tolerance: float
    ) -> Any:
        """The result with the given positions, if they are as good as its own; else the result."""
        own = _positions(func, result)
        if own.shape != positions.shape or torch.equal(own, positions):
            return result
        theirs = _values_at(operand, dim, positions)
        if not _are_tied(_values_at(operand, dim, own), theirs, tolerance):
            return result
        self.n_replayed += 1
        return positions.clone() if func in _OF_ONE_RESULT else (theirs, positions.clone())


Step = Callable[[Any, Tensor, int | None, Any], Any]


class _Ordering(LeanDispatchMode):
    """Gives the results of operators that order values to a function, and takes what it gives in their place."""

    def __init__(self, step: Step) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._step = step

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _ORDERING or args[0].ndim == 0:
            return result
        return self._step(func, args[0], _dim_of(func, args, kwargs or {}), result)


def _dim_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The dimension along which a call orders values; None for all of them."""
    place, argument = next((i, a) for i, a in enumerate(func._schema.arguments) if a.name == "dim")
    given: int | None = args[place] if place < len(args) else kwargs.get("dim", argument.default_value)
    return given


def _positions(func: Any, result: Any) -> Tensor:
    """The positions in the result of an operator."""
    positions: Tensor = result if func in _OF_ONE_RESULT else result[1]
    return positions


def _values_at(operand: Tensor, dim: int | None, positions: Tensor) -> Tensor:
    """The values at positions along a dimension, in the shape of the positions."""
    if dim is None:
        return operand.flatten()[positions]
    is_reduced = positions.ndim < operand.ndim
    found = operand.gather(dim, positions.unsqueeze(dim) if is_reduced else positions)
    return found.squeeze(dim) if is_reduced else found


def _are_tied(own: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether values are equal one by one, up to a tolerance."""
    one, two = own.to(torch.float64), theirs.to(torch.float64)
    sizes = one.abs()
    ordinary = sizes[sizes.isfinite()]
    scale = ordinary.median() if ordinary.numel() else sizes.new_zeros(())
    return bool(((one == two) | ((one - two).abs() <= tolerance * (sizes + scale)) & sizes.isfinite()).all())
