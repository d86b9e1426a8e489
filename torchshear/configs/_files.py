"""Config files: YAML and JSON, read strictly and without running anything."""

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Final

import yaml

from torchshear.errors import ArgumentError, first_line
from torchshear.storage._reading import UnreadableError, as_path, parse_json, read_text, shorten

ConfigList = Sequence[Mapping[str, Any]] | Mapping[str, Any] | str | PathLike[str]

_MAX_BYTES: Final = 1 << 18  # a config is text that a person wrote; YAML of this size takes seconds to read
_MAX_NODES: Final = 1 << 20  # with references written out, of which a short file can have billions
_MAX_DEPTH: Final = 64
_LONGEST_NUMBER: Final = 40
_TAG: Final = "tag:yaml.org,2002:"
_CONSTRUCTOR: Final = yaml.constructor.SafeConstructor()
_SCALARS: Final = {
    f"{_TAG}str": _CONSTRUCTOR.construct_yaml_str,
    f"{_TAG}null": _CONSTRUCTOR.construct_yaml_null,
    f"{_TAG}bool": _CONSTRUCTOR.construct_yaml_bool,
    f"{_TAG}int": _CONSTRUCTOR.construct_yaml_int,
    f"{_TAG}float": _CONSTRUCTOR.construct_yaml_float,
}


def load_config(path: str | PathLike[str]) -> Any:
    """Read a config file.

    Args:
        path: a file that ends in .yaml, .yml or .json, of a quarter of a MiB at most.

    Returns:
        Lists, mappings, texts, numbers and truth values, for `parse_config` or `read_unipruning_config`.

    Raises:
        ArgumentError: the file is missing, empty, of another kind or not well formed; a mapping has a key twice; the
            message says in which line.
    """
    file = as_path(path, "the path of a config file")
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise ArgumentError(
            f"config file {str(file)!r} ends in {file.suffix!r}; expected one of {', '.join(_READERS)}."
        )
    try:
        found = read(read_text(file, _MAX_BYTES))
    except UnreadableError as error:
        raise ArgumentError(f"config file {str(file)!r} {error}. Expected a config.") from error
    if found is None:
        raise ArgumentError(f"config file {str(file)!r} is empty; expected a list of entries.")
    return found


def _read_json(content: str) -> Any:
    return parse_json(content) if content.strip() else None


def _read_yaml(content: str) -> Any:
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        return None if node is None else _Values().value(node, ())
    except UnreadableError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UnreadableError(
            f"is not well-formed YAML: {getattr(error, 'problem', None) or first_line(error)}{where}"
        ) from error
    except RecursionError as error:
        raise UnreadableError("is nested too deeply; expected lists of mappings") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:  # from within PyYAML
        raise UnreadableError(f"is not well-formed YAML: {type(error).__name__}: {first_line(error)}") from error


class _Values:
    """Turns nodes of YAML into values, each node once however often it is referred to."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int]] = {}  # identity of a node -> its value, and its size written out

    def value(self, node: yaml.Node, around: tuple[yaml.Node, ...]) -> Any:
        """The value of a node that stands in others.

        Raises:
            UnreadableError: a key is no text or stands twice; a list holds itself; references make it too large; a
                value is not what its tag says.
        """
        if any(one is node for one in around):
            raise UnreadableError(f"is endless: what starts in line {_line(node)} holds itself; write it out")
        if len(around) > _MAX_DEPTH:
            raise UnreadableError("is nested too deeply; expected lists of mappings")
        if id(node) not in self._known:
            self._known[id(node)] = self._collection(node, (*around, node)), self._size(node)
        found, size = self._known[id(node)]
        if size > _MAX_NODES:
            raise UnreadableError(f"is too large: what starts in line {_line(node)} has {size} items")
        return found

    def _collection(self, node: yaml.Node, around: tuple[yaml.Node, ...]) -> Any:
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(one, around) for one in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            found: dict[str, Any] = {}
            for key, one in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                    raise UnreadableError(
                        f"is no config: a key in line {_line(key)} is no text; put it in quotes if it is one, and "
                        f"write no merges (<<)"
                    )
                if key.value in found:
                    raise UnreadableError(
                        f"is ambiguous: the key {key.value!r} stands twice in one mapping, again in line {_line(key)}; "
                        f"give it once"
                    )
                found[key.value] = self.value(one, around)
            return found
        return _scalar(node)

    def _size(self, node: yaml.Node) -> int:
        """Return the number of nodes in a node, written out; those in it are known."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        inner = node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]
        return 1 + sum(self._known[id(one)][1] for one in inner)


def _scalar(node: yaml.Node) -> Any:
    construct = _SCALARS.get(node.tag)
    if construct is None or not isinstance(node, yaml.ScalarNode):
        kind = node.tag.removeprefix(_TAG)
        raise UnreadableError(
            f"is not well-formed YAML: could not determine the value of a {kind!r} in line {_line(node)}; expected "
            f"texts, numbers and truth values. Put a text in quotes"
        )
    is_number = node.tag in (f"{_TAG}int", f"{_TAG}float")
    if is_number and ":" in node.value:
        raise UnreadableError(
            f"holds {shorten(node.value)} in line {_line(node)}, which YAML takes for a number in base 60; put it in "
            f"quotes"
        )
    if is_number and len(node.value) > _LONGEST_NUMBER:
        raise UnreadableError(f"holds a number of {len(node.value)} digits in line {_line(node)}")
    try:
        found = construct(node)
    except (ValueError, LookupError) as error:
        what = node.tag.removeprefix(_TAG)
        raise UnreadableError(
            f"is not well-formed YAML: {shorten(node.value)} in line {_line(node)} is no {what}"
        ) from error
    if isinstance(found, float) and not math.isfinite(found):
        raise UnreadableError(f"holds {shorten(node.value)} in line {_line(node)}, which is no finite number")
    return found


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


_READERS: Final = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json}
