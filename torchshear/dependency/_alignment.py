"""Widths that a device computes at full speed, as a value that selection and planning can ask."""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from torchshear._arguments import check_count, check_flag
from torchshear.errors import ArgumentError

_NARROW: Final = 4  # blocks up to which matrix products have widths between whole blocks


@dataclass(frozen=True, slots=True)
class Alignment:
    """The numbers that the width of a dimension should be a multiple of.

    Attributes:
        block: positions that the device computes together at full speed; wide dimensions are multiples of it.
        granule: positions below which a dimension falls off the fast path; divides `block`. It is used where the
            dimension is too narrow for a whole block.
        name: where the figures come from: a profile name, or a description.
        linear: the granule of dimensions that no convolution of maps reads or makes; None for the same. Blocked layouts
            are of maps alone, so that a matrix product has no path to fall off: up to four blocks it takes any multiple
            of this granule, and whole blocks beyond, where the difference is small.

    Raises:
        ArgumentError: a size is not a whole number of at least 1, a granule does not divide the block, or the name is
            empty.

    Example:
        >>> Alignment(block=16, granule=8, name="cpu-avx2").allowed_widths(40)
        array([16, 32, 40])
    """

    block: int
    granule: int
    name: str
    linear: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no width could meet."""
        check_count("block", self.block)
        granules = {"granule": self.granule} | ({} if self.linear is None else {"linear": self.linear})
        for word, granule in granules.items():
            check_count(word, granule)
            if self.block % granule:
                raise ArgumentError(
                    f"block={self.block} is not a multiple of {word}={granule}. "
                    f"Expected a granule that divides the block, such as Alignment(16, 8, 'cpu-avx2', 4)."
                )
        if not isinstance(self.name, str) or not self.name:
            raise ArgumentError(f"an alignment needs a name to appear in reports, but got name={self.name!r}.")

    @classmethod
    def none(cls) -> Self:
        """Give the alignment that allows every width."""
        return cls(block=1, granule=1, name="none")

    def granule_of(self, is_convolved: bool) -> int:
        """Return the granule of dimensions that a convolution of maps reads or makes, or that none does."""
        return self.granule if is_convolved or self.linear is None else self.linear

    def allowed_widths(self, width: int, multiplicity: int = 1, is_convolved: bool = True) -> np.ndarray:
        """List the widths that a dimension may keep.

        Allowed are all k whose k * multiplicity positions fill whole blocks, and `width` itself, since not pruning is
        always possible. Multiples of the granule are allowed too where the dimension fits into one block, or into four
        of matrix products that have a granule of their own, or no narrower width fills whole blocks.

        Args:
            width: units that the dimension has now.
            multiplicity: positions that each unit stands for: the head size for attention heads, H * W after a flatten.
            is_convolved: whether a convolution of maps reads or makes the dimension.

        Returns:
            Widths of shape (n,), int64, ascending, each between 1 and `width`; the last is `width`.

        Raises:
            ArgumentError: an argument is not a whole number of at least 1.

        Example:
            >>> Alignment(block=16, granule=8, name="cpu-avx2", linear=4).allowed_widths(12, is_convolved=False)
            array([ 4,  8, 12])
        """
        check_count("width", width)
        check_count("multiplicity", multiplicity)
        check_flag("is_convolved", is_convolved)
        widths: np.ndarray = np.arange(1, width + 1, dtype=np.int64)
        positions = widths * multiplicity
        is_allowed = positions % self.block == 0
        n_blocks = 1 if is_convolved or self.linear is None else _NARROW
        if width * multiplicity <= n_blocks * self.block or not is_allowed[:-1].any():
            is_allowed |= positions % self.granule_of(is_convolved) == 0
        is_allowed[-1] = True
        allowed: np.ndarray = widths[is_allowed]
        return allowed
