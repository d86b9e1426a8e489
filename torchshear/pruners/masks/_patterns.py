"""Patterns: what the units of a mask are. All see a weight as (groups, outputs, taps, inputs)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from torchshear._arguments import close_names
from torchshear.errors import ArgumentError
from torchshear.pruners.masks._selection import ranks

Reduce = Literal["mean", "sum", "max"]
Grid = tuple[int, int, int, int]


class Pattern(Protocol):
    """Units of a mask.

    Attributes:
        text: the pattern as it is written.
        largest: fraction of the weights that can be masked at most.
        masks_bias: whether the bias of an output goes with its weights.
    """

    @property
    def text(self) -> str:
        """The pattern as it is written."""
        ...

    @property
    def largest(self) -> float:
        """Fraction of the weights that can be masked at most."""
        ...

    @property
    def masks_bias(self) -> bool:
        """True if the bias of an output goes with its weights."""
        ...

    def explain_misfit(self, shape: Grid) -> str:
        """Return the reason for which a weight has no such units, or ""."""
        ...

    def unit_scores(self, scores: Tensor, reduce: Reduce) -> Tensor:
        """Score of each unit, one dimension, from the scores of weights as (groups, outputs, taps, inputs)."""
        ...

    def removed_units(self, mask: Tensor) -> Tensor:
        """Mark the units that a mask removes, one dimension, from the mask as (groups, outputs, taps, inputs)."""
        ...

    def mask(self, kept: Tensor, scores: Tensor) -> Tensor:
        """The mask, True = kept, as (groups, outputs, taps, inputs), from kept units and scores of weights."""
        ...


def reduce_scores(scores: Tensor, dims: Sequence[int], reduce: Reduce) -> Tensor:
    """Mean, sum or maximum over some dimensions."""
    if reduce == "max":
        return scores.amax(tuple(dims))
    return scores.mean(tuple(dims)) if reduce == "mean" else scores.sum(tuple(dims))


@dataclass(frozen=True, slots=True)
class Blocks:
    """Pattern "NxM": rectangles of N consecutive outputs and M consecutive inputs at one tap; "1x1": single weights."""

    rows: int
    columns: int
    largest: float = 1.0
    masks_bias: bool = False

    @property
    def text(self) -> str:
        """As "4x1"."""
        return f"{self.rows}x{self.columns}"

    def explain_misfit(self, shape: Grid) -> str:
        """Outputs and inputs must be multiples."""
        n_outputs, n_inputs = shape[0] * shape[1], shape[3]
        if n_outputs % self.rows:
            return f"{n_outputs} outputs cannot be divided into blocks of {self.rows}"
        return f"{n_inputs} inputs cannot be divided into blocks of {self.columns}" if n_inputs % self.columns else ""

    def _grid(self, tensor: Tensor) -> Tensor:
        """(blocks of outputs, N, taps, blocks of inputs, M)."""
        groups, outputs, taps, inputs = tensor.shape
        return tensor.reshape(groups * outputs // self.rows, self.rows, taps, inputs // self.columns, self.columns)

    def unit_scores(self, scores: Tensor, reduce: Reduce) -> Tensor:
        """Reduced over the weights of a block."""
        return reduce_scores(self._grid(scores), (1, 4), reduce).flatten()

    def removed_units(self, mask: Tensor) -> Tensor:
        """Blocks without a weight that stays."""
        return ~self._grid(mask).any(4).any(1).flatten()

    def mask(self, kept: Tensor, scores: Tensor) -> Tensor:
        """Whole blocks."""
        grid = self._grid(scores)
        units = kept.reshape(grid.shape[0], 1, grid.shape[2], grid.shape[3], 1)
        return units.expand(grid.shape).reshape(scores.shape)


@dataclass(frozen=True, slots=True)
class OfConsecutive:
    """Pattern "N:M": exactly N of every M consecutive inputs at one tap are masked."""

    pruned: int
    of: int
    masks_bias: bool = False

    @property
    def text(self) -> str:
        """As "2:4"."""
        return f"{self.pruned}:{self.of}"

    @property
    def largest(self) -> float:
        """N / M, once every group is switched."""
        return self.pruned / self.of

    def explain_misfit(self, shape: Grid) -> str:
        """Inputs must be a multiple, so that no group goes over the end of a tap."""
        return f"{shape[3]} inputs cannot be divided into groups of {self.of}" if shape[3] % self.of else ""

    def unit_scores(self, scores: Tensor, reduce: Reduce) -> Tensor:
        """Reduced over a group: the score where a weight would be masked, 0 where it would stay."""
        groups = scores.reshape(-1, self.of)
        return reduce_scores(torch.where(ranks(groups) < self.pruned, groups, 0.0), (1,), reduce)

    def removed_units(self, mask: Tensor) -> Tensor:
        """Groups in which N weights are masked already."""
        return (~mask.reshape(-1, self.of)).sum(1) >= self.pruned

    def mask(self, kept: Tensor, scores: Tensor) -> Tensor:
        """The N lowest of each group that is switched; of equal scores the later ones."""
        stays = ranks(scores.reshape(-1, self.of)) >= self.pruned
        return (stays | kept[:, None]).reshape(scores.shape)


@dataclass(frozen=True, slots=True)
class InputChannels:
    """Pattern "channelx1": all weights that read one input channel, at all taps; of a linear layer a column."""

    text: str = "channelx1"
    largest: float = 1.0
    masks_bias: bool = False

    def explain_misfit(self, shape: Grid) -> str:
        """Every weight has input channels."""
        return ""

    def unit_scores(self, scores: Tensor, reduce: Reduce) -> Tensor:
        """Reduced over outputs and taps."""
        return reduce_scores(scores, (1, 2), reduce).flatten()

    def removed_units(self, mask: Tensor) -> Tensor:
        """Input channels that no weight reads."""
        return ~mask.any(2).any(1).flatten()

    def mask(self, kept: Tensor, scores: Tensor) -> Tensor:
        """Whole input channels."""
        return kept.reshape(scores.shape[0], 1, 1, scores.shape[3]).expand(scores.shape)


@dataclass(frozen=True, slots=True)
class OutputChannels:
    """Pattern "1xchannel": a whole filter, of a linear layer a row, and its bias."""

    text: str = "1xchannel"
    largest: float = 1.0
    masks_bias: bool = True

    def explain_misfit(self, shape: Grid) -> str:
        """Every weight has output channels."""
        return ""

    def unit_scores(self, scores: Tensor, reduce: Reduce) -> Tensor:
        """Reduced over taps and inputs."""
        return reduce_scores(scores, (2, 3), reduce).flatten()

    def removed_units(self, mask: Tensor) -> Tensor:
        """Outputs without a weight that stays."""
        return ~mask.any(3).any(2).flatten()

    def mask(self, kept: Tensor, scores: Tensor) -> Tensor:
        """Whole filters."""
        return kept.reshape(scores.shape[0], scores.shape[1], 1, 1).expand(scores.shape)


def _parse_n_of_m(pruned: str, of: str) -> Pattern:
    if not 0 < int(pruned) < int(of):
        raise ArgumentError(f"pattern='{pruned}:{of}' would mask {pruned} of {of}; expected 0 < N < M, as in '2:4'.")
    return OfConsecutive(int(pruned), int(of))


def _parse_blocks(rows: str, columns: str) -> Pattern:
    if not int(rows) or not int(columns):
        raise ArgumentError(f"pattern='{rows}x{columns}' has no weights in a block; expected sizes of at least 1.")
    return Blocks(int(rows), int(columns))


_FORMS: Final[tuple[tuple[str, Callable[..., Pattern]], ...]] = (
    (r"(\d+)x(\d+)", _parse_blocks),
    (r"(\d+):(\d+)", _parse_n_of_m),
    (r"channelx1", InputChannels),
    (r"1xchannel", OutputChannels),
)

HEADS: Final = "heads"


def parse_pattern(text: object) -> Pattern:
    """The pattern that a text names; "heads" is no pattern of one weight, see `choose_masks`.

    Raises:
        ArgumentError: it names none.
    """
    for form, make in _FORMS:
        found = re.fullmatch(form, text) if isinstance(text, str) else None
        if found is not None:
            return make(*found.groups())
    near = close_names(str(text), ("1x1", "4x1", "2:4", "channelx1", "1xchannel", HEADS))
    raise ArgumentError(
        f"pattern={text!r}; expected 'NxM' as in '1x1' or '4x1', 'N:M' as in '2:4', 'channelx1', '1xchannel' or "
        f"'heads'.{near}"
    )
