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
_WITHOUT_VALUES: Final = (_aten.argmax.default, _aten.argmin.default)  # return positions only


class TieBreaker:
    """The positions that top-k, sort, argmax and the like chose in one run, in the order of the calls.

    Two runs of one network that round differently may choose differently among values that are equal up to rounding,
    and everything gathered at those positions then differs. To compare such runs, record the choices of one, and replay
    them in the other wherever its own values allow it: where the values at the recorded positions are the values that
    it would choose itself, in the same order, up to a tolerance. A difference that is no tie is never hidden.

    Attributes:
        n_replayed: number of choices that the last block of `replay` took over from the recorded run.

    Example:
        >>> ties, x = TieBreaker(), torch.tensor([1.0, 3.0, 3.0])
        >>> with ties.record():
        ...     recorded = (x + torch.tensor([0.0, 0.0, 1e-12]).double()).argmax()
        >>> with ties.replay(tolerance=1e-9):
        ...     replayed = (x + torch.tensor([0.0, 1e-12, 0.0]).double()).argmax()
        >>> int(recorded), int(replayed), ties.n_replayed
        (2, 2, 1)
    """

    def __init__(self) -> None:
        self.n_replayed = 0
        self._recorded: list[tuple[Any, tuple[int, ...], Tensor]] = []  # operator, shape of the operand, positions

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the choices of the code in a block, and drop those of an earlier run."""
        self._recorded.clear()

        def record(func: Any, operand: Tensor, dim: int | None, result: Any) -> Any:
            self._recorded.append((func, tuple(operand.shape), _positions(func, result).clone()))
            return result

        with _OrderingMode(record):
            yield

    @contextmanager
    def replay(self, tolerance: float) -> Iterator[None]:
        """Have the code in a block choose as the recorded run did, wherever that is a tie.

        Args:
            tolerance: largest difference of values that count as equal, relative to them and to their median.
        """
        waiting = list(self._recorded)
        self.n_replayed = 0

        def replay(func: Any, operand: Tensor, dim: int | None, result: Any) -> Any:
            positions: Tensor | None = None
            while waiting and positions is None:  # a call that only one of the runs makes is passed over
                known, shape, recorded = waiting.pop(0)
                positions = recorded if (known, shape) == (func, tuple(operand.shape)) else None
            own = _positions(func, result)
            if positions is None or own.shape != positions.shape or torch.equal(own, positions):
                return result
            theirs = _values_at(operand, dim, positions)
            if not _are_tied(_values_at(operand, dim, own), theirs, tolerance):
                return result
            self.n_replayed += 1
            return positions.clone() if func in _WITHOUT_VALUES else (theirs, positions.clone())

        with _OrderingMode(replay):
            yield


class _OrderingMode(LeanDispatchMode):
    """Passes the results of operators that order values to a function, and returns its result in their place.

    Args:
        step: called with the operator, its operand, the dimension along which it orders (None for all), and the result.
    """

    def __init__(self, step: Callable[[Any, Tensor, int | None, Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._step = step

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _ORDERING or args[0].ndim == 0:
            return result
        position, argument = next((i, a) for i, a in enumerate(func._schema.arguments) if a.name == "dim")
        dim = args[position] if position < len(args) else (kwargs or {}).get("dim", argument.default_value)
        return self._step(func, args[0], dim, result)


def _positions(func: Any, result: Any) -> Tensor:
    """Return the positions in the result of an operator."""
    positions: Tensor = result if func in _WITHOUT_VALUES else result[1]
    return positions


def _values_at(operand: Tensor, dim: int | None, positions: Tensor) -> Tensor:
    """Return the values at positions along a dimension, in the shape of the positions."""
    if dim is None:
        return operand.flatten()[positions]
    is_reduced = positions.ndim < operand.ndim
    found = operand.gather(dim, positions.unsqueeze(dim) if is_reduced else positions)
    return found.squeeze(dim) if is_reduced else found


def _are_tied(own: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Return whether values are equal one by one, up to a tolerance."""
    one, two = own.to(torch.float64), theirs.to(torch.float64)
    sizes = one.abs()
    ordinary = sizes[sizes.isfinite()]
    scale = ordinary.median() if ordinary.numel() else sizes.new_zeros(())
    return bool(((one == two) | ((one - two).abs() <= tolerance * (sizes + scale)) & sizes.isfinite()).all())
