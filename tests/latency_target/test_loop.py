"""The closed loop on a device of a known law that its table does not tell the truth about."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchshear
from tests.latency_target.pretending import DENSE, Pretended, PretendedModel, pretend, share_of
from tests.speedup.latency.making_tables import ALIGNMENT, Joined, joined, probes_of, table_of_probes
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.errors import ArgumentError, NotFasterError, PlanError
from torchshear.latency_target import _planner as planner
from torchshear.latency_target._budgets import budget_of
from torchshear.latency_target._record import LatencyRound
from torchshear.pruners.allocation._problem import Levels
from torchshear.pruners.allocation._solve import Solution
from torchshear.pruners.criteria._criterion import find_criterion
from torchshear.speedup.latency import Device
from torchshear.speedup.latency._comparison import LatencyComparison, LatencyResult
from torchshear.speedup.latency._kernels import Profile
from torchshear.speedup.latency._probes import WidthProbe
from torchshear.speedup.latency._table import make_table


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    return pretend(monkeypatch)


def prune(**options: Any) -> torchshear.PruneResult:
    model, args, _ = joined()
    return torchshear.prune(model, args, **({"align": ALIGNMENT, "target_latency": 0.6} | options))


@pytest.mark.parametrize("power", [1.0, 0.8, 1.3, 2.0])
@pytest.mark.parametrize("target", [0.7, 0.5])
def test_the_target_is_met_closely_though_the_table_is_wrong(power: float, target: float) -> None:
    Pretended.power = power
    result = prune(target_latency=target)
    found = result.allocation
    assert found is not None
    assert result.latency is not None
    assert found.round.measured_share == pytest.approx(share_of(found.widths, power))
    assert 0.95 * target <= 1 / result.latency.speedup("pruned") <= target
    assert 1 <= len(found.rounds) <= 5
    assert found.gap <= 0.001 + 1e-9
    assert found.realised_share == pytest.approx(found.macs_share / found.round.measured_share)
    assert {group.name: len(group.kept) for group in result.plan.groups} == dict(found.widths)
    assert all(width % 4 == 0 for width in found.widths.values())
    assert result.plan.request["target_latency"] == target
    assert result.plan.request["device"] == dict(Device().identity())
    assert result.verification is not None
    assert result.verification.max_error < 1e-9


def test_no_other_widths_lose_less_within_the_budget() -> None:
    """All combinations of widths, one after another, by the criterion's own scores."""
    result = prune(target_latency=0.6)
    assert result.allocation is not None
    groups, (one,) = result.plan.analysis, result.allocation.rounds
    scores = {g.name: np.sort(find_criterion("l1")(g, weights_of(groups), None).numpy()) for g in groups}

    def loss(widths: Mapping[str, int]) -> float:
        kept = {
            name: scores[name][len(scores[name]) - width :].sum() / scores[name].sum() for name, width in widths.items()
        }
        return float(-np.log(list(kept.values())).sum())

    choices = np.stack(np.meshgrid(*(np.arange(4, width + 1, 4) for width in DENSE.values())), -1).reshape(-1, 4)
    vectors = [dict(zip(DENSE, choice.tolist(), strict=True)) for choice in choices]
    best = min(loss(widths) for widths in vectors if share_of(widths) <= 0.6 * planner._AIM)
    assert one.loss == pytest.approx(loss(one.widths), rel=1e-6)
    assert best <= one.loss <= best / (1 - 0.0011)
    assert one.bound <= best + 1e-9


def weights_of(groups: Any) -> dict[str, torch.Tensor]:
    return {name: entry.tensor for name, entry in groups.graph.state.items()}


def test_milliseconds_are_a_share_of_what_the_dense_model_takes() -> None:
    result = prune(target_latency="1.8 ms")
    assert result.allocation is not None
    assert result.allocation.target_share == pytest.approx(0.6)
    assert result.allocation.measured_ms <= 1.8
    assert "target      0.600 of 3.000 ms" in str(result.allocation)
    assert result.allocation.to_dict()["measured_ms"] == result.allocation.measured_ms


def test_rounds_say_how_far_their_times_can_be_trusted() -> None:
    result = prune()
    assert result.allocation is not None
    assert result.allocation.round.uncertainty == 0
    Pretended.spread = 0.4
    result = prune(must_be_faster=False)
    assert result.allocation is not None
    error = 0.2 / 1.2 * np.sqrt(8 / 7) / np.sqrt(8)  # of eight speed-ups that are in turn as usual and 40 % above it
    assert result.allocation.round.uncertainty == pytest.approx(error)
    assert f"±{error:.1%}" in str(result.allocation)


def round_at(share: float, uncertainty: float = 0.0, loss: float = 1.0) -> LatencyRound:
    return LatencyRound({}, loss, loss, 0.0, share, share, uncertainty)


