"""Blocks that go little by little: between two events single weights of theirs go, the least first."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from torchshear.errors import ArgumentError
from torchshear.pruners.masks._patterns import HEADS, Blocks, OfConsecutive, parse_pattern
from torchshear.pruners.schedules import Schedule

N_STAGES: Final = 4
_LEAST_WEIGHTS: Final = 4  # of a block


@dataclass(frozen=True, slots=True)
class Pace:
    """Pace at which the weights of a parameter go.

    Attributes:
        pool: name that parameters share whose weights are ranked together.
        length: positions from one stage to the next.
    """

    pool: str
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """Stages in which weights go, from the masks before an event to those that it asks for.

    Attributes:
        goes: name of a parameter -> stage of each weight, 1 to 4, uint8; 0 where nothing goes.
        start: name -> position of the event.
        length: name -> positions from one stage to the next; 0 for a parameter that goes at once.
    """

    goes: Mapping[str, Tensor]
    start: Mapping[str, int]
    length: Mapping[str, int]

    @classmethod
    def of(
        cls,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        start: int,
        paces: Mapping[str, Pace],
    ) -> "Stages":
        """Share out what goes at an event: of n weights of a pool floor(n i / 4) are gone at stage i, lowest first.

        Args:
            before: masks before the event; those missing are whole.
            after: masks that the event asks for.
            scores: name of a parameter -> score of each weight; parameters without any go at the last stage.
            start: position of the event.
            paces: name of a parameter -> its pace; those not named go at once.
        """
        new = {name: ~mask & before.get(name, torch.ones_like(mask)) for name, mask in after.items()}
        goes = {name: one.to(torch.uint8) * N_STAGES for name, one in new.items()}
        length = {name: paces[name].length if name in paces and bool(one.any()) else 0 for name, one in new.items()}
        pools: dict[str, list[str]] = defaultdict(list)
        for name in new:
            if length[name] and name in scores:
                pools[paces[name].pool].append(name)
        for ranked in pools.values():
            values = torch.cat([scores[name].detach().cpu().double()[new[name]] for name in ranked])
            place = torch.empty(len(values), dtype=torch.long)
            place[values.argsort(stable=True)] = torch.arange(len(values))
            bounds = torch.tensor([len(values) * stage // N_STAGES for stage in range(1, N_STAGES)])
            stages = (torch.bucketize(place, bounds, right=True) + 1).to(torch.uint8)
            sizes = [int(new[name].sum()) for name in ranked]
            for name, part in zip(ranked, torch.split(stages, sizes), strict=True):
                goes[name][new[name]] = part
        return cls(goes, dict.fromkeys(new, start), length)

    def keeping(self, earlier: "Stages", names: frozenset[str]) -> "Stages":
        """Return the same with the stages that some parameters have had since an earlier event."""

        def joined(own: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
            return {name: others[name] if name in names else value for name, value in own.items()}

        return Stages(
            joined(self.goes, earlier.goes), joined(self.start, earlier.start), joined(self.length, earlier.length)
        )

    def at(self, position: int) -> dict[str, int]:
        """Return the stage of each parameter at a position: 1 at the event itself, 4 when all has gone."""
        return {
            name: min(N_STAGES, 1 + (position - self.start[name]) // length) if length else N_STAGES
            for name, length in self.length.items()
        }

    def last(self) -> dict[str, int]:
        """Return the stages at which all has gone."""
        return dict.fromkeys(self.goes, N_STAGES)

    def masks(self, after: Mapping[str, Tensor], stages: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the masks at some stages."""
        return {name: mask | (self.goes[name] > stages[name]) for name, mask in after.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and numbers."""
        return {"goes": dict(self.goes), "start": dict(self.start), "length": dict(self.length)}


def check_progressive(pattern: str | None, schedule: Schedule) -> None:
    """Raise ArgumentError where blocks cannot go little by little.

    Raises:
        ArgumentError: units are heads, single weights or small blocks, or no weights at all; or the schedule has no
            room for four stages between its events.
    """
    if block_size(pattern) < _LEAST_WEIGHTS:
        raise ArgumentError(
            f"progressive=True lets blocks go little by little, and pattern={pattern!r} has none of at least "
            f"{_LEAST_WEIGHTS} weights; expected a pattern as '4x1', '4:8' or 'channelx1'."
        )
    if not has_stages(schedule):
        raise ArgumentError(
            f"progressive=True goes in {N_STAGES} stages between two events; expected a schedule by steps with several "
            f"events and a frequency of at least {N_STAGES}, not {schedule!r}."
        )


def block_size(pattern: str | None) -> int:
    """Return how many weights of a block can go one after another; 0 where that is not for blocks of a pattern."""
    parsed = None if pattern in (None, HEADS, "lock") else parse_pattern(pattern)
    if isinstance(parsed, Blocks):
        return parsed.rows * parsed.columns
    if isinstance(parsed, OfConsecutive):
        return parsed.pruned
    return 0 if parsed is None else _LEAST_WEIGHTS


def has_stages(schedule: Schedule) -> bool:
    """Return whether a schedule has room for all stages between two events."""
    return schedule.by == "step" and schedule.frequency >= N_STAGES and bool(schedule.n_steps)
