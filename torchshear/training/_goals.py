"""Goals of a session: which channels or weights go by the end, and how they are chosen on the way there."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import Sum
from torchshear.configs import ResolvedConfig
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.latency_target import LatencyAllocation
from torchshear.pruners.schedules import Schedule
from torchshear.speedup import LatencyComparison
from torchshear.training._masked_model import MaskedModel
from torchshear.training._progressive import Pace

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Choice of what is gone at one point of a training.

    Attributes:
        masks: name of a parameter -> bool tensor, True = kept; those not named are whole.
        kept: name of a group -> units that stay; empty for masks of single weights.
        asked: share that was asked for.
        reached: share that is gone.
        widths: what is left of each group or layer, in units.
        singles: the masks of single weights by themselves, without those of channels.
    """

    masks: Mapping[str, Tensor]
    kept: Mapping[str, Indices]
    asked: float
    reached: float
    widths: Mapping[str, int]
    singles: Mapping[str, Tensor] = field(default_factory=dict)


class Goal(ABC):
    """Goal of a session, reached in the end.

    Attributes:
        groups: the channel groups of the model.
        resolved: what a config asks of each layer; None without one.
    """

    groups: ChannelGroups
    resolved: ResolvedConfig | None = None

    @property
    @abstractmethod
    def unit(self) -> str:
        """The unit of shares: "channels", "MACs", "parameters", "latency" or "weights"."""

    @property
    @abstractmethod
    def target(self) -> float:
        """Share that goes in the end."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Sum]:
        """Sums over data or gradients that the criterion reads."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the parameters of which something may go."""

    @property
    @abstractmethod
    def shrinking(self) -> tuple[ChannelGroup, ...]:
        """The channel groups that may shrink."""

    @property
    def singles(self) -> tuple[str, ...]:
        """Names of the parameters of which single weights may go."""
        return ()

    @property
    def paces(self) -> Mapping[str, Pace]:
        """Name of a parameter -> how its weights go little by little; those not named go at once."""
        return {}

    @property
    def owners(self) -> Mapping[str, str]:
        """Name of a group, or canonical name of a weight -> label of the config entry that takes it."""
        return {}

    def needs_at(self, share: Schedule, position: int) -> frozenset[Sum]:
        """Return the sums that are read at a position of the schedule."""
        return self.needs if share.ratio(position, self.target) else frozenset()

    @abstractmethod
    def choose(
        self, share: Schedule | None, position: int, model: MaskedModel, statistics: Statistics | None, before: Choice
    ) -> Choice:
        """Choose what is gone at a position of a schedule; None stands for the end.

        Args:
            share: the schedule.
            position: where it is.
            model: the model, with the masks of the choice before.
            statistics: what the criterion reads beside weights.
            before: what went before and must not come back; a choice of nothing where weights may come back.
        """

    def scores_of_weights(self, statistics: Statistics | None) -> Mapping[str, Tensor]:
        """Return the score of every single weight by name of the parameter; empty where weights have none."""
        return {}

    @abstractmethod
    def nearest(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose what stays at the final ratio if the sum of squares of what goes is to be least.

        Args:
            squares: sums of squares, of groups by name of shape (width,); of single weights by canonical name of the
                parameter.

        Returns:
            Bool tensors of the same names and shapes, True = stays.
        """

    @abstractmethod
    def restore(self, kept: Mapping[str, Indices], masks: Mapping[str, Tensor], asked: float) -> Choice:
        """Make a choice of what was saved of it: the units that stay, and the masks of single weights."""

    def partly(self, toward: Choice, masks: Mapping[str, Tensor], before: Choice) -> Choice:
        """Make the choice of masks that lie on the way from one choice to another."""
        return self.restore(before.kept, masks, toward.asked)

    @abstractmethod
    def plan(self, choice: Choice, said: Mapping[str, Any]) -> PruningPlan | None:
        """Plan what can be removed; None if that is to be read off the zeros of the model."""

    def allocation(self, plan: PruningPlan, latency: LatencyComparison | None) -> LatencyAllocation | None:
        """Return how the widths for a target of latency were found; None without one.

        Args:
            plan: the plan of the result.
            latency: its time, as it was measured.
        """
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what is asked for as plain data."""


def ratio_at(share: Schedule | None, position: int, final: float) -> float:
    """Return the ratio at a position of a schedule; the final one without a schedule, which stands for the end."""
    return final if share is None else share.ratio(position, final)


def least_at(share: Schedule | None, position: int, final: float) -> float:
    """Return the least share at a position; one below the initial ratio of a schedule is asked for at once."""
    return final if share is None else min(final, share.ratio(position, max(final, share.initial)))


def nothing_gone(goal: Goal) -> Choice:
    """The choice before the first event."""
    return goal.restore({}, {}, 0.0)
