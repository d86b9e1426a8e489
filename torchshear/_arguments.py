"""Checks of single arguments of public functions; names, and patterns for them such as "layer4.*" and "*.attn.*"."""

import difflib
import math
import re
from collections.abc import Collection, Iterable
from fnmatch import translate
from functools import lru_cache
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

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


def check_number(name: str, value: object) -> None:
    """Raise ArgumentError for what is no finite number."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not -math.inf < value < math.inf:  # type: ignore[operator]
        raise ArgumentError(f"{name}={quote(value)}; expected a finite number.")


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


def matches(pattern: str, name: str) -> bool:
    """Return whether a shell pattern fits a dotted name, or the name of anything that contains it.

    "layer4" and "layer4.*" both fit "layer4.0.conv1.weight"; a star fits dots too. Case counts.

    Args:
        pattern: with `*`, `?` and `[...]` as in `fnmatch`.
        name: name of a parameter or an output, with dots.
    """
    parts = name.split(".")
    fits = _compile(pattern).match
    return any(fits(".".join(parts[: i + 1])) is not None for i in range(len(parts)))


@lru_cache(maxsize=512)
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def close_names(word: str, known: Iterable[str]) -> str:
    """Return a hint for an error message with the known names nearest to a word; "" if none is near."""
    near = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f" Close to it: {', '.join(near)}." if near else ""


def parse_names(argument: str, given: object) -> tuple[str, ...]:
    """Return one name or several as a tuple.

    Args:
        argument: name of the argument, for the message.
        given: a string or a collection of strings.

    Raises:
        ArgumentError: it is neither.
    """
    if isinstance(given, str):
        return (given,)
    is_several = isinstance(given, Collection) and not isinstance(given, Tensor | nn.Module | bytes)
    names: tuple[Any, ...] = tuple(given) if is_several else (given,)  # type: ignore[arg-type]
    if not all(isinstance(name, str) and name for name in names):
        raise ArgumentError(f"{argument}={quote(given)}; expected a string or several of them.")
    return names