def test_what_may_be_above_its_target_if_it_is_measured_again_is_not_close() -> None:
    assert planner._is_close(round_at(0.499), 0.5)
    assert not planner._is_close(round_at(0.499, 0.004), 0.5)
    assert planner._is_close(round_at(0.497, 0.004), 0.5)
    assert planner._is_close(round_at(0.493, 0.2), 0.5)  # as certain as it will get
    assert not planner._is_close(round_at(0.4855, 0.004), 0.5)
    assert planner._choose([round_at(0.499, 0.01, 1.0), round_at(0.493, 0.01, 2.0)], 0.5) == 1
    assert planner._choose([round_at(0.3, 0.0, 3.0), round_at(0.499, 0.01, 1.0)], 0.5) == 1
    assert planner._choose([round_at(0.499, 0.01, 1.0), round_at(0.486, 0.01, 2.0)], 0.5) == 1
    assert planner._choose([round_at(0.3, 0.01, 1.0), round_at(0.2, 0.01, 2.0), round_at(0.6)], 0.5) == 0
    assert planner._choose([round_at(0.6), round_at(0.55)], 0.5) == 1


def test_the_next_budget_is_the_last_one_scaled_or_where_a_line_gives_the_wanted_share() -> None:
    none_met, none_missed = (0.0, 0.0), (float("inf"), 0.0)
    assert planner._next_budget((0.4, 0.3), (0.6, 0.5), 0.38, 0.5) == pytest.approx(0.48)
    assert planner._next_budget((0.4, 0.3), (0.6, 0.5), 0.301, 0.5) == pytest.approx(0.44)
    assert planner._next_budget((0.4, 0.3), none_missed, 0.38, 0.5) == 0.5
    assert planner._next_budget((0.4, 0.3), none_missed, 0.38, 0.0) == pytest.approx(0.408)
    assert planner._next_budget(none_met, (0.6, 0.5), 0.38, 0.5) == 0.5
    assert planner._next_budget(none_met, (0.6, 0.5), 0.38, 0.0) == pytest.approx(0.588)


