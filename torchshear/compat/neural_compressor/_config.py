"""The pruning config of Neural Compressor: which layers lose how much, and when in a training."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torchshear._arguments import quote
from torchshear.compat.neural_compressor._settings import PrunerSettings, TrainingSettings, read_settings
from torchshear.configs import ConfigList, load_config, parse_config
from torchshear.configs._neural_compressor import KEYS
from torchshear.errors import ArgumentError

_ANY_BLOCKS: Final = {"pattern": "1x1", "target_sparsity": 0.5}  # stands for a lock, which looks at no blocks


class WeightPruningConfig:
    """Config of Neural Compressor: several pruners, each for layers of its own, and what complements all of them.

    Keys and defaults are those of `ConfigPruner`'s configs, docs/config-lists.md, and for a training `start_step`,
    `end_step`, `pruning_frequency`, `sparsity_decay_type`, `reg_type` and `parameters`; of version 1 `start_epoch`,
    `end_epoch`, `update_frequency` and `initial_sparsity`. The pruning types "..._progressive" and "pattern_lock" are
    read as well. Nothing that is given is kept or changed.

    Args:
        pruning_configs: the pruners, a mapping each; None for one that the common part says. Or a mapping with the list
            as "pruning_configs", or the path of a YAML or JSON file of one.
        **common: what pruners say that do not say it themselves; lists are replaced, never joined.

    Attributes:
        pruners: the settings of each pruner.

    Raises:
        ArgumentError: a key is unknown or a value out of range, or keys contradict each other.

    Reference: Intel Neural Compressor 2.x, https://github.com/intel/neural-compressor.
    """

    def __init__(self, pruning_configs: ConfigList | None = None, **common: Any) -> None:
        given: Any = pruning_configs
        if isinstance(given, str | os.PathLike):
            given = load_config(given)
        if isinstance(given, Mapping):
            common = {**{key: value for key, value in given.items() if key != "pruning_configs"}, **common}
            given = given.get("pruning_configs")
        items = [{}] if given is None else given
        if not isinstance(items, Sequence) or isinstance(items, str) or not items:
            raise ArgumentError(f"pruning_configs={quote(items)}; expected a list of at least one pruner.")
        labels = [f"pruning_configs[{number}]" for number in range(len(items))]
        for label, item in zip(labels, items, strict=True):
            if not isinstance(item, Mapping):
                raise ArgumentError(f"{label} is {type(item).__name__}; expected a mapping from keys to values.")
        said = [{**common, **item} for item in items]
        read = [read_settings(label, keys) for label, keys in zip(labels, said, strict=True)]
        entries = parse_config({"pruning_configs": [self._plain(one, keys) for one, keys in read]}, "neural_compressor")
        self.pruners: tuple[PrunerSettings, ...] = tuple(
            settings.of(entry) for (settings, _), entry in zip(read, entries, strict=True)
        )

    @staticmethod
    def _plain(settings: TrainingSettings, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a pruner says beside its training; the blocks of one that locks zeros are only checked."""
        if not settings.is_locked:
            return dict(keys)
        if "pattern" in keys:
            KEYS["pattern"](f"{settings.label}: pattern", keys["pattern"])
        return {**keys, **_ANY_BLOCKS}

    def __repr__(self) -> str:
        return f"<WeightPruningConfig: {'; '.join(map(str, self.pruners))}>"
