"""Changes at random: of bytes, of JSON documents, and of files of tensors."""

import copy
import json
import re
from typing import Any, Final

from tests.blocks import Source

_LITERALS: Final = (
    *b"0 -1 1 2 1e400 -1e400 1e-400 NaN Infinity null true 9999999999 0-9999999999 1:1:1:1 0x_ .inf !!int ''".split(),
    *b'[ ] { } : , "" "0" "@" "@0" "a\\u0000b" "\\ud800" &a *a <<: !!python/none !!bool 2020-99-99'.split(),
    *(b" ", b"\0", b"\xff", b"9" * 5000, b"1:" * 3000 + b"1", b'"' + b"a" * 5000 + b'"', b"[" * 500, b'{"a":' * 200),
)
_TOKENS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[-\w.]+|[\[\]{}:,]')


def damaged_bytes(source: Source, data: bytes) -> bytes:
    """One to three changes of bytes: flipped, cut, doubled, moved or put in."""
    for _ in range(source.integer(1, 3)):
        low = source.integer(0, max(len(data) - 1, 0))
        high = min(len(data), low + source.choice([1, 1, 2, 8, 100]))
        way = source.choice(["flip", "cut", "end", "double", "literal", "token", "token"])
        if way == "flip" and data:
            data = data[:low] + bytes([data[low] ^ 1 << source.integer(0, 7)]) + data[low + 1 :]
        elif way == "cut":
            data = data[:low] + data[high:]
        elif way == "end":
            data = data[:low]
        elif way == "double":
            data = data[:high] + data[low:high] * source.choice([1, 2, 50]) + data[high:]
        elif way == "literal":
            data = data[:low] + source.choice(_LITERALS) + data[low:]
        else:
            tokens = list(_TOKENS.finditer(data))
            if tokens:
                token = source.choice(tokens)
                data = data[: token.start()] + source.choice(_LITERALS) + data[token.end() :]
    return data


_VALUES: Final[tuple[Any, ...]] = (
    None, True, -1, 0, 1, 3, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e308, "", "0", "0-3", "3-0", "0-9999999999", "@",
    "@0", "a\0b", "\ud800", "../x", "/dev/zero", "a" * 3000, "float32", "nn", [], {}, [[]], [None], {"": 0}, {"0": "0"},
    {"tensor": [2**40, 2**40], "dtype": "float32"},
)  # fmt: skip


def damaged_document(source: Source, document: Any) -> Any:
    """One to three changes of a JSON document: values replaced, left out, wrapped, or taken from elsewhere."""
    document = copy.deepcopy(document)
    for _ in range(source.integer(1, 3)):
        places = _places(document)
        if not places:
            return source.choice(_VALUES)
        holder, key = source.choice(places)
        way = source.choice(["value", "value", "leave out", "wrap", "elsewhere", "another key", "number"])
        if way == "value":
            holder[key] = copy.deepcopy(source.choice(_VALUES))
        elif way == "leave out":
            del holder[key]
        elif way == "wrap":
            for _ in range(source.choice([1, 70])):
                holder[key] = [holder[key]]
        elif way == "elsewhere":
            other, there = source.choice(places)
            holder[key] = copy.deepcopy(other[there])
        elif way == "another key" and isinstance(holder, dict):
            holder[source.choice(["", "x", "-1", "99", "0.weight", "a\0b"])] = holder.pop(key)
        elif isinstance(holder[key], int | float):
            holder[key] = holder[key] + source.choice([-1, 1, 10**6, 0.5])
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found, left = [], [document]
    while left:
        holder = left.pop()
        keys = holder.keys() if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        left += [holder[key] for key in keys]
    return found


def damaged_tensors(source: Source, data: bytes) -> bytes:
    """A safetensors file with a changed header, or with changed bytes."""
    if source.choice([True, False]):
        return damaged_bytes(source, data)
    n_header = int.from_bytes(data[:8], "little")
    header = damaged_document(source, json.loads(data[8 : 8 + n_header]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n_header :]
