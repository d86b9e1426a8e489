"""Selection of layers by the words of entries, and the owner of a layer that several entries select."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from torchshear._arguments import close_names
from torchshear.configs._entry import Entry, Where
from torchshear.configs._layers import ConfigLayer
from torchshear.errors import ArgumentError

# Words of Neural Compressor that stand for several classes.
_FAMILIES: Final = MappingProxyType({"Conv": frozenset({"_ConvNd", "Conv1D"}), "Linear": frozenset({"Linear"})})

_Fits = Callable[[str, ConfigLayer], bool]


def select(entry: Entry, layers: Sequence[ConfigLayer], modules: Iterable[str]) -> dict[str, int]:
    """The layers that an entry selects.

    Args:
        entry: the entry.
        layers: all layers of the model.
        modules: names of all modules, with or without parameters of their own.

    Returns:
        Name of a layer -> how exactly it is meant: 3 by its name, 2 by part of it or a pattern, 1 by its class, 0 by
        "default" or nothing.

    Raises:
        ArgumentError: a word fits no layer, or all words together fit none.
    """
    entry = _with_exact_names(entry, layers)
    _check_words(entry, layers, tuple(modules))
    where = entry.where
    exact, left_out = frozenset(where.names), frozenset(where.not_names)
    selected: dict[str, int] = {}
    for layer in layers:
        rank = _rank(where, exact, layer)
        by_name = not where.selects_by_name or rank > 0
        by_type = not where.types or any(_fits_type(entry)(word, layer) for word in where.types)
        is_meant = layer.is_weighted or bool(where.types) or rank == 3
        if by_name and by_type and is_meant and not _is_left_out(entry, left_out, layer):
            selected[layer.name] = rank or int(bool(where.types) and "default" not in where.types)
    if not selected:
        raise ArgumentError(
            f"{entry.label} selects no layer: {_quote_words(entry)} each fit some, and no layer fits all that it says. "
            f"Types and names must both fit."
        )
    return selected


def _with_exact_names(entry: Entry, layers: Sequence[ConfigLayer]) -> Entry:
    """The entry with patterns that are the name of a layer as names; the dots in them stand for nothing else then."""
    known = {name for layer in layers for name in layer.names}
    where = entry.where
    return replace(
        entry,
        where=replace(
            where,
            names=(*where.names, *(word for word in where.patterns if word in known)),
            patterns=tuple(word for word in where.patterns if word not in known),
            not_names=(*where.not_names, *(word for word in where.not_patterns if word in known)),
            not_patterns=tuple(word for word in where.not_patterns if word not in known),
        ),
    )


def _rank(where: Where, exact: frozenset[str], layer: ConfigLayer) -> int:
    """Rank how exactly the words for names mean a layer; 0 if they do not."""
    if not exact.isdisjoint(layer.names):
        return 3
    is_part = any(_fits_part(word, layer) for word in where.partials)
    return 2 if is_part or any(_fits_pattern(word, layer) for word in where.patterns) else 0


def _is_left_out(entry: Entry, names: frozenset[str], layer: ConfigLayer) -> bool:
    where = entry.where
    return (
        not names.isdisjoint(layer.names)
        or any(_fits_type(entry)(word, layer) for word in where.not_types)
        or any(_fits_pattern(word, layer) for word in where.not_patterns)
    )


def _fits_name(word: str, layer: ConfigLayer) -> bool:
    return word in layer.names


def _fits_part(word: str, layer: ConfigLayer) -> bool:
    return any(word in name for name in layer.names)


def _fits_pattern(word: str, layer: ConfigLayer) -> bool:
    """Return whether a whole name fits a regular expression."""
    return any(re.fullmatch(word, name) is not None for name in layer.names)


def _fits_type(entry: Entry) -> _Fits:
    return _fits_family if entry.dialect == "neural_compressor" else _fits_class


def _fits_class(word: str, layer: ConfigLayer) -> bool:
    return layer.is_weighted if word == "default" else word == layer.type_name


def _fits_family(word: str, layer: ConfigLayer) -> bool:
    return bool(_FAMILIES[word] & layer.class_names) if word in _FAMILIES else word == layer.type_name


def _check_words(entry: Entry, layers: Sequence[ConfigLayer], modules: tuple[str, ...]) -> None:
    """Raise ArgumentError for a word that fits no layer at all."""
    where = entry.where
    names = tuple(name for layer in layers for name in layer.names)
    exact = frozenset(names)
    types = tuple(dict.fromkeys(layer.type_name for layer in layers))
    words: tuple[tuple[tuple[str, ...], _Fits, str, tuple[str, ...]], ...] = (
        (where.types if where.are_types_given else (), _fits_type(entry), "type", types),
        (where.names, _fits_name, "name", names),
        (where.partials, _fits_part, "part of a name", names),
        (where.patterns, _fits_pattern, "pattern", names),
        (where.not_types, _fits_type(entry), "excluded type", types),
        (where.not_names, _fits_name, "excluded name", names),
        (where.not_patterns, _fits_pattern, "excluded pattern", names),
    )
    for given, fits, what, known in words:
        for word in given:
            is_there = word in exact if fits is _fits_name else any(fits(word, layer) for layer in layers)
            if not is_there:
                raise ArgumentError(_explain_unknown_word(entry, word, what, known, modules))


def _explain_unknown_word(entry: Entry, word: str, what: str, known: tuple[str, ...], modules: tuple[str, ...]) -> str:
    said = f"{entry.label}: the {what} {word!r} fits no layer of the model"
    inner = [name for name in known if name.startswith(f"{word}.")]
    if word in modules and inner:
        return (
            f"{said}: the module of that name only holds others, as {inner[0]!r}. Names are matched whole; write the "
            f"names of layers, or a pattern such as {re.escape(word)}\\..* where patterns are read."
        )
    if word in modules:
        return f"{said}: the module of that name has no parameters."
    within = next((name for name in known if word in name), None) if "type" not in what else None
    if within is not None:
        return f"{said}. Names are matched whole, and it is only part of {within!r}.{close_names(word, known)}"
    return f"{said}.{close_names(word, known) or ' Known: ' + ', '.join(known[:8]) + '.'}"


def _quote_words(entry: Entry) -> str:
    where = entry.where
    words = (*where.types, *where.names, *where.partials, *where.patterns)
    return ", ".join(words) or "its words"


def assign(entries: Sequence[Entry], selections: Sequence[dict[str, int]]) -> dict[str, Entry]:
    """Assign each layer to one entry.

    In the words of NNI 1 and 2 an entry that excludes holds for the entries before it; in those of version 3 wherever
    it stands. A later entry (in version 3 an earlier one) takes a layer over if it is the more exact one: if it means
    the layer by its name, and the other by a pattern or a class, and so on; or if all of its layers, and not only
    these, are the other's. Neural Compressor's pruners share no layer.

    Args:
        entries: all entries.
        selections: for each, what `select` gives.

    Returns:
        Name of a layer -> the entry that has it.

    Raises:
        ArgumentError: two entries claim a layer and neither is an override of the other; an entry is left without
            layers.
    """
    owner: dict[str, int] = {}
    for number, selected in enumerate(selections):
        for layer in selected:
            first = owner.get(layer)
            owner[layer] = number if first is None else _winner(layer, (first, number), entries, selections)
    for number, entry in enumerate(entries):
        others = {owner[layer] for layer in selections[number]}
        if number not in others and not entry.excludes:
            taken = " and ".join(entries[i].label for i in sorted(others))
            raise ArgumentError(f"{entry.label} is left without layers: all that it selects belong to {taken}.")
    return {layer: entries[number] for layer, number in owner.items()}


def _winner(layer: str, pair: tuple[int, int], entries: Sequence[Entry], selections: Sequence[dict[str, int]]) -> int:
    first, second = pair
    later_wins = entries[second].dialect == "nni"
    if later_wins and (entries[first].excludes or entries[second].excludes):
        return second
    for number in pair:
        if entries[number].excludes:
            return number
    override, other = (second, first) if later_wins else (first, second)
    dialect = entries[second].dialect
    if dialect != "neural_compressor":
        narrower = selections[override].keys() < selections[other].keys()
        if selections[override][layer] > selections[other][layer] or narrower:
            return override
        if entries[first].asks_the_same(entries[second]):
            return first
    order = "the broader one first" if later_wins else "the more exact one first"
    advice = "Leave the layer out of one." if dialect == "neural_compressor" else f"Write {order}, or select less."
    raise ArgumentError(f"layer {layer!r} is claimed by {entries[first].label} and {entries[second].label}. {advice}")
