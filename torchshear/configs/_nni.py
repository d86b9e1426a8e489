"""The words of NNI's config lists, of its versions 1, 2 and 3."""

from collections.abc import Sequence
from typing import Any, Final

from torchshear.configs._entry import DEFAULT_PATTERN, Entry, Where
from torchshear.configs._values import (
    Reader,
    closed_fraction,
    expressions,
    flag,
    fraction,
    kept_fraction,
    label,
    read_keys,
    refuse,
    some_names,
)
from torchshear.errors import ArgumentError

_SCHEDULE = (
    "whoever reads the list here removes all at once and follows no schedule. Write what is to be removed as sparsity; "
    "AGPPruner, LinearPruner and LotteryTicketPruner of torchshear.compat.nni take schedules."
)
_MAX_LOST: Final = 0.99  # of a layer in a pool, where max_sparsity_per_layer does not say


def _granularity(place: str, value: Any) -> str:
    """Read a granularity as the unit that it means, in the common words."""
    if isinstance(value, str) and value in _GRANULARITIES:
        return _GRANULARITIES[value]
    block = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in block):
        block = ()
    if block in _BLOCKS:
        return _BLOCKS[block]
    if len(block) == 2 and min(block) > 0:
        return f"{block[0]}x{block[1]}"
    raise ArgumentError(
        f"{place}={value!r}; expected {', '.join(_GRANULARITIES)}, or a block of two numbers [outputs, inputs], where "
        f"-1 stands for all."
    )


_GRANULARITIES: Final = {"default": DEFAULT_PATTERN, "out_channel": "out_channel", "in_channel": "in_channel"}
_BLOCKS: Final = {(1, -1): "out_channel", (-1, 1): "in_channel"}


def _exclude(place: str, value: Any) -> bool:
    if flag(place, value):
        return True
    raise ArgumentError(
        f"{place}=False: NNI excludes on any value of this key. Write true to exclude, or leave the key away."
    )


def _targets(place: str, value: Any) -> tuple[str, ...]:
    found = some_names(place, value)
    if set(found) - {"weight", "bias"} or "weight" not in found:
        raise ArgumentError(
            f"{place}={list(found)}; expected weight, or weight and bias: what goes, goes with its bias."
        )
    return found


_COMMON: Final[dict[str, Reader]] = {
    "op_types": some_names,
    "op_names": some_names,
    "op_partial_names": some_names,
    "exclude": _exclude,
}
_FIRST: Final[dict[str, Reader]] = {
    "sparsity": fraction,
    "sparsity_per_layer": fraction,
    "total_sparsity": fraction,
    "max_sparsity_per_layer": kept_fraction,
}
_THIRD: Final[dict[str, Reader]] = {
    "sparse_ratio": fraction,
    "op_names_re": expressions,
    "exclude_op_names": some_names,
    "exclude_op_names_re": expressions,
    "exclude_op_types": some_names,
    "min_sparse_ratio": fraction,
    "max_sparse_ratio": closed_fraction,
    "global_group_id": label,
    "dependency_group_id": label,
    "granularity": _granularity,
    "target_names": _targets,
}
_REFUSED: Final[dict[str, Reader]] = {
    **{
        word: refuse(_SCHEDULE)
        for word in (
            "initial_sparsity",
            "final_sparsity",
            "start_epoch",
            "end_epoch",
            "frequency",
            "prune_iterations",
        )
    },
    "sparse_threshold": refuse("thresholds belong to movement pruning. Write a fraction, as sparse_ratio."),
    "target_settings": refuse("settings by target are not read. Write granularity and sparse_ratio in the entry."),
    "rho": refuse("it belongs to ADMM, which trains. Leave it away."),
}
KEYS: Final[dict[str, Reader]] = {**_COMMON, **_FIRST, **_THIRD, **_REFUSED}

_RATIOS: Final = ("sparsity", "sparsity_per_layer", "total_sparsity", "sparse_ratio")
_SELECTING: Final = ("op_types", "op_names", "op_partial_names", "op_names_re")


def parse_nni(given: object) -> tuple[Entry, ...]:
    """Read a config list of NNI.

    Args:
        given: the list, or a mapping that holds it as "config_list".

    Raises:
        ArgumentError: a key, a value or a combination of keys is wrong; two entries say the same or contradict.
    """
    items = given["config_list"] if isinstance(given, dict) and "config_list" in given else given
    items = [items] if isinstance(items, dict) else items
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise ArgumentError(f"config_list is {items!r}; expected a list of at least one entry.")
    labels = [f"config_list[{i}]" for i in range(len(items))]
    read = [read_keys(label, item, KEYS, "an NNI entry") for label, item in zip(labels, items, strict=True)]
    version = _version(dict(zip(labels, read, strict=True)))
    return tuple(_entry(label, keys, version) for label, keys in zip(labels, read, strict=True))


