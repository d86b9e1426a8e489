"""Reading what anybody may have written: plain files of a bounded size, and JSON that holds plain data."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, Final

from torchshear.errors import ArgumentError

_MAX_DEPTH: Final = 64  # lists in lists; what we write has a dozen
_MAX_DIGITS: Final = 40
_MAX_HEADER: Final = 1 << 25  # bytes; a checkpoint of 100,000 tensors has about half of that
_LONGEST_SHOWN: Final = 80  # characters


class UnreadableError(ValueError):
    """Failure to read a file, as words that follow its name; callers raise an error of the library from it."""


def as_path(given: object, what: str) -> Path:
    """Take a path from a caller.

    Args:
        given: a text or a path.
        what: what it is the path of, for the message, as in "the path of a plan".

    Raises:
        ArgumentError: it is something else, empty, or no text that can name a file, as one with a NUL in it.
    """
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else given
    if not isinstance(text, str):
        raise ArgumentError(f"{what} is {type(given).__name__}; expected a text or a path.")
    try:
        is_name = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a pair of code units, which no name of a file can hold
        is_name = False
    if not is_name:
        raise ArgumentError(f"{what} is {text!r}; expected the name of a file or folder.")
    return Path(text)


def check_plain(path: Path) -> int:
    """See that a path leads to a plain file, without opening it; gives its size in bytes.

    Raises:
        UnreadableError: there is none, or it is a folder, a device, a pipe or a socket.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise UnreadableError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, a pipe or a socket"
        raise UnreadableError(f"is {kind}, not a file")
    return found.st_size


def check_tensors(path: Path) -> None:
    """See that a path leads to a plain file that a header of safetensors of a bounded size may begin.

    Raises:
        UnreadableError: it does not; see `check_plain`.
    """
    check_plain(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from error
    if size > _MAX_HEADER:
        raise UnreadableError(f"has a header of {size} bytes, more than the {_MAX_HEADER} that are read")


def read_bytes(path: Path, most: int) -> bytes:
    """Read a plain file.

    Args:
        path: the file.
        most: number of bytes that it may have.

    Raises:
        UnreadableError: it is missing, no plain file, cannot be read, or has more bytes.
    """
    size = check_plain(path)
    if size > most:
        raise UnreadableError(f"has {size} bytes, more than the {most} that are read")
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from error


def read_text(path: Path, most: int) -> str:
    """Read a plain file as UTF-8, with or without a byte order mark; see `read_bytes`.

    Raises:
        UnreadableError: also if it is no text.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError("is not text in UTF-8") from error


def read_json(path: Path, most: int) -> Any:
    """Read a JSON file; see `read_bytes` and `parse_json`."""
    return parse_json(read_text(path, most))


def parse_json(text: str) -> Any:
    """Parse JSON strictly: every key once, finite numbers, bounded depth.

    Raises:
        UnreadableError: it is not well formed, or goes beyond that.
    """
    try:
        document = json.loads(
            text, object_pairs_hook=_once, parse_constant=_constant, parse_int=_whole, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise UnreadableError(f"is not whole JSON: {error.msg} in line {error.lineno}") from error
    except RecursionError as error:
        raise UnreadableError("is nested too deeply") from error
    level = [document]
    for _ in range(_MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return document
    raise UnreadableError("is nested too deeply")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnreadableError(f"is ambiguous: the key {twice!r} stands twice in one mapping; give it once")
    return found


def _constant(word: str) -> float:
    raise UnreadableError(f"is not plain JSON: {word} is no number that JSON has")


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise UnreadableError(f"holds a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UnreadableError(f"holds the number {text[:20]}, which is too large")
    return value


def shorten(value: object) -> str:
    """Shorten a value of a file for a message."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
