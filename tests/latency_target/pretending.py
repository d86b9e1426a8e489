"""A device of a known law that measures nothing."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

import torchshear
from tests.speedup.latency.making_tables import probes_of, table_of_probes, total_ms
from torchshear.latency_target import _planner as planner
from torchshear.speedup.latency._compare import LatencyComparison, LatencyResult

LAYERS = ("stem", "left", "right", "mix")
DENSE = {"stem.weight[0]": 24, "left.weight[0]": 32, "right.weight[0]": 16, "mix.weight[0]": 40}


class Pretended:
    """A device whose times are those of the law, to a power, with a spread; it exports nothing."""

    power, spread, measured = 1.0, 0.0, 0

    def __init__(self, model: nn.Module, *_: Any) -> None:
        self.dense, self.widths = Path("dense"), {"dense": self._of_model(model)}

    def _of_model(self, model: nn.Module) -> dict[str, int]:
        return {f"{name}.weight[0]": len(model.get_parameter(f"{name}.weight")) for name in LAYERS}

    def export(self, model: nn.Module, name: str) -> Path:
        self.widths[name] = self._of_model(model)
        return Path(name)

    def export_plan(self, plan: torchshear.PruningPlan, name: str) -> Path:
        type(self).measured += 1
        self.widths[name] = {group.name: len(group.kept) for group in plan.groups}
        return Path(name)

    def ms(self, path: Path) -> float:
        return 3.0 * ((total_ms(self.widths[path.name]) + 0.1) / (total_ms(DENSE) + 0.1)) ** self.power

    def compare(self, path: Path, rounds: int = 5) -> LatencyComparison:
        return self.compare_files({"pruned": path}, rounds)

    def compare_files(self, paths: Mapping[str, Path], rounds: int) -> LatencyComparison:
        noise = 1 + self.spread * np.linspace(-1, 1, 5)
        all_paths = {"dense": self.dense, **paths}
        times = {name: tuple((self.ms(path) * noise).tolist()) for name, path in all_paths.items()}
        return LatencyComparison({n: LatencyResult(n, all_paths[n], t) for n, t in times.items()}, "dense")

    def profile(self, path: Path) -> SimpleNamespace:
        return SimpleNamespace(total_ms=self.ms(path) / 2)


def share_of(widths: Mapping[str, int], power: float = 1.0) -> float:
    return float(((total_ms(DENSE | dict(widths)) + 0.1) / (total_ms(DENSE) + 0.1)) ** power)


def pretend(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    """Let the device stand for this machine, with a true table."""
    monkeypatch.setattr(planner, "Candidates", Pretended)
    monkeypatch.setattr(planner, "table_of", lambda model, groups, *_, **__: table_of_probes(groups, probes_of(groups)))
    for name, value in {"power": 1.0, "spread": 0.0, "measured": 0}.items():
        monkeypatch.setattr(Pretended, name, value)
    return Pretended