def test_after_a_time_just_below_the_target_the_budget_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held for too uncertain to end the rounds with, though it met the target."""
    shares = iter([0.598, 0.59])

    def measure_round(measured: Any, ranked: Any, found: Solution) -> LatencyRound:
        predicted = measured.table.predict_ms(found.widths) / measured.table.dense_ms
        return LatencyRound(found.widths, found.loss, found.bound, 0.0, predicted, next(shares), 0.005)

    monkeypatch.setattr(planner, "_measure_round", measure_round)
    result = prune(target_latency=0.6)
    assert result.allocation is not None
    first, second = result.allocation.rounds
    assert second.predicted_share < first.predicted_share
    assert result.allocation.chosen == 1


def test_what_cannot_be_reached_is_said_before_anything_is_shrunk() -> None:
    least = share_of(dict.fromkeys(DENSE, 4))
    with pytest.raises(PlanError, match=rf"the fastest possible is {least:.3g}, {least * 3:.4g} ms, with 4 groups"):
        prune(target_latency=least * 0.9, criterion=never_called)
    assert Pretended.measured == 0
    with pytest.raises(PlanError, match="with 1 groups that may shrink"):
        prune(target_latency=0.3, exclude=["stem", "left", "right"])


def never_called(group: Any, weights: Any, statistics: Any) -> torch.Tensor:
    raise AssertionError("scored before the target was checked")


@pytest.mark.parametrize("block", [1, 4, 16, 64])  # of the last two a block holds whole groups
def test_a_target_of_all_of_the_time_is_reached_whatever_a_noisy_table_says(block: int) -> None:
    """Times of kernels that are off by factors, whole runs likewise, and kernels of less than a microsecond."""
    rng, (_, _, groups) = np.random.default_rng(block), joined()
    probes = []
    for probe in probes_of(groups):
        factors = np.exp(rng.normal(0, 1.5, len(probe.profile.kernels)))
        ms = [round(0.1 * one.ms * factor, 3) for one, factor in zip(probe.profile.kernels, factors, strict=True)]
        kernels = tuple(replace(one, ms=time) for one, time in zip(probe.profile.kernels, ms, strict=True))
        share, dense_ms, reference_ms = np.exp(rng.normal(0, 0.5, 3)).tolist()
        probes.append(WidthProbe(probe.widths, share, dense_ms, Profile(kernels, 0.01), reference_ms))
    identity = dict(Device().identity()) | {"inputs": ["float32[3, 8, 8]"]}
    table = make_table(groups, probes, Device(), identity, ("small", block))
    assert prune(device=table, target_latency=1.0, must_be_faster=False).allocation is not None


def test_other_budgets_hold_beside_it() -> None:
    alone, both = prune(), prune(target_params=0.4)
    assert both.report.after.n_params <= 0.4 * both.report.before.n_params < alone.report.after.n_params
    assert both.allocation is not None
    assert both.allocation.round.measured_share <= 0.6


def test_limits_hold() -> None:
    result = prune(target_latency=0.8, exclude="right", min_ratio={"left": 0.5}, min_width=12)
    widths = {group.name: len(group.kept) for group in result.plan.groups}
    assert widths["right.weight[0]"] == 16
    assert widths["left.weight[0]"] <= 16
    assert min(widths.values()) >= 12


def test_a_result_that_is_not_faster_is_refused_unless_that_is_accepted() -> None:
    Pretended.power = -0.1
    with pytest.raises(NotFasterError, match=r"not measurably faster: its speed-up over the dense one is 0.9"):
        prune(target_latency=0.5)
    result = prune(target_latency=0.5, must_be_faster=False)
    assert result.latency is not None
    assert not result.latency.is_faster("pruned")
    with pytest.raises(NotFasterError, match="align='auto'"):
        prune(target_latency=None, ratio=0.5, must_be_faster=True)


def test_a_target_that_is_missed_is_said() -> None:
    Pretended.power = 0.2
    result = prune(target_latency=0.5, must_be_faster=False)
    assert result.allocation is not None
    assert any(note.startswith("The target was missed:") for note in result.allocation.notes)
    assert "The target was missed" in str(result.allocation)


def test_a_result_that_is_slower_than_its_candidate_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = Pretended.compare

    def slower_at_the_end(self: Pretended, model: PretendedModel, rounds: int = 5) -> LatencyComparison:
        found = compare(self, model, rounds)
        if model.name != "pruned":
            return found
        times = tuple(1.1 * time for time in found["pruned"].times_ms)
        return LatencyComparison({**found.results, "pruned": LatencyResult("pruned", None, times)}, "dense")

    monkeypatch.setattr(Pretended, "compare", slower_at_the_end)
    result = prune()
    assert result.allocation is not None
    assert result.allocation.round.measured_share <= 0.6
    assert any(note.startswith("The target was missed: 0.6") for note in result.allocation.notes)


def test_a_table_stands_for_its_device() -> None:
    _, _, groups = joined()
    identity = dict(Device().identity()) | {"inputs": ["float32[3, 8, 8]"]}
    assert prune(device=table_of_probes(groups, probes_of(groups), identity)).allocation is not None
    with pytest.raises(ArgumentError, match="of another device"):
        prune(device=table_of_probes(groups, probes_of(groups), identity | {"cpu": "another"}))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_latency": -0.5}, r"target_latency=-0.5; expected a share .* in \(0, 1\], as 0.5, or milliseconds"),
        ({"target_latency": 3.5}, "milliseconds with their unit, as '3.5ms'"),
        ({"target_latency": 0}, "target_latency=0;"),
        ({"target_latency": "fast"}, "target_latency='fast'"),
        ({"target_latency": "-1ms"}, "target_latency='-1ms'"),
        ({"target_latency": "nan"}, "target_latency='nan'"),
        ({"target_latency": True}, "target_latency=True"),
        ({"target_latency": "3ms"}, "the dense model takes 3 ms here already"),
        ({"ratio": 0.5}, "ratio=0.5 beside target_latency=0.6"),
        ({"scope": "global"}, "scope='global' beside target_latency=0.6"),
        ({"device": "cpu"}, "device='cpu'; expected a torchshear.speedup.latency.Device"),
        ({"must_be_faster": "yes"}, "must_be_faster"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        prune(**options)


class Itself(nn.Module):
    """A layer whose outputs are added to its inputs, so that the width of one group counts twice in its work."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x).relu()
        return self.head((h + self.inner(h)).mean((2, 3)))


@pytest.mark.parametrize("model", [Joined(), Itself()], ids=["joined", "itself"])
def test_tables_of_budgets_are_the_polynomial_at_every_choice(model: nn.Module) -> None:
    groups = torchshear.analyze(torchshear.trace(model.eval(), (torch.randn(1, 3, 8, 8),)))
    forms = WidthCost(groups).forms()
    levels = [Levels(group.name, (group.width, group.width // 4), (0.0, 1.0)) for group in groups[:2]]

    def share(number: int, width: int) -> float:
        return float(width / groups[number].width)

    for name, form in forms.items():
        budget = budget_of(name, 1.0, form, groups, levels, share)
        for choice in product(range(2), repeat=len(levels)):
            chosen = {one.name: one.widths[level] for one, level in zip(levels, choice, strict=True)}
            cost = WidthCost(groups)(np.array([chosen.get(group.name, group.width) for group in groups]))
            assert budget.cost(levels, choice) == pytest.approx(getattr(cost, name), abs=1)
