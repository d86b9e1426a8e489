"""Words of Neural Compressor for names of layers, which it searches for in names, as patterns for whole names."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from torch import nn

from torchshear.configs._entry import Entry
from torchshear.configs._layers import list_layers

_logger = logging.getLogger(__name__)
_TYPES: Final = {"Conv", "Linear"}


def fit_names(entries: Sequence[Entry], model: nn.Module) -> tuple[Entry, ...]:
    """Return entries with words that fit the whole names of layers of a model.

    A word that fits a whole name, as "layer1.*" or "fc", means no more than that, though Neural Compressor would find
    "fc" in "fc1" as well. One that fits none, as ".mlp", is searched for in names, as there. One that is in no name is
    left out with a warning, unless no other word for names is left. Types that are the default written out need not fit
    a layer each.

    Args:
        entries: the entries.
        model: the model.
    """
    names = [name for layer in list_layers(model) for name in layer.names]
    found = []
    for entry in entries:
        notes: list[str] = []
        chosen = _fitting(entry.where.patterns, names, notes)
        where = replace(
            entry.where,
            patterns=chosen or entry.where.patterns,  # what selects nothing at all is refused by its words
            not_patterns=_fitting(entry.where.not_patterns, names, notes),
            are_types_given=entry.where.are_types_given and set(entry.where.types) != _TYPES,
        )
        for note in notes:
            _logger.warning("%s: %s", entry.label, note)
        found.append(replace(entry, where=where, notes=(*entry.notes, *notes)))
    return tuple(found)


def _fitting(words: Sequence[str], names: Sequence[str], notes: list[str]) -> tuple[str, ...]:
    """The words that fit whole names, and patterns of all names that hold the others."""
    found = []
    for word in words:
        if any(name == word or re.fullmatch(word, name) for name in names):
            found.append(word)
        elif any(re.search(word, name) for name in names):
            notes.append(f"{word!r} fits no whole name, and is searched for in names")
            found.append(f".*(?:{word}).*")
        else:
            notes.append(f"{word!r} is in no name of a layer, and has no effect")
    return tuple(found)
