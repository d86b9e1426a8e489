"""Targets of size as they are asked for, and what files of a model take beside its tensors."""

import math
import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from torchshear._arguments import quote
from torchshear.errors import ArgumentError

_UNITS: Final = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TEXT: Final = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?) *([a-z]+)")


@dataclass(frozen=True, slots=True)
class FileOverhead:
    """Sizes of real files of a model.

    Attributes:
        dense_bytes: the ONNX file of the dense model.
        beside_tensors: what the largest file of the pruned model takes beside its tensors: graph, names, metadata.
    """

    dense_bytes: int
    beside_tensors: int


def parse_size(target: object) -> tuple[float | None, float | None]:
    """Return a target of size as a share of the dense model's, or in bytes; the other is None.

    Raises:
        ArgumentError: it is neither a number in (0, 1] nor a positive size with its unit.

    Example:
        >>> parse_size(0.5), parse_size("2.5MB"), parse_size("1 MiB")
        ((0.5, None), (None, 2500000.0), (None, 1048576.0))
    """
    if isinstance(target, str):
        found = _TEXT.fullmatch(target.strip().lower())
        size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
        if 0 < size < math.inf:
            return None, size
        share = float(target) if re.fullmatch(r" *(0?\.[0-9]+|1(\.0*)?) *", target) else 0.0
    else:
        is_number = isinstance(target, int | float | np.integer | np.floating) and not isinstance(target, bool)
        share = float(target) if is_number else 0.0  # type: ignore[arg-type]
    if not 0 < share <= 1:
        raise ArgumentError(
            f"target_size={quote(target)}; expected a share of the dense model's size in (0, 1], as 0.5, or bytes with "
            f"their unit, as '2.5MB' (2,500,000 bytes), '800KB' or '1MiB' (1,048,576 bytes)."
        )
    return share, None


def most_bytes(target: object, dense_bytes: int) -> float:
    """Return the bytes that a target allows."""
    share, size = parse_size(target)
    return size if share is None else share * dense_bytes  # type: ignore[return-value]
