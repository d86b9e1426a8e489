"""Group lasso: over units of channel groups, and over blocks of weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchshear._arguments import check_count, check_flag
from torchshear.dependency import ChannelGroup, Member
from torchshear.errors import ArgumentError
from torchshear.pruners.masks._layers import MaskableLayer
from torchshear.pruners.masks._patterns import Pattern, parse_pattern
from torchshear.pruners.regularizers._regularizer import (
    Penalty,
    Regularized,
    Regularizer,
    Weights,
    check_coefficient,
)

_NOT_PENALISED = frozenset({"statistic", "factor"})


@dataclass(frozen=True, slots=True)
class GroupLasso(Regularizer):
    """Norm of all weights that go with a unit, summed over units, so that whole units are pressed to zero together.

    coefficient * sum over channel groups, over units u, of sqrt(n_u) * ||W_u||_2

    where W_u holds all n_u weights that the removal of u deletes, in every member of the group: rows, biases, scales
    and shifts of norms, and the columns of the layers that read it. The slope at W_u = 0 is 0.

    Attributes:
        coefficient: at least 0.
        run: consecutive units that are pressed together, as for widths that are a multiple of 8.
        sized: whether the factor sqrt(n_u) is there.

    Raises:
        ArgumentError: an attribute is none of those above.

    Reference: Yuan and Lin, 2006; Wen et al., NeurIPS 2016, arXiv:1608.03665; over coupled layers as in Fang et al.,
    CVPR 2023, arXiv:2301.12900.
    """

    coefficient: float = 1e-4
    run: int = 1
    sized: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        check_coefficient("coefficient", self.coefficient)
        check_count("run", self.run)
        check_flag("sized", self.sized)

    def bind(self, network: Regularized) -> Penalty:
        """Return the penalty on the units of a network."""
        if not network.groups:
            raise ArgumentError("GroupLasso: no channel group may shrink; use BlockLasso for masks of single weights.")
        return _UnitPenalty(self, network.groups)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Places of units, those of all groups one after another, in a dimension of a parameter."""

    name: str
    dim: int
    n_blocks: int
    positions: Tensor
    places: Tensor


class _UnitPenalty(Penalty):
    """The penalty; squares of each parameter are taken once, for all dimensions in which units lie."""

    def __init__(self, settings: GroupLasso, groups: Sequence[ChannelGroup]) -> None:
        self._coefficient, self._sized = settings.coefficient, settings.sized
        self._parts: dict[str, list[_Part]] = {}
        self._n_places = 0
        self._counts: Tensor | None = None
        for group in groups:
            for member in group.members:
                if not member.purposes & _NOT_PENALISED:
                    self._parts.setdefault(member.name, []).append(self._part(member, settings.run))
            self._n_places += -(-group.width // settings.run)

    def _part(self, member: Member, run: int) -> _Part:
        places = torch.from_numpy(member.units // run + self._n_places)
        return _Part(member.name, member.dim, member.n_blocks, torch.from_numpy(np.array(member.positions)), places)

    def value(self, weights: Weights, step: int) -> Tensor:
        """Return coefficient * sum over units of the norms of all their weights."""
        total = self._sums({name: weights[name] for name in self._parts if name in weights})
        norms = safe_norm(total)
        if self._sized:
            if self._counts is None or self._counts.device != norms.device:
                ones = {name: torch.ones_like(weights[name]) for name in self._parts if name in weights}
                self._counts = self._sums(ones).sqrt()
            norms = norms * self._counts
        return self._coefficient * norms.sum()

    def _sums(self, weights: Weights) -> Tensor:
        """Sum of squares over all weights of each place, shape (n_places,)."""
        first = next(iter(weights.values()))
        total = torch.zeros(self._n_places, dtype=first.dtype, device=first.device)
        for name, weight in weights.items():
            squares = weight.square()
            for part in self._parts[name]:
                lines = _line_sums(squares, part.dim, part.n_blocks)
                positions, places = part.positions.to(lines.device), part.places.to(lines.device)
                total = total.index_add(0, places, lines[positions].to(total.dtype))
        return total


def _line_sums(squares: Tensor, dim: int, n_blocks: int) -> Tensor:
    """Sum over all other dimensions at each position of one; blocks of dimension 0 one after another."""
    if n_blocks:
        return squares.reshape(n_blocks, -1, *squares.shape[1:]).movedim(dim + 1, 1).flatten(2).sum(2).flatten()
    others = [other for other in range(squares.ndim) if other != dim]
    return squares.sum(others) if others else squares


def safe_norm(squares: Tensor) -> Tensor:
    """Square roots, with slope 0 at 0."""
    is_zero = squares == 0
    return torch.where(is_zero, 0.0, squares.masked_fill(is_zero, 1.0).sqrt())


@dataclass(frozen=True, slots=True)
class BlockLasso(Regularizer):
    """Norm of each block of weights, summed over blocks.

    coefficient * sum over layers, over blocks b of |b| weights, of sqrt(|b|) * ||W_b||_2

    The gradient of a block is coefficient * W_b / ||W_b||_2, as in Neural Compressor's documentation; its 2.x code
    divides by the norm of the gradient instead. Layers that the pattern does not divide are left out.

    Attributes:
        pattern: "NxM" as "4x1", "channelx1" or "1xchannel".
        coefficient: at least 0; Neural Compressor's `reg_coeff`.
        sized: whether the factor sqrt(|b|) is there.

    Raises:
        ArgumentError: an attribute is none of those above; when bound: the pattern fits no layer.
    """

    pattern: str = "4x1"
    coefficient: float = 1e-4
    sized: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        check_coefficient("coefficient", self.coefficient)
        check_flag("sized", self.sized)
        if parse_pattern(self.pattern).largest < 1:
            raise ArgumentError(f"pattern={self.pattern!r} has no blocks; expected 'NxM', 'channelx1' or '1xchannel'.")

    def bind(self, network: Regularized) -> Penalty:
        """Return the penalty on the blocks of a network."""
        pattern = parse_pattern(self.pattern)
        layers = {name: layer for name, layer in network.layers.items() if _fits(pattern, layer)}
        if not layers:
            raise ArgumentError(f"BlockLasso: the pattern {self.pattern!r} fits none of {len(network.layers)} layers.")
        return _BlockPenalty(self, pattern, layers)


def _fits(pattern: Pattern, layer: MaskableLayer) -> bool:
    sizes = layer.view(torch.empty(layer.tensor.shape, device="meta")).shape
    is_table = layer.form.kind == "embedding"
    return not is_table and not pattern.explain_misfit((sizes[0], sizes[1], sizes[2], sizes[3]))


class _BlockPenalty(Penalty):
    def __init__(self, settings: BlockLasso, pattern: Pattern, layers: dict[str, MaskableLayer]) -> None:
        self._settings, self._pattern, self._layers = settings, pattern, layers

    def value(self, weights: Weights, step: int) -> Tensor:
        """Return coefficient * sum over blocks of their norms."""
        found = []
        for name, layer in self._layers.items():
            units = self._pattern.unit_scores(layer.view(weights[name].square()), "sum")
            size = layer.tensor.numel() / max(1, len(units))
            found.append(safe_norm(units).sum() * (math.sqrt(size) if self._settings.sized else 1.0))
        return self._settings.coefficient * torch.stack(found).sum()
