"""Config lists of NNI and Neural Compressor: reading, checking, what they ask of a model, and plans of that."""

from torchshear.configs._dialects import parse_config
from torchshear.configs._files import ConfigList, load_config
from torchshear.configs._resolve import resolve
from torchshear.configs._resolved import ResolvedConfig

__all__ = [
    "ConfigList",
    "ResolvedConfig",
    "load_config",
    "parse_config",
    "resolve",
]
