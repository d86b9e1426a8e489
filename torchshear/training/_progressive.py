"""Blocks that go little by little: between two events single weights of theirs go, the least first."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """Stages in which weights go, from the masks before an event to those that it asks for.

    Attributes:
        goes: name of a parameter -> stage of each weight, 1 to 4, uint8; 0 where nothing goes.
        start: position of the event.
        length: positions from one stage to the next.
    """

    goes: Mapping[str, Tensor]
    start: int
    length: int

    @classmethod
    def of(
        cls,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        start: int,
        frequency: int,
    ) -> "Stages":
        """Share out what goes at an event: of all n weights floor(n i / 4) are gone at stage i, the lowest first.

        Args:
            before: masks before the event; those missing are whole.
            after: masks that the event asks for.
            scores: name of a parameter -> score of each weight; parameters without any go at the last stage.
            start: position of the event.
            frequency: positions from one event to the next.
        """
        new = {name: ~mask & before.get(name, torch.ones_like(mask)) for name, mask in after.items()}
        goes = {name: one.to(torch.uint8) * N_STAGES for name, one in new.items()}
        ranked = [name for name in new if name in scores]
        if ranked:
            values = torch.cat([scores[name].detach().cpu().double()[new[name]] for name in ranked])
            place = torch.empty(len(values), dtype=torch.long)
            place[values.argsort(stable=True)] = torch.arange(len(values))
            bounds = torch.tensor([len(values) * stage // N_STAGES for stage in range(1, N_STAGES)])
            stages = (torch.bucketize(place, bounds, right=True) + 1).to(torch.uint8)
            sizes = [int(new[name].sum()) for name in ranked]
            for name, part in zip(ranked, torch.split(stages, sizes), strict=True):
                goes[name][new[name]] = part
        return cls(goes, start, frequency // N_STAGES)

    def stage_at(self, position: int) -> int:
        """Return the stage at a position: 1 at the event itself, 4 when all has gone."""
        return min(N_STAGES, 1 + (position - self.start) // self.length)

    def masks(self, after: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """Return the masks at a stage."""
        return {name: mask | (self.goes[name] > stage) for name, mask in after.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and numbers."""
        return {"goes": dict(self.goes), "start": self.start, "length": self.length}


def check_progressive(pattern: str | None, schedule: Schedule) -> None:
    """Raise ArgumentError where blocks cannot go little by little.

    Raises:
        ArgumentError: units are channels, heads, single weights or small blocks; or the schedule has no room for four
            stages between its events.
    """
    parsed = None if pattern in (None, HEADS, "lock") else parse_pattern(pattern)
    size = 0 if parsed is None else _LEAST_WEIGHTS
    if isinstance(parsed, Blocks):
        size = parsed.rows * parsed.columns
    elif isinstance(parsed, OfConsecutive):
        size = parsed.pruned
    if size < _LEAST_WEIGHTS:
        raise ArgumentError(
            f"progressive=True lets blocks go little by little, and pattern={pattern!r} has none of at least "
            f"{_LEAST_WEIGHTS} weights; expected a pattern as '4x1', '4:8' or 'channelx1'."
        )
    if schedule.by != "step" or schedule.frequency < N_STAGES or not schedule.n_steps:
        raise ArgumentError(
            f"progressive=True goes in {N_STAGES} stages between two events; expected a schedule by steps with several "
            f"events and a frequency of at least {N_STAGES}, not {schedule!r}."
        )
