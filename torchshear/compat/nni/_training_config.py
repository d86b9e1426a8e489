"""Config lists of pruners that train: words of schedules beside the others, and what a session is told of them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from torchshear._arguments import check_one_of
from torchshear.compat.nni._named import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    TaylorFOWeightFilterPruner,
)
from torchshear.compat.nni._pruner import Pruner, rank_with_all
from torchshear.compat.nni._slim import SlimPruner
from torchshear.configs import ConfigList, ResolvedConfig, load_config, parse_config, resolve
from torchshear.configs._entry import DEFAULT_PATTERN, Entry
from torchshear.configs._values import Reader
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners.schedules import Schedule
from torchshear.training._training_config import TrainingConfig

Algorithm = type[Pruner]
"""A class that says by what units are ranked."""

ALGORITHMS: Final[Mapping[str, Algorithm]] = {
    "level": LevelPruner,
    "l1": L1FilterPruner,
    "l2": L2FilterPruner,
    "fpgm": FPGMPruner,
    "slim": SlimPruner,
    "taylorfo": TaylorFOWeightFilterPruner,
    "apoz": ActivationAPoZRankFilterPruner,
    "mean_activation": ActivationMeanRankFilterPruner,
}
_MOST: Final = 1 - 1e-9  # shares of a layer are below 1; its last unit may go where no bound was set


def find_algorithm(argument: str, word: object) -> Algorithm:
    """Return the class of a word as `pruning_algorithm` or `base_algo` takes it."""
    check_one_of(argument, word, tuple(ALGORITHMS))
    assert isinstance(word, str), "checked above"
    return ALGORITHMS[word]


def read_training_config(
    config_list: ConfigList, algorithm: Algorithm, readers: Mapping[str, Reader], final: str = "sparsity"
) -> tuple[tuple[Entry, ...], dict[str, dict[str, Any]]]:
    """Read a config list whose entries have further words.

    Args:
        config_list: the list, or the path of a file of it.
        algorithm: by what units are ranked.
        readers: further word -> how to read its value.
        final: further word that stands for `sparsity`.

    Returns:
        The entries as all pruners read them, and by label of those that do not exclude the further words with their
        values.

    Raises:
        ArgumentError: a word or a value is wrong.
    """
    given = load_config(config_list) if isinstance(config_list, str | os.PathLike) else config_list
    items: Any = given["config_list"] if isinstance(given, Mapping) and "config_list" in given else given
    items = [items] if isinstance(items, Mapping) else items
    words: dict[str, dict[str, Any]] = {}
    if isinstance(items, Sequence) and not isinstance(items, str) and all(isinstance(one, Mapping) for one in items):
        labeled = {f"config_list[{number}]": item for number, item in enumerate(items)}
        given = [_without(item, label, readers, final) for label, item in labeled.items()]
        for label, item in labeled.items():
            words[label] = {
                word: read(f"{label}: {word}", item[word]) for word, read in readers.items() if word in item
            }
    entries = parse_config(given, "nni")
    if algorithm.is_global:
        entries = tuple(rank_with_all(entry) for entry in entries)
    return entries, {entry.label: words[entry.label] for entry in entries if not entry.excludes}


def value_of_all(words: Mapping[str, Mapping[str, Any]], word: str) -> Any:
    """Return the value of a word that all entries must have in common; None if none has it.

    Raises:
        ArgumentError: entries do not agree.
    """
    found = {label: own[word] for label, own in words.items() if word in own}
    for label, value in found.items():
        first = next(iter(found))
        if value != found[first]:
            raise ArgumentError(
                f"{label}: {word}={value!r}, and {first} has {found[first]!r}; one holds for all layers. Give the same."
            )
    return next(iter(found.values()), None)


def _without(item: Mapping[str, Any], label: str, readers: Mapping[str, Reader], final: str) -> dict[str, Any]:
    """An entry without further words."""
    plain = {word: value for word, value in item.items() if word not in readers and word != final}
    if final in item:
        if final != "sparsity" and "sparsity" in item:
            raise ArgumentError(f"{label} has {final!r} and 'sparsity', which say the same; expected one of them.")
        plain["sparsity"] = item[final]
    return plain


def resolve_for(
    model: nn.Module, entries: tuple[Entry, ...], groups: ChannelGroups | None, algorithm: Algorithm
) -> ResolvedConfig:
    """Say what entries ask of a model, see `torchshear.configs.resolve`."""
    return resolve(model, entries, groups, algorithm.criterion, algorithm.pattern)


def request_options(
    resolved: ResolvedConfig, groups: ChannelGroups, algorithm: Algorithm
) -> tuple[dict[str, float] | float, dict[str, Any]]:
    """Return the final shares of channels, by group or in all, and the other options of a request for them.

    Raises:
        ArgumentError: the config asks for several pools, or for single weights.
    """
    entries = {entry.label: entry for entry in resolved.entries}
    asking = [entries[row.entry] for row in resolved.rows if row.groups or row.masked > 0]
    first = asking[0]
    for other in asking:
        if other.pool != first.pool or not other.removes_channels:
            raise ArgumentError(
                f"{first.label} and {other.label} ask for other units, or are ranked apart from each other; in "
                f"iterations all layers are ranked in one way. Give one kind of sparsity."
            )
    options: dict[str, Any] = {"criterion": algorithm.criterion, "group_reduction": algorithm.group_reduction}
    if first.pool is None:
        return resolved.ratios, options
    exclude = [group.name for group in groups if group.name not in resolved.ratios]
    options |= {"scope": "global", "max_ratio": min(first.max_ratio, _MOST), "exclude": exclude}
    return max(resolved.ratios.values()), options | {"min_ratio": first.min_ratio}


def training_config(
    entries: tuple[Entry, ...], algorithm: Algorithm, schedules: Mapping[str, Schedule] = MappingProxyType({})
) -> TrainingConfig:
    """Return entries as a session takes them, with what the algorithm says where they do not.

    Args:
        entries: the entries.
        algorithm: by what units are ranked.
        schedules: label of an entry -> its schedule, where entries have their own.

    Raises:
        ArgumentError: entries that are ranked together have different schedules.
    """
    pools: dict[str, Entry] = {}
    for entry in entries:
        first = pools.setdefault(entry.pool or entry.label, entry)
        if schedules.get(first.label) != schedules.get(entry.label):
            raise ArgumentError(
                f"{first.label} and {entry.label} are ranked together and have different schedules; give the same, or "
                f"another sparsity."
            )
    filled = [
        entry
        if entry.excludes
        else replace(
            entry,
            criterion=algorithm.criterion,
            pattern=algorithm.pattern if entry.pattern == DEFAULT_PATTERN else entry.pattern,
        )
        for entry in entries
    ]
    return TrainingConfig(entries=tuple(filled), schedules=dict(schedules), group_reduction=algorithm.group_reduction)
