"""Dialects of config lists: found by their words, and read into entries."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from torchshear._arguments import close_names, quote
from torchshear.configs import _neural_compressor, _nni
from torchshear.configs._entry import Entry
from torchshear.errors import ArgumentError

_PARSERS: Final[Mapping[str, tuple[Callable[[object], tuple[Entry, ...]], frozenset[str]]]] = MappingProxyType(
    {
        "nni": (_nni.parse_nni, frozenset({*_nni.KEYS, "config_list"})),
        "neural_compressor": (
            _neural_compressor.parse_neural_compressor,
            frozenset({*_neural_compressor.KEYS, "pruning_configs"}),
        ),
    }
)
_UNIPRUNING: Final = frozenset({"filter_lower_threshold", "pruning_step", "prune_flag", "keep_ratio"})


def parse_config(config: object, dialect: str | None = None) -> tuple[Entry, ...]:
    """Read a config list into entries, strictly.

    Args:
        config: a list of mappings, or a mapping, in the words of NNI (versions 1, 2 or 3) or of Neural Compressor; as
            `load_config` gives it, or written in Python. Not changed, and nothing of it is kept.
        dialect: "nni" or "neural_compressor"; None tells it from the keys.

    Returns:
        The entries, in order.

    Raises:
        ArgumentError: the dialect is unknown or cannot be told; a key is unknown, or a value of another kind or out of
            range; keys contradict; two entries are the same, or select the same and ask for something else. The message
            names the entry and the key, and the nearest word that there is.

    Example:
        >>> (entry,) = parse_config([{"op_types": ["Conv2d"], "sparsity": 0.5}])
        >>> entry.label, entry.ratio, entry.where.types
        ('config_list[0]', 0.5, ('Conv2d',))
    """
    if dialect is not None and (not isinstance(dialect, str) or dialect not in _PARSERS):
        raise ArgumentError(
            f"dialect={quote(dialect)}; expected one of {', '.join(_PARSERS)}.{close_names(str(dialect), _PARSERS)}"
        )
    parse, _ = _PARSERS[dialect or _dialect(_keys(config))]
    entries = parse(config)
    _check_different(entries)
    _check_pools(entries)
    return entries


def _keys(config: object) -> set[str]:
    """All keys of a config, of its entries included."""
    if isinstance(config, Mapping):
        lists = [config[key] for key in ("config_list", "pruning_configs") if key in config]
        return {str(key) for key in config} | {key for items in lists for key in _keys_of_items(items)}
    if isinstance(config, Sequence) and not isinstance(config, str):
        _check_entries(config)
        return _keys_of_items(config)
    raise ArgumentError(f"the config is {type(config).__name__}; expected a list of mappings, or a mapping.")


def _check_entries(config: Sequence[object]) -> None:
    """Raise ArgumentError for a list that holds nothing, or something else than mappings with keys."""
    if not config:
        raise ArgumentError("the config is an empty list; expected at least one entry.")
    for number, entry in enumerate(config):
        if not isinstance(entry, Mapping) or not entry:
            what = "empty" if isinstance(entry, Mapping) else type(entry).__name__
            raise ArgumentError(
                f"entry {number} of the config is {what}; expected a mapping that says what to choose, and how much of "
                f"it goes."
            )


def _keys_of_items(items: object) -> set[str]:
    mappings = [item for item in items if isinstance(item, Mapping)] if isinstance(items, Sequence) else []
    return {str(key) for item in mappings for key in item}


def _dialect(keys: Collection[str]) -> str:
    """The dialect of which most words are, where no words say another."""
    if _UNIPRUNING & set(keys):
        word = min(_UNIPRUNING & set(keys))
        raise ArgumentError(
            f"the config has the key {word!r} of UniPruning, which chooses no layers; read it with "
            f"torchshear.compat.unipruning.read_unipruning_config."
        )
    known = {name: words & set(keys) for name, (_, words) in _PARSERS.items()}
    only = {
        name: sorted(words.difference(*(w for n, w in known.items() if n != name))) for name, words in known.items()
    }
    telling = {name: words for name, words in only.items() if words}
    if len(telling) == 1:
        return next(iter(telling))
    if telling:
        said = " and ".join(f"{words[0]!r} of {name}" for name, words in telling.items())
        raise ArgumentError(f"the config mixes words: {said}. Write it in the words of one dialect.")
    every = sorted({word for _, words in _PARSERS.values() for word in words})
    near = "".join(dict.fromkeys(close_names(key, every) for key in sorted(keys) if key not in every))
    raise ArgumentError(
        f"the keys {', '.join(sorted(keys)) or '(none)'} do not tell whose words the config is in.{near} Expected "
        f"what is to go, as 'sparsity' in NNI's words or 'target_sparsity' in Neural Compressor's; or say dialect= to "
        f"torchshear.configs.parse_config."
    )


def _check_different(entries: tuple[Entry, ...]) -> None:
    """Raise ArgumentError for two entries that select the same in the same words."""
    seen: dict[tuple[object, bool], Entry] = {}
    for entry in entries:
        first = seen.setdefault((entry.where, entry.excludes), entry)
        if first is entry:
            continue
        own_pool = first.label if entry.pool == entry.label else entry.pool
        if entry.excludes or replace(entry, pool=own_pool).asks_the_same(first):
            raise ArgumentError(f"{entry.label} repeats {first.label}; leave one of them away.")
        raise ArgumentError(
            f"{entry.label} contradicts {first.label}: both select the same layers, and they ask for something else "
            f"({_describe(first)}, then {_describe(entry)}). Leave one of them away."
        )


def _describe(entry: Entry) -> str:
    return f"{entry.ratio:g} of {entry.pattern}"


def _check_pools(entries: tuple[Entry, ...]) -> None:
    """Raise ArgumentError for entries that share a pool and do not agree on what it is to lose."""
    pools: dict[str, Entry] = {}
    for entry in entries:
        first = pools.setdefault(entry.pool or entry.label, entry)
        if not first.asks_the_same(entry):
            raise ArgumentError(
                f"{entry.label} and {first.label} share the pool {entry.pool!r}, and ask {entry.ratio:g} and "
                f"{first.ratio:g} of it, or other bounds or units; expected the same of all entries of a pool."
            )


def config_words() -> dict[str, Any]:
    """Dialect -> its words, sorted."""
    return {name: tuple(sorted(words)) for name, (_, words) in _PARSERS.items()}
