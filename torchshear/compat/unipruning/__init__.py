"""UniPruning, a pruner of MindSpore Golden Stick: its pruner, its ranking of channels, its config and its files."""

from typing import TYPE_CHECKING

from torchshear._other_tools import answering
from torchshear.compat.unipruning._config import UniPruningConfig, read_unipruning_config
from torchshear.compat.unipruning._mask_file import plan_from_unipruning_mask, write_unipruning_mask
from torchshear.compat.unipruning._planning import plan_unipruning
from torchshear.compat.unipruning._pruner import UniPruner, ZeroingCallback

__all__ = [
    "UniPruner",
    "UniPruningConfig",
    "ZeroingCallback",
    "plan_from_unipruning_mask",
    "plan_unipruning",
    "read_unipruning_config",
    "write_unipruning_mask",
]

if not TYPE_CHECKING:
    __getattr__ = answering(__name__)
