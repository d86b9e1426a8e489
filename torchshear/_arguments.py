"""Checks of single arguments: what is given to a public function is of the kind that it expects."""

from collections.abc import Collection
from typing import Any, Final

import numpy as np

from torchshear.errors import ArgumentError

MOST: Final = 2**31 - 1
"""The largest number that counts of anything may have."""


def check_kind(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise ArgumentError for a value of another type.

    Args:
        name: what the argument is called.
        value: what is given.
        kind: the type or types that it may have.
        expected: these in words, with where to get one.
    """
    if not isinstance(value, kind):
        raise ArgumentError(f"{name} is {type(value).__name__}; expected {expected}.")


def check_flag(name: str, value: object) -> None:
    """Raise ArgumentError for what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name}={quote(value)}; expected True or False.")


def check_count(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Raise ArgumentError for what is not a whole number between `least` and `most`; a bool is none."""
    if not is_whole(value) or not least <= value <= most:  # type: ignore[operator]
        above = f" and at most {most}" if is_whole(value) and value > most else ""  # type: ignore[operator]
        raise ArgumentError(f"{name} must be a whole number of at least {least}{above}, but got {name}={quote(value)}.")


def check_one_of(name: str, value: object, words: Collection[str]) -> None:
    """Raise ArgumentError for what is none of a few words."""
    if not isinstance(value, str) or value not in words:
        raise ArgumentError(f"{name}={quote(value)}; expected one of {', '.join(map(repr, words))}.")


def check_share(name: str, value: object) -> None:
    """Raise ArgumentError for what is not a number in [0, 1); a bool or a NaN is none."""
    if not is_share(value):
        raise ArgumentError(f"{name}={quote(value)}; expected a number of at least 0 and below 1.")


def is_share(value: object) -> bool:
    """Return True for a number in [0, 1) of Python or NumPy; a bool is none."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and bool(0 <= value < 1)  # type: ignore[operator]


def is_whole(value: object) -> bool:
    """Return True for an integer of Python or NumPy; a bool is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def quote(value: Any) -> str:
    """Write a value for a message: itself if that is short, else its type."""
    try:
        if isinstance(value, Collection) and not isinstance(value, str | bytes) and len(value) > 20:
            return f"a {type(value).__name__} of {len(value)}"
        text = repr(value)
    except Exception:  # some objects cannot be written
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"
