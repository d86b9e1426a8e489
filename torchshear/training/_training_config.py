"""A config list with what its entries say of a training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from torchshear.configs._entry import DEFAULT_PATTERN, Entry
from torchshear.pruners.schedules import Schedule

LOCK: Final = "lock"
"""Pattern of an entry whose layers keep the zeros that they have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Config list, with what its entries say of the training.

    Attributes:
        entries: the entries; those with the pattern `LOCK` keep the zeros that there are at their first event.
        schedules: label of an entry -> its schedule; the others follow that of the session.
        stages: label of an entry -> positions from one of the four stages in which its blocks go to the next; the
            others go at once.
        group_reduction: how scores of a group's members become one, see `torchshear.plan`; None: as the criterion has
            it, or of the filters alone in configs of Neural Compressor.
    """

    entries: tuple[Entry, ...]
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    stages: Mapping[str, int] = field(default_factory=dict)
    group_reduction: str | None = None

    def criteria(self, default: str) -> tuple[str, ...]:
        """Return the criteria of the entries, of those that say none the default."""
        scored = [entry for entry in self.entries if not entry.excludes and entry.pattern != LOCK]
        return tuple(dict.fromkeys(entry.criterion or default for entry in scored)) or (default,)

    @property
    def single_weights(self) -> str:
        """Words of an entry that sets single weights to zero, for good or on the way; "" if none does."""
        for entry in self.entries:
            if not entry.excludes and not takes_channels(entry):
                return f"{entry.label} with the pattern {entry.pattern!r}"
        return "blocks that go little by little" if self.stages else ""


def takes_channels(entry: Entry) -> bool:
    """Return whether an entry of a session removes channels or heads; one that does not say its unit does."""
    return entry.removes_channels or entry.pattern == DEFAULT_PATTERN


def pattern_of_blocks(entry: Entry) -> str:
    """Return the pattern whose blocks go little by little for an entry; whole channels are as good as columns."""
    return "channelx1" if takes_channels(entry) and entry.pattern != "heads" else entry.pattern
