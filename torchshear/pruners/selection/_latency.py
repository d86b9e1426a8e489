"""Targets of latency as they are asked for."""

import math
from collections.abc import Mapping

import numpy as np

from torchshear._arguments import quote
from torchshear.errors import ArgumentError


def parse_latency(target: object) -> tuple[float | None, float | None]:
    """Return a target of latency as a share of the dense model's, or as milliseconds; the other is None.

    Raises:
        ArgumentError: it is neither a number in (0, 1] nor positive milliseconds with their unit.

    Example:
        >>> parse_latency(0.5), parse_latency("3.5ms")
        ((0.5, None), (None, 3.5))
    """
    text = target.strip().lower() if isinstance(target, str) else ""
    number = text.removesuffix("ms") if isinstance(target, str) else target
    is_number = isinstance(number, str | int | float | np.integer | np.floating) and not isinstance(number, bool)
    try:
        value = float(number) if is_number else math.nan  # type: ignore[arg-type]
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (value > 1 and not text.endswith("ms")):
        raise ArgumentError(
            f"target_latency={quote(target)}; expected a share of the dense model's latency in (0, 1], as 0.5, or "
            f"milliseconds with their unit, as '3.5ms'."
        )
    return (None, value) if text.endswith("ms") else (value, None)


def check_latency(target: object, *, ratio: object, scope: str, normalize: str) -> None:
    """Refuse a target of latency that is none, and what says beside it how much each group loses.

    Raises:
        ArgumentError: the target has another form, or a ratio for all, a scope or a way to compare scores is given; a
            mapping of ratios may stand beside it.
    """
    parse_latency(target)
    is_plain = ratio is None or isinstance(ratio, Mapping)
    for name, value, is_free in (
        ("ratio", ratio, is_plain),
        ("scope", scope, scope in ("auto", "local")),
        ("normalize", normalize, normalize == "auto"),
    ):
        if not is_free:
            raise ArgumentError(
                f"{name}={value!r} beside target_latency={target!r}, for which the width of every group is chosen. "
                f"Leave {name} away; say what may shrink by roles, exclude, min_ratio, max_ratio."
            )
