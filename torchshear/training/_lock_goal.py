"""The zeros that a model has, kept while it trains on."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import Sum
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError
from torchshear.pruners.masks import pattern_lock
from torchshear.pruners.schedules import Schedule
from torchshear.training._goals import Choice, Goal, Indices
from torchshear.training._masked_model import MaskedModel


@dataclass(frozen=True, slots=True, eq=False)
class LockGoal(Goal):
    """The zeros of a model, locked element by element at the only event of a schedule, whatever their pattern is.

    Neural Compressor's pattern lock, which looks at blocks or runs instead, and so loses weights of a 2:4 model.

    Attributes:
        groups: the channel groups of the model.
        model: the model.
        layers: names of layers; None for all but tables of embeddings.
        schedule: the schedule, of one event.
        share: share of zeros when the session was made.
    """

    groups: ChannelGroups
    model: nn.Module
    layers: Collection[str] | None
    schedule: Schedule
    share: float = field(init=False)

    def __post_init__(self) -> None:
        """Refuse a model without zeros, and a schedule of several events."""
        if self.schedule.n_steps:
            raise ArgumentError(
                f"pattern='lock' locks once, and the schedule has {self.schedule.n_steps + 1} events; give OneShot()."
            )
        object.__setattr__(self, "share", pattern_lock(self.model, self.layers).sparsity)
        if not self.share:
            raise ArgumentError("pattern='lock' keeps the zeros of a model, and this one has none in these layers.")

    @property
    def unit(self) -> str:
        """Weights."""
        return "weights"

    @property
    def target(self) -> float:
        """Share of zeros when the session was made."""
        return self.share

    @property
    def needs(self) -> frozenset[Sum]:
        """No sums: nothing is scored."""
        return frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights of the layers."""
        return tuple(pattern_lock(self.model, self.layers).tensors)

    @property
    def shrinking(self) -> tuple[ChannelGroup, ...]:
        """No channel group."""
        return ()

    @property
    def singles(self) -> tuple[str, ...]:
        """All of the names."""
        return self.names

    def choose(
        self, share: Schedule | None, position: int, model: MaskedModel, statistics: Statistics | None, before: Choice
    ) -> Choice:
        """Choose the zeros that there are."""
        return self.restore({}, pattern_lock(self.model, self.layers).tensors, self.share)

    def nearest(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose all but the zeros that there are, whatever the others weigh."""
        names = self.groups.graph.aliases
        return {names.get(name, name): mask for name, mask in pattern_lock(self.model, self.layers).tensors.items()}

    def restore(self, kept: Mapping[str, Indices], masks: Mapping[str, Tensor], asked: float) -> Choice:
        """Make a choice of masks."""
        left = {name: int(mask.sum()) for name, mask in masks.items()}
        total = sum(mask.numel() for mask in masks.values())
        return Choice(masks, {}, asked, 1 - sum(left.values()) / total if total else 0.0, left, masks)

    def plan(self, choice: Choice, said: Mapping[str, Any]) -> PruningPlan | None:
        """Return None: its zeros say what can be removed."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return {"pattern": "lock", "layers": repr(self.layers)}
