"""Config lists of NNI, Neural Compressor and UniPruning: reading, checking, and what they ask of a model."""

from torchshear.pruners.configs._dialects import config_words, parse_config
from torchshear.pruners.configs._entry import DEFAULT_PATTERN, Entry, Where
from torchshear.pruners.configs._files import load_config
from torchshear.pruners.configs._resolve import resolve
from torchshear.pruners.configs._resolved import ConfigRow, GroupTarget, ResolvedConfig, render_config
from torchshear.pruners.configs._unipruning import UniPruningConfig, read_unipruning_config

__all__ = [
    "DEFAULT_PATTERN",
    "ConfigRow",
    "Entry",
    "GroupTarget",
    "ResolvedConfig",
    "UniPruningConfig",
    "Where",
    "config_words",
    "load_config",
    "parse_config",
    "read_unipruning_config",
    "render_config",
    "resolve",
]
