"""Channels as what a session asks for: units of groups, by a ratio or a target."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import ALL_SUMS, Sum
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.pruners import Ratio
from torchshear.pruners._planning import check_request, plan_units
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.pruners.schedules import Schedule
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._targets import choose_targets
from torchshear.pruners.selection._widths import NothingToRemoveError
from torchshear.training._goals import Choice, Goal, Indices, least_at, ratio_at
from torchshear.training._masked_model import MaskedModel


def _scaled(share: Schedule | None, position: int, final: Ratio) -> Ratio:
    if isinstance(final, Mapping):
        return {key: ratio_at(share, position, float(ratio)) for key, ratio in final.items()}
    return ratio_at(share, position, float(final))


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGoal(Goal):
    """Units of channel groups, by a ratio or a target of MACs or parameters.

    Attributes:
        groups: the channel groups of the model.
        request: what is asked for in the end.
        is_soft: whether criteria see the dense weights below the masks.
        whole: name of a group that stays whole -> why.
        dense: MACs and parameters before.
    """

    groups: ChannelGroups
    request: Request
    is_soft: bool
    asked_of: Mapping[str, float] = field(init=False)
    whole: Mapping[str, str] = field(init=False)
    dense: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        """Find the groups that may shrink, and refuse what cannot be reached."""
        request = self.request
        check_request(self.groups, request)
        targets = choose_targets(self.groups, request.shares, request.roles, request.exclude)
        cost = dense_cost(self.groups.graph)
        shares = {g.name: targets[g.name].ratio for g in self.groups.prunable}
        object.__setattr__(self, "asked_of", {name: ratio for name, ratio in shares.items() if ratio})
        object.__setattr__(
            self, "whole", {name: f"stays whole: {one.reason}" for name, one in targets.items() if one.reason}
        )
        object.__setattr__(self, "dense", {"target_macs": cost.macs, "target_params": cost.n_params})

    @property
    def unit(self) -> str:
        """MACs, parameters or channels, by what is asked for."""
        if self.request.target_macs is not None:
            return "MACs"
        return "parameters" if self.request.target_params is not None else "channels"

    @property
    def target(self) -> float:
        """Share that goes in the end."""
        return self._share(None, 0)

    @property
    def needs(self) -> frozenset[Sum]:
        """Sums that the criterion declares; none of one that declares nothing."""
        needs = needs_of(self.request.criterion)
        return frozenset() if needs == ALL_SUMS else needs

    @property
    def shrinking(self) -> tuple[ChannelGroup, ...]:
        """The channel groups that may shrink."""
        return tuple(group for group in self.groups.prunable if group.name in self.asked_of)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters in which their units lie."""
        state = self.groups.graph.state
        found = [member.name for group in self.shrinking for member in group.members]
        return tuple(dict.fromkeys(name for name in found if state[name].kind == "parameter"))

    def _removed(self, name: str) -> float | None:
        """Share of the dense model's MACs or parameters that a target takes."""
        target = getattr(self.request, name)
        return None if target is None else 1 - (target if target <= 1 else min(1.0, target / self.dense[name]))

    def _share(self, share: Schedule | None, position: int) -> float:
        """Share that is asked for at a position, in `unit`."""
        if self.request.has_budget:
            removed = self._removed("target_macs")
            removed = self._removed("target_params") if removed is None else removed
            return 0.0 if removed is None else ratio_at(share, position, removed)
        total = sum(group.width for group in self.shrinking)
        return sum(g.width * ratio_at(share, position, self.asked_of[g.name]) for g in self.shrinking) / max(1, total)

    def at(self, share: Schedule | None, position: int) -> Request | None:
        """Return the request that holds at a position of a schedule; None if nothing is to go there."""
        request = self.request
        if not self._share(share, position):
            return None
        least = request.min_ratio
        changed: dict[str, Any] = {
            "min_ratio": {key: least_at(share, position, one) for key, one in least.items()}
            if isinstance(least, Mapping)
            else least_at(share, position, least)
        }
        if request.has_budget:
            is_end = share is None or share.passed(position) >= share.n_to_final
            for name in ("target_macs", "target_params") if not is_end else ():
                removed = self._removed(name)
                changed[name] = None if removed is None else 1 - ratio_at(share, position, removed)
        else:
            changed["ratio"] = _scaled(share, position, request.shares)
        return replace(request, **changed)

    def choose(
        self, share: Schedule | None, position: int, model: MaskedModel, statistics: Statistics | None, before: Choice
    ) -> Choice:
        """Choose by the criterion; units that went before go first."""
        request, asked = self.at(share, position), self._share(share, position)
        gone = {name: np.setdiff1d(np.arange(self.groups[name].width), kept) for name, kept in before.kept.items()}
        gone = {name: units for name, units in gone.items() if units.size}
        kept: Mapping[str, Indices] = before.kept
        if request is not None:
            weights = model.weights(is_masked=not self.is_soft)
            try:
                kept = plan_units(self.groups, request, weights, statistics, gone=gone).kept
            except NothingToRemoveError:
                kept = before.kept
        return self._choice(kept, asked)

    def nearest(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the heaviest units of each group; widths are those of the request with these sums as scores."""

        def given(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
            return squares[group.name]

        kept = plan_units(self.groups, replace(self.request, criterion=given)).kept
        found = {name: torch.zeros(len(one), dtype=torch.bool) for name, one in squares.items()}
        for name, stays in found.items():
            stays[torch.from_numpy(np.array(kept.get(name, np.arange(len(stays)))))] = True
        return found

    def restore(self, kept: Mapping[str, Indices], masks: Mapping[str, Tensor], asked: float) -> Choice:
        """Make a choice of the units that stay."""
        return self._choice(kept, asked)

    def _choice(self, kept: Mapping[str, Indices], asked: float) -> Choice:
        """The choice of some units, those of groups that may shrink."""
        kept = {g.name: np.sort(np.asarray(kept.get(g.name, np.arange(g.width)), np.int64)) for g in self.shrinking}
        cut = Cut(self.groups, kept)
        masks = make_plan(cut, kept, {}, {}).masks()
        total = sum(group.width for group in self.shrinking)
        reached = 1 - sum(map(len, kept.values())) / max(1, total)
        if self.request.has_budget:
            left, cost = cut.cost(), self.dense
            name = "target_macs" if self.request.target_macs is not None else "target_params"
            reached = 1 - (left.macs if name == "target_macs" else left.n_params) / max(1, cost[name])
        return Choice(masks, kept, asked, reached, {name: len(units) for name, units in kept.items()})

    def plan(self, choice: Choice, said: Mapping[str, Any]) -> PruningPlan | None:
        """Plan the removal of the units that are gone."""
        kept = dict(choice.kept)
        request = self.request.to_json() | dict(said)
        return make_plan(Cut(self.groups, kept), kept, request, self.whole, self.asked_of)

    def describe(self) -> dict[str, Any]:
        """Return the request as plain data."""
        return self.request.to_json() | {"soft": self.is_soft}
