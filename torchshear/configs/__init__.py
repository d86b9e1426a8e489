"""Config lists of NNI and Neural Compressor: reading, checking, what they ask of a model, and plans of that."""

from torchshear.configs._dialects import config_words, parse_config
from torchshear.configs._entry import DEFAULT_PATTERN, Entry, Where
from torchshear.configs._files import ConfigList, load_config
from torchshear.configs._planning import Widths, mask_weights, plan_config
from torchshear.configs._resolve import resolve
from torchshear.configs._resolved import ConfigRow, GroupTarget, ResolvedConfig, render_config

__all__ = [
    "DEFAULT_PATTERN",
    "ConfigList",
    "ConfigRow",
    "Entry",
    "GroupTarget",
    "ResolvedConfig",
    "Where",
    "Widths",
    "config_words",
    "load_config",
    "mask_weights",
    "parse_config",
    "plan_config",
    "render_config",
    "resolve",
]
