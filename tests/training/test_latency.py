"""Targets of latency while a model trains, on a pretended device and on this machine."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.latency_target.pretending import DENSE, Pretended, pretend, share_of
from tests.speedup.latency.making_tables import ALIGNMENT, Joined, joined
from tests.training import loops
from torchshear import PruningSession, regularizers, schedules
from torchshear.dependency.plans._cut import Cut
from torchshear.errors import ArgumentError, PlanError
from torchshear.speedup.latency import Device, measure_table
from torchshear.training import _latency_goal
from torchshear.training._goals import nothing_gone
from torchshear.training._masked_model import MaskedModel


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    monkeypatch.setattr(_latency_goal, "Candidates", Pretended)
    return pretend(monkeypatch)


def train(
    session: PruningSession, n_steps: int, first: int = 0, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Train on noise; two steps an epoch."""

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 4, (4,), generator=generator)

    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.01) if optimizer is None else optimizer
    loops.train(session, lambda x: session.model(x), optimizer, batch, n_steps, 2, first, adds_penalty=True)


def session_of(**options: Any) -> PruningSession:
    model, args, _ = joined()
    words = {"schedule": schedules.AGP(end=8, frequency=2), "target_latency": 0.5, "align": ALIGNMENT} | options
    return PruningSession(model.train(), args, **words)


@pytest.mark.parametrize("power", [1.0, 0.8])
@pytest.mark.parametrize("options", [{}, {"criterion": "taylor"}, {"soft": True}], ids=["l1", "taylor", "soft"])
def test_the_target_is_met_in_the_end_and_time_falls_on_the_way(
    power: float, options: dict[str, Any], pretended: type[Pretended]
) -> None:
    pretended.power = power
    if "criterion" in options:
        options = options | {"schedule": schedules.AGP(start=2, end=8, frequency=2)}
    session = session_of(**options)
    train(session, 10)
    result = session.finish()
    assert result.latency is not None
    assert result.allocation is not None
    assert 0.95 * 0.5 <= 1 / result.latency.speedup("pruned") <= 0.5
    widths = {group.name: len(group.kept) for group in result.plan.groups}
    assert 0.95 * 0.5 <= share_of(widths, power) <= 0.5
    assert all(width % 4 == 0 for width in widths.values())
    assert result.verification is not None
    assert result.verification.max_error < 1e-9
    assert session.history.unit == "latency"
    times = [share_of(one.widths) for one in result.history.renewals]
    assert times == sorted(times, reverse=True)
    assert times[0] > 0.6 > times[-1]
    for one in result.history.renewals:  # what is reached is told by the table, which is true here
        assert one.reached == pytest.approx(1 - share_of(one.widths), abs=0.02)


def test_what_went_stays_gone_while_masks_are_hard(pretended: type[Pretended]) -> None:
    session = session_of()
    gone: dict[str, set[int]] = {}
    choose = _latency_goal.LatencyGoal.choose

    def watched(self: Any, *given: Any) -> Any:
        choice = choose(self, *given)
        for name, kept in choice.kept.items():
            now = set(range(DENSE[name])) - set(kept.tolist())
            assert gone.get(name, set()) <= now
            gone[name] = now
        return choice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_latency_goal.LatencyGoal, "choose", watched)
        train(session, 10)
    assert any(gone.values())


def test_the_model_shrinks_on_the_way_and_other_targets_hold(pretended: type[Pretended]) -> None:
    model, args, _ = joined()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    words: dict[str, Any] = {"schedule": schedules.AGP(end=4, frequency=2), "align": ALIGNMENT}
    session = PruningSession(
        model, args, target_latency=0.6, target_params=0.3, shrink_every=1, optimizer=optimizer, **words
    )
    train(session, 8, optimizer=optimizer)
    n_params = sum(one.numel() for one in session.model.parameters())
    result = session.finish()
    assert (
        n_params
        == sum(one.numel() for one in result.model.parameters())
        <= 0.3 * sum(one.numel() for one in Joined().parameters())
    )
    assert result.allocation is not None
    assert result.allocation.round.measured_share <= 0.6


def test_other_targets_hold_at_events_behind_the_end(pretended: type[Pretended]) -> None:
    goal = session_of(target_params=0.15, soft=True)._renewer.goal
    assert isinstance(goal, _latency_goal.LatencyGoal)
    schedule, model = schedules.AGP(end=8, frequency=2), MaskedModel(Joined(), goal.groups, goal.names, False)
    most = 0.15 * goal.dense["target_params"]
    left = {}
    for position in (2, 8, 10, None):
        share = None if position is None else schedule
        choice = goal.choose(share, position or 0, model, None, nothing_gone(goal))
        left[position] = Cut(goal.groups, choice.kept).cost().n_params
    assert left[2] > most >= max(left[8], left[10], left[None])
    squares = {group.name: torch.rand(group.width, dtype=torch.float64) for group in goal.groups.prunable}
    kept = {name: stays.nonzero().squeeze(1).numpy() for name, stays in goal.nearest(squares).items()}
    assert Cut(goal.groups, kept).cost().n_params <= most


def test_admm_projects_to_the_widths_of_the_table(pretended: type[Pretended]) -> None:
    session = session_of(schedule=schedules.OneShot(6), regularizer=regularizers.ADMM(0.1))
    train(session, 8)
    result = session.finish()
    assert result.latency is not None
    assert 1 / result.latency.speedup("pruned") <= 0.5


def test_a_training_that_ends_early_says_so_and_is_measured(pretended: type[Pretended]) -> None:
    session = session_of()
    train(session, 4)
    result = session.finish()
    assert "target not reached" in str(result.history)
    assert result.allocation is None
    assert result.latency is not None


def test_a_session_goes_on_where_another_stopped(pretended: type[Pretended]) -> None:
    whole = session_of()
    train(whole, 10)
    first = session_of()
    train(first, 4)
    second = session_of()
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, 10, first=4)
    assert dict(whole.finish().plan.kept).keys() == dict(second.finish().plan.kept).keys()
    for name, units in whole.finish().plan.kept.items():
        assert units.tolist() == second.finish().plan.kept[name].tolist()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_latency": 0.01}, "the fastest possible is"),
        ({"target_latency": "0ms"}, "target_latency"),
        ({"target_latency": 1.5}, "target_latency"),
        ({"ratio": 0.5}, "ratio"),
        ({"pattern": "2:4", "align": None}, "target_latency= goes with channels"),
        ({"config": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], "align": None}, "target_latency= says it too"),
        ({"device": "cpu"}, "expected a torchshear.speedup.latency.Device"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], match: str, pretended: type[Pretended]) -> None:
    with pytest.raises((ArgumentError, PlanError), match=match):
        session_of(**options)


def test_a_device_measures_the_result_of_any_request(pretended: type[Pretended]) -> None:
    model, args, _ = joined()
    session = PruningSession(model, args, ratio=0.5, device=Device(), schedule=schedules.OneShot(2))
    train(session, 4)
    result = session.finish()
    assert result.latency is not None
    assert result.report.speed is not None
    assert result.report.speed.is_faster


@pytest.mark.zoo
def test_it_works_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path))
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 4))
    x = torch.randn(1, 3, 24, 24)
    table = measure_table(model, x, probes=4, progress=False)
    session = PruningSession(model, x, target_latency=0.5, device=table, schedule=schedules.OneShot(2))
    train(session, 4)
    result = session.finish()
    assert result.allocation is not None
    assert result.allocation.target_share == 0.5
    assert result.report.after.macs < 0.7 * result.report.before.macs
    assert result.verification is not None
    assert result.verification.max_error < 1e-9
