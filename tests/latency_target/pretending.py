"""A device of a known law that measures nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch import nn

import torchshear
from tests.speedup.latency.making_tables import probes_of, table_of_probes, total_ms
from torchshear.latency_target import _planner as planner
from torchshear.speedup.latency._comparison import LatencyComparison, LatencyResult

LAYERS = ("stem", "left", "right", "mix")
DENSE = {"stem.weight[0]": 24, "left.weight[0]": 32, "right.weight[0]": 16, "mix.weight[0]": 40}


class Pretended:
    """A device whose times are those of the law, to a power; it exports nothing.

    With a spread half of the rounds take the dense model longer by that share.
    """

    power, spread, measured = 1.0, 0.0, 0

    def __init__(self, model: nn.Module, *_: Any) -> None:
        self.dense = self.prepare(model, "dense")

    def _of_model(self, model: nn.Module) -> dict[str, int]:
        return {f"{name}.weight[0]": len(model.get_parameter(f"{name}.weight")) for name in LAYERS}

    def prepare(self, model: nn.Module, name: str) -> "PretendedModel":
        return PretendedModel(name, self._of_model(model), self.power)

    def prepare_plan(self, plan: torchshear.PruningPlan, name: str) -> "PretendedModel":
        type(self).measured += 1
        return PretendedModel(name, {group.name: len(group.kept) for group in plan.groups}, self.power)

    def compare(self, model: "PretendedModel", rounds: int = 5) -> LatencyComparison:
        return self.compare_all({"pruned": model}, rounds)

    def compare_all(self, models: Mapping[str, "PretendedModel"], rounds: int) -> LatencyComparison:
        times = {name: (one.ms,) * 8 for name, one in {"dense": self.dense, **models}.items()}
        times["dense"] = tuple((self.dense.ms * (1 + self.spread * np.tile([0, 1], 4))).tolist())
        return LatencyComparison({name: LatencyResult(name, None, found) for name, found in times.items()}, "dense")


@dataclass(frozen=True)
class PretendedModel:
    """A model of the pretended device."""

    name: str
    widths: Mapping[str, int]
    power: float

    @property
    def ms(self) -> float:
        return 3.0 * ((total_ms(self.widths) + 0.1) / (total_ms(DENSE) + 0.1)) ** self.power


def share_of(widths: Mapping[str, int], power: float = 1.0) -> float:
    return float(((total_ms(DENSE | dict(widths)) + 0.1) / (total_ms(DENSE) + 0.1)) ** power)


def pretend(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    """Let the device stand for this machine, with a true table."""
    monkeypatch.setattr(planner, "Candidates", Pretended)
    monkeypatch.setattr(planner, "table_of", lambda model, groups, *_, **__: table_of_probes(groups, probes_of(groups)))
    for name, value in {"power": 1.0, "spread": 0.0, "measured": 0}.items():
        monkeypatch.setattr(Pretended, name, value)
    return Pretended
