"""Dotted names, and patterns for them as users write them: "layer4.*", "*.attn.*", "head"."""

import difflib
import re
from collections.abc import Collection, Iterable
from fnmatch import translate
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from torchshear._arguments import quote
from torchshear.errors import ArgumentError


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