def _version(entries: dict[str, dict[str, Any]]) -> str:
    """Return the version whose words the whole list is in; entries of version 3 overlap in another way than older ones.

    Raises:
        ArgumentError: some are in the words of version 3 and some in older ones.
    """
    older = {label: sorted(keys.keys() & _FIRST.keys()) for label, keys in entries.items()}
    newer = {label: sorted(keys.keys() & _THIRD.keys()) for label, keys in entries.items()}
    old, new = next(((k, v) for k, v in older.items() if v), None), next(((k, v) for k, v in newer.items() if v), None)
    if old and new:
        raise ArgumentError(
            f"{old[0]} has {old[1][0]!r}, a word of NNI 1 and 2, and {new[0]} has {new[1][0]!r}, one of NNI 3. Write "
            f"the list in the words of one version."
        )
    return "nni v3" if new else "nni"


def _entry(label: str, keys: dict[str, Any], version: str) -> Entry:
    if not any(keys.get(word) for word in _SELECTING):
        raise ArgumentError(f"{label} selects no layers; expected at least one of {', '.join(_SELECTING)}.")
    where = Where(
        types=keys.get("op_types", ()),
        names=keys.get("op_names", ()),
        partials=keys.get("op_partial_names", ()),
        patterns=keys.get("op_names_re", ()),
        not_types=keys.get("exclude_op_types", ()),
        not_names=keys.get("exclude_op_names", ()),
        not_patterns=keys.get("exclude_op_names_re", ()),
    )
    ratios = [word for word in _RATIOS if word in keys]
    if "exclude" in keys:
        _check_only_selects(label, keys)
        return Entry(label=label, dialect="nni v3" if version == "nni v3" else "nni", where=where, excludes=True)
    if len(ratios) != 1:
        said = f"has {' and '.join(ratios)}, which say the same" if ratios else "says no ratio"
        raise ArgumentError(f"{label} {said}; expected exactly one of {', '.join(_RATIOS)}, or exclude.")
    pool, least, most = _pool(label, keys)
    return Entry(
        label=label,
        dialect="nni v3" if version == "nni v3" else "nni",
        where=where,
        ratio=keys[ratios[0]],
        pool=pool,
        min_ratio=least,
        max_ratio=most,
        pattern=keys.get("granularity", DEFAULT_PATTERN),
        notes=("coupled layers are found in the graph, not by dependency_group_id",)
        if "dependency_group_id" in keys
        else (),
    )


def _check_only_selects(label: str, keys: dict[str, Any]) -> None:
    others = sorted(keys.keys() - _COMMON.keys() - {"op_names_re", "exclude_op_names", "exclude_op_types"})
    others = [word for word in others if word != "exclude_op_names_re"]
    if others:
        raise ArgumentError(
            f"{label} excludes layers and has {others[0]!r} as well; expected only what selects layers."
        )


def _pool(label: str, keys: dict[str, Any]) -> tuple[str | None, float, float]:
    """Name of the pool that the layers are ranked in, and the bounds of a layer's share of it."""
    if "max_sparsity_per_layer" in keys and "total_sparsity" not in keys:
        raise ArgumentError(f"{label}: max_sparsity_per_layer bounds shares of total_sparsity, which is not there.")
    if "total_sparsity" in keys:
        most = keys.get("max_sparsity_per_layer", _MAX_LOST)
        _check_bounds(label, 0.0, keys["total_sparsity"], most)
        return label, 0.0, most
    bounds = sorted(keys.keys() & {"min_sparse_ratio", "max_sparse_ratio"})
    if "global_group_id" not in keys:
        if bounds:
            raise ArgumentError(f"{label}: {bounds[0]} bounds shares of a global_group_id, which is not there.")
        return None, 0.0, 1.0
    least, most = keys.get("min_sparse_ratio", 0.0), keys.get("max_sparse_ratio", 1.0)
    _check_bounds(label, least, keys.get("sparse_ratio", 0.0), most)
    return keys["global_group_id"], least, most


def _check_bounds(label: str, least: float, ratio: float, most: float) -> None:
    if not least <= ratio <= most:
        raise ArgumentError(
            f"{label}: of a ratio of {ratio} together, each layer shall lose {least} to {most}; expected bounds with "
            f"the ratio between them."
        )
