"""Reading the values of a config: each has a kind, and an error says which key of which entry is wrong and how."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torchshear._arguments import close_names
from torchshear.errors import ArgumentError

Reader = Callable[[str, Any], Any]
"""(place, value) -> checked value; the place is as "config_list[1]: sparsity"."""


def read_keys(label: str, given: object, readers: Mapping[str, Reader], what: str) -> dict[str, Any]:
    """Check an entry key by key.

    Args:
        label: where the entry stands.
        given: the entry; not changed, and nothing of it is kept that could change.
        readers: key -> how to read its value.
        what: what an entry is called.

    Returns:
        Key -> checked value.

    Raises:
        ArgumentError: the entry is no mapping; a key is unknown; a value is of another kind or out of range.
    """
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{label} is {_quote(given)}; expected {what}: a mapping from keys to values.")
    read: dict[str, Any] = {}
    for key, value in given.items():
        if key not in readers:
            raise ArgumentError(
                f"{label}: {key!r} is no key of {what}.{close_names(str(key), readers)} Known: "
                f"{', '.join(sorted(readers))}."
            )
        read[key] = readers[key](f"{label}: {key}", value)
    return read


def fraction(place: str, value: Any) -> float:
    """A number in [0, 1)."""
    return _number(place, value, lambda number: 0 <= number < 1, "a number in [0, 1)")


def closed_fraction(place: str, value: Any) -> float:
    """A number in [0, 1]."""
    return _number(place, value, lambda number: 0 <= number <= 1, "a number in [0, 1]")


def kept_fraction(place: str, value: Any) -> float:
    """A number in (0, 1]."""
    return _number(place, value, lambda number: 0 < number <= 1, "a number in (0, 1]")


def _number(place: str, value: Any, fits: Callable[[float], bool], expected: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not fits(value):
        hint = " A number in quotes is a text." if isinstance(value, str) else ""
        raise ArgumentError(f"{place}={_quote(value)}; expected {expected}.{hint}")
    return float(value)


def integer(least: int) -> Reader:
    """Make a reader of an integer that is at least `least`."""

    def read(place: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{place}={_quote(value)}; expected an integer of at least {least}.")
        return value

    return read


def flag(place: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{place}={_quote(value)}; expected true or false.")
    return value


def text(place: str, value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ArgumentError(f"{place}={_quote(value)}; expected a text.")
    return value


def label(place: str, value: Any) -> str:
    """A name that tells things that belong together: a text that is not empty, or an integer."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ArgumentError(f"{place}={_quote(value)}; expected a text or an integer.")
    return str(value)


def one_of(known: Collection[str]) -> Reader:
    """Make a reader of one word out of several."""

    def read(place: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ArgumentError(
                f"{place}={_quote(value)}; expected one of {', '.join(known)}.{close_names(str(value), known)}"
            )
        return value

    return read


def names(place: str, value: Any) -> tuple[str, ...]:
    """Several texts, or one, each once."""
    found = (value,) if isinstance(value, str) else value
    if isinstance(found, Mapping) or not isinstance(found, Iterable):
        raise ArgumentError(f"{place}={_quote(value)}; expected a list of texts.")
    found = tuple(found)
    seen: set[str] = set()
    for item in found:
        if not isinstance(item, str) or not item:
            raise ArgumentError(f"{place} holds {_quote(item)}; expected texts.")
        if item in seen:
            raise ArgumentError(f"{place} holds {item!r} twice; give it once.")
        seen.add(item)
    return found


def some_names(place: str, value: Any) -> tuple[str, ...]:
    """Several texts, or one; at least one."""
    found = names(place, value)
    if not found:
        raise ArgumentError(f"{place} is empty, which selects nothing; name something or leave the key away.")
    return found


def expressions(place: str, value: Any) -> tuple[str, ...]:
    """Regular expressions."""
    found = names(place, value)
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ArgumentError(
                f"{place}: {pattern!r} is no regular expression: {error}. In front of a sign that is meant as it "
                f"stands, as . or *, write a backslash."
            ) from error
    return found


def refuse(why: str) -> Reader:
    """Make a reader of a key that is known, and that cannot be honoured here."""

    def read(place: str, value: Any) -> Any:
        raise ArgumentError(f"{place}={_quote(value)}: {why}")

    return read


def is_nothing(allowed: Collection[Any], why: str) -> Reader:
    """Make a reader of a key that may only say that something is off."""

    def read(place: str, value: Any) -> Any:
        if not any(_is_same(value, item) for item in allowed):
            raise ArgumentError(f"{place}={_quote(value)}: {why}")
        return value

    return read


def _is_same(value: object, item: object) -> bool:
    """Return whether two plain values are equal; a value that is not plain, as an array, is equal to none."""
    if isinstance(value, Mapping) and isinstance(item, Mapping):
        return value.keys() == item.keys() and all(_is_same(value[key], item[key]) for key in value)
    return value is item or (isinstance(value, int | float | str) and value == item)


def _quote(value: object) -> str:
    """A value in a message, of any length."""
    try:
        shown = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
