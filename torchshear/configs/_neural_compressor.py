"""The words of Neural Compressor's pruning configs: several pruners, and defaults that complement each of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torchshear._arguments import close_names
from torchshear.configs._entry import CHANNEL_PATTERNS, Entry, Where
from torchshear.configs._values import (
    Reader,
    expressions,
    flag,
    fraction,
    integer,
    is_nothing,
    one_of,
    read_keys,
    some_names,
    text,
)
from torchshear.errors import ArgumentError

_CRITERIA: Final = {
    "magnitude": "l1",
    "gradient": "gradient",
    "snip": "snip",
    "snip_momentum": "snip_momentum",
    "retrain_free": "retrain_free",
}
_OTHER_TYPES: Final = {
    "block_mask": "masks that are trained",
    "sparse_gpt": "weights that are updated layer by layer",
    "pattern_lock": "the zeros of a model that trains, as in torchshear.compat.neural_compressor",
}
_PATTERNS: Final = {"channelx1": "in_channel", "1xchannel": "out_channel", "mha": "heads"}


def _pruning_type(place: str, value: Any) -> str:
    word = text(place, value)
    if word in _CRITERIA:
        return _CRITERIA[word]
    known = f"expected one of {', '.join(_CRITERIA)}."
    if word.removesuffix("_progressive") in _CRITERIA and word.endswith("_progressive"):
        raise ArgumentError(
            f"{place}={word!r} follows a schedule, and here all goes at once; prepare_compression of "
            f"torchshear.compat.neural_compressor reads it, and {known}"
        )
    if word in _OTHER_TYPES:
        raise ArgumentError(f"{place}={word!r} needs {_OTHER_TYPES[word]}, which no config list does here; {known}")
    raise ArgumentError(f"{place}={word!r}; {known}{close_names(word, _CRITERIA)}")


def _pattern(place: str, value: Any) -> str:
    """Read a pattern as the unit that it means, in the common words."""
    word = text(place, value)
    if word in _PATTERNS:
        return _PATTERNS[word]
    found = re.fullmatch(r"([1-9][0-9]*)([x:])([1-9][0-9]*)", word)
    if found is None or (found[2] == ":" and int(found[1]) >= int(found[3])):
        raise ArgumentError(
            f"{place}={word!r}; expected {', '.join(_PATTERNS)}, NxM (a block of N outputs by M inputs), or N:M with N "
            f"below M (N of M consecutive inputs go).{close_names(word, _PATTERNS)}"
        )
    return word


_NO_LISTS: Final = (
    "regularisers act while a model is trained; leave it away. prepare_compression of "
    "torchshear.compat.neural_compressor reads it."
)
KEYS: Final[dict[str, Reader]] = {
    "target_sparsity": fraction,
    "pruning_type": _pruning_type,
    "criterion_type": _pruning_type,
    "criterion_reduce_type": one_of(("mean", "sum", "max")),
    "pattern": _pattern,
    "op_names": expressions,
    "excluded_op_names": expressions,
    "pruning_op_types": some_names,
    "pruning_scope": one_of(("global", "local")),
    "min_sparsity_ratio_per_op": fraction,
    "max_sparsity_ratio_per_op": fraction,
    "start_step": integer(0),
    "end_step": integer(0),
    "pruning_frequency": integer(1),
    "sparsity_decay_type": one_of(("exp", "cos", "cube", "linear")),
    "low_memory_usage": flag,
    "reg_type": is_nothing((None,), _NO_LISTS),
    "parameters": is_nothing(({}, {"reg_coeff": 0.0}), _NO_LISTS),
    "lock_init_sparsity": is_nothing((None, False), "zeros that a model has already are not kept; leave it away."),
}
_DEFAULTS: Final[Mapping[str, Any]] = {
    "target_sparsity": 0.9,
    "pruning_type": _CRITERIA["snip_momentum"],
    "criterion_reduce_type": "mean",
    "pattern": "4x1",
    "op_names": (),
    "excluded_op_names": (),
    "pruning_op_types": ("Conv", "Linear"),
    "pruning_scope": "global",
    "min_sparsity_ratio_per_op": 0.0,
    "max_sparsity_ratio_per_op": 0.98,
    "start_step": 0,
    "end_step": 0,
}
_NO_EFFECT: Final = ("low_memory_usage", "sparsity_decay_type", "pruning_frequency")


def parse_neural_compressor(given: object) -> tuple[Entry, ...]:
    """Read a pruning config of Neural Compressor.

    Args:
        given: the list of pruners; or a mapping with that list as "pruning_configs", whose other keys complement each
            pruner, key by key. What a pruner says itself counts, lists included: they are replaced, never joined.

    Raises:
        ArgumentError: a key, a value or a combination of keys is wrong.
    """
    common: Mapping[str, Any] = {}
    items: object = given
    if isinstance(given, Mapping):
        common = {key: value for key, value in given.items() if key != "pruning_configs"}
        items = given.get("pruning_configs", [{}])
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise ArgumentError(f"pruning_configs is {items!r}; expected a list of at least one pruner.")
    labels = [f"pruning_configs[{i}]" for i in range(len(items))]
    shared = read_keys("the config", common, KEYS, "a Neural Compressor config")
    read = [
        read_keys(label, item, KEYS, "a Neural Compressor pruner") for label, item in zip(labels, items, strict=True)
    ]
    return tuple(_entry(label, {**shared, **own}) for label, own in zip(labels, read, strict=True))


def _entry(label: str, said: dict[str, Any]) -> Entry:
    keys = {**_DEFAULTS, **said}
    _check_one_shot(label, keys)
    ratio, least, most, notes = _read_bounds(label, keys)
    where = Where(
        types=keys["pruning_op_types"],
        are_types_given="pruning_op_types" in said,
        patterns=keys["op_names"],
        not_patterns=keys["excluded_op_names"],
    )
    notes += [f"{word} has no effect where all goes at once" for word in _NO_EFFECT if word in said]
    is_global = keys["pruning_scope"] == "global"
    criterion = keys.get("criterion_type", keys["pruning_type"])
    if keys["pattern"] in CHANNEL_PATTERNS and keys["criterion_reduce_type"] == "max":
        raise ArgumentError(
            f"{label}: criterion_reduce_type='max' where units are whole channels; their scores are sums. Write sum."
        )
    if criterion == "retrain_free":
        if keys["pattern"] not in CHANNEL_PATTERNS:
            raise ArgumentError(
                f"{label}: pattern={keys['pattern']!r} with retrain_free, which scores whole channels and heads; "
                f"expected {', '.join(_PATTERNS)}."
            )
        notes.append("retrain_free: what stays is not scaled anew after the search")
    return Entry(
        label=label,
        dialect="neural_compressor",
        where=where,
        ratio=ratio,
        pool=label if is_global else None,
        min_ratio=least if is_global else 0.0,
        max_ratio=most if is_global else 1.0,
        criterion=criterion,
        pattern=keys["pattern"],
        reduce=keys["criterion_reduce_type"],
        notes=tuple(notes),
    )


def _check_one_shot(label: str, keys: Mapping[str, Any]) -> None:
    start, end = keys["start_step"], keys["end_step"]
    if start > end:
        raise ArgumentError(f"{label}: start_step={start} is behind end_step={end}; expected it not to be.")
    if start != end:
        raise ArgumentError(
            f"{label}: start_step={start} and end_step={end} ask for a schedule, and here all goes at once, or by the "
            f"schedule= of a PruningSession. Set start_step to end_step; prepare_compression of "
            f"torchshear.compat.neural_compressor reads these keys."
        )


def _read_bounds(label: str, keys: Mapping[str, Any]) -> tuple[float, float, float, list[str]]:
    """The ratio, and the bounds of a layer's share, as the pattern allows them."""
    ratio, least, most = (
        keys[word] for word in ("target_sparsity", "min_sparsity_ratio_per_op", "max_sparsity_ratio_per_op")
    )
    if least > most:
        raise ArgumentError(
            f"{label}: min_sparsity_ratio_per_op={least} is above max_sparsity_ratio_per_op={most}; expected it below."
        )
    if ":" in keys["pattern"]:
        gone, of = (int(number) for number in keys["pattern"].split(":"))
        if ratio > gone / of:
            raise ArgumentError(
                f"{label}: target_sparsity={ratio} with the pattern {keys['pattern']!r}, which removes {gone} of {of}; "
                f"expected {gone / of:g} at most. Write target_sparsity."
            )
        most = min(most, gone / of)
    if ratio > most:
        note = f"target_sparsity={ratio} is lowered to max_sparsity_ratio_per_op={most}"
        return most, least, most, [note]
    return ratio, least, most, []
