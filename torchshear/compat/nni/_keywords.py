"""Keywords of NNI that mean nothing here, or that belong to another form of a pruner."""

from collections.abc import Mapping
from typing import Final

from torchshear._other_tools import unknown_keyword
from torchshear.errors import ArgumentError

_WRITES_NOTHING: Final = ("log_dir", "keep_intermediate_result", "experiment_data_dir", "checkpoint_dir")


def refuse_unknown(name: str, unknown: Mapping[str, object], known: str) -> None:
    """Refuse keywords that mean nothing here; words of NNI's own files are taken, and nothing is written."""
    for word in unknown:
        if word not in _WRITES_NOTHING:
            raise unknown_keyword(name, word, known)


def refuse_beside(what: str, given: Mapping[str, object]) -> None:
    """Raise ArgumentError for arguments of another form."""
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"{name}= and {what} are words of two forms of the pruner; give one of them.")
