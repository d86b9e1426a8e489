"""Config files: YAML and JSON, read strictly and without running anything."""

import json
from os import PathLike
from pathlib import Path
from typing import Any, Final

import yaml

from torchshear.errors import ArgumentError, first_line

_MAX_BYTES: Final = 1 << 24  # a config is text that a person wrote
_MAX_NODES: Final = 1 << 20  # with references written out, of which a short file can have billions


def load_config(path: str | PathLike[str]) -> Any:
    """Read a config file.

    Args:
        path: a file that ends in .yaml, .yml or .json.

    Returns:
        Lists, mappings, texts, numbers and truth values, for `parse_config` or `read_unipruning_config`.

    Raises:
        ArgumentError: the file is missing, empty, of another kind or not well formed; a mapping has a key twice; the
            message says in which line.
    """
    if not isinstance(path, str | PathLike):
        raise ArgumentError(f"the path of a config file is {type(path).__name__}; expected a text or a path.")
    file = Path(path)
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise ArgumentError(
            f"config file {str(file)!r} ends in {file.suffix!r}; expected one of {', '.join(_READERS)}."
        )
    content = _content(file)
    try:
        found = read(content)
    except _DamagedError as error:
        raise ArgumentError(f"config file {str(file)!r}: {error}") from error
    except RecursionError as error:
        raise ArgumentError(f"config file {str(file)!r} is nested too deeply; expected lists of mappings.") from error
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise ArgumentError(f"config file {str(file)!r}: {first_line(error)}.") from error
    if found is None:
        raise ArgumentError(f"config file {str(file)!r} is empty; expected a list of entries.")
    return found


def _content(file: Path) -> str:
    """The text of a file; of Windows' ways to write it, too.

    Raises:
        ArgumentError: it is missing, too large, or no text.
    """
    try:
        size = file.stat().st_size
        content = file.read_text(encoding="utf-8-sig") if size <= _MAX_BYTES else None
    except OSError as error:
        raise ArgumentError(f"cannot read config file {str(file)!r}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"config file {str(file)!r} is not text in UTF-8; expected a config.") from error
    except ValueError as error:  # a path with a NUL in it
        raise ArgumentError(f"cannot read config file {str(file)!r}: {error}.") from error
    if content is None:
        raise ArgumentError(f"config file {str(file)!r} has {size} bytes; expected a config.")
    return content


class _DamagedError(ValueError):
    """What is wrong with the content of a file."""


def _read_json(content: str) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: set[str] = set()
        for key, _ in found:
            if key in keys:
                raise _DamagedError(f"the key {key!r} stands twice in one mapping; give it once.")
            keys.add(key)
        return dict(found)

    def constant(word: str) -> Any:
        raise _DamagedError(f"{word} is no number that JSON has.")

    if not content.strip():
        return None
    try:
        return json.loads(content, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise _DamagedError(f"not well-formed JSON: {error.msg} in line {error.lineno}.") from error


def _read_yaml(content: str) -> Any:
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        if node is not None:
            _check_yaml(node, (), {})
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise _DamagedError(
            f"not well-formed YAML: {getattr(error, 'problem', None) or first_line(error)}{where}."
        ) from error


def _check_yaml(node: Any, around: tuple[Any, ...], sizes: dict[int, int]) -> int:
    """Check a node with all that is inside, each once however often it is referred to.

    Args:
        node: the node.
        around: the nodes that it stands in.
        sizes: identity of a node that was checked -> what this function gave.

    Returns:
        How many nodes it has, written out.

    Raises:
        _DamagedError: a key is no text or stands twice; a list holds itself; references make it too large.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if any(one is node for one in around):
        raise _DamagedError(f"what starts in line {node.start_mark.line + 1} holds itself; write it out.")
    if id(node) in sizes:
        return sizes[id(node)]
    inner = list(node.value) if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]
    keys: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise _DamagedError(
                f"a key in line {line} is no text; put it in quotes if it is one, and write no merges (<<)."
            )
        if key.value in keys:
            raise _DamagedError(
                f"the key {key.value!r} stands twice in one mapping, again in line {line}; give it once."
            )
        keys.add(key.value)
    size = sizes[id(node)] = 1 + sum(_check_yaml(one, (*around, node), sizes) for one in inner)
    if size > _MAX_NODES:
        raise _DamagedError(f"what starts in line {node.start_mark.line + 1} has {size} items; expected a config.")
    return size


_READERS: Final = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json}
