"""Retrain-free Fisher scores and the exchange of units: against the definition, by hand, in every scope."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.calibration._statistics import Statistics
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners import criterion
from torchshear.pruners.criteria import _criterion as _registry
from torchshear.pruners.criteria._retrain_free import exchange_units


class Net(nn.Module):
    """Two layers that share their units by a sum, a grouped one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 3, padding=1)
        self.three = nn.Conv2d(10, 12, 3, groups=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, gates: tuple[Tensor, Tensor] | None = None) -> Tensor:
        first, second = (1.0, 1.0) if gates is None else (gates[0][:, None, None], gates[1][:, None, None])
        x = torch.tanh(self.one(x) * first)
        x = torch.tanh(x + self.two(x) * first)
        return self.head(torch.tanh(self.three(x) * second).mean((2, 3)))


NAMES = ("one.weight[0]", "three.weight[0]")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().double().eval()


@pytest.fixture(scope="module")
def seen(net: nn.Module) -> tuple[ChannelGroups, Statistics]:
    groups = torchshear.analyze(torchshear.trace(net, (torch.zeros(2, 3, 6, 6).double(),)))
    return groups, torchshear.collect(groups, data(), functional.cross_entropy, 7, criteria="retrain_free")


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 6, 6, generator=generator).double(), torch.randint(0, 5, (4,), generator=generator))
        for _ in range(7)
    ]


def autograd_gates(net: nn.Module) -> dict[str, np.ndarray]:
    """Gradients by gates that are multiplied in, one a unit and batch; shape (C, B)."""
    columns = []
    for x, target in data():
        gates = tuple(torch.ones(width, dtype=torch.float64, requires_grad=True) for width in (10, 12))
        columns.append(torch.autograd.grad(functional.cross_entropy(net(x, gates), target), gates))
    return {name: np.stack([column[i].numpy() for column in columns], 1) for i, name in enumerate(NAMES)}


def naive(gates: np.ndarray, gone: list[int], blocks: list[int]) -> list[int]:
    """The units that stay, each sum worked out anew."""

    def norm(units: list[int]) -> float:
        return sum(sum(float(gates[i, b]) for i in units) ** 2 for b in range(gates.shape[1]))

    scores = [norm([unit]) for unit in range(len(gates))]
    gone = list(gone)
    left = sorted(set(range(len(gates))) - set(gone), key=lambda unit: (scores[unit], -unit))
    for unit in left:
        trial = [*gone, unit]
        choices = [unit, *(j for j in gone if blocks[j] == blocks[unit])]
        out = min(choices, key=lambda j: norm([i for i in trial if i != j]))
        gone = [i for i in trial if i != out]
    return sorted(set(range(len(gates))) - set(gone))


@pytest.mark.parametrize("seed", range(12))
def test_exchange_is_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    width, n_batches, n_blocks = 12, int(random.integers(1, 6)), int(random.choice([1, 3]))
    gates = random.standard_normal((width, n_batches))
    blocks = np.arange(width) % n_blocks
    per_block = int(random.integers(1, 4))
    scores = np.square(gates).sum(1)
    order = [units[np.argsort(scores[units])] for units in (np.flatnonzero(blocks == b) for b in range(n_blocks))]
    gone = np.concatenate([units[:per_block] for units in order])
    kept = np.setdiff1d(np.arange(width), gone)
    found = exchange_units(gates, kept, blocks)
    assert found.tolist() == naive(gates, gone.tolist(), blocks.tolist())
    assert np.bincount(blocks[found]).tolist() == np.bincount(blocks[kept]).tolist()
    left = np.setdiff1d(np.arange(width), found)
    assert np.square(gates[left].sum(0)).sum() <= np.square(gates[gone].sum(0)).sum()


def test_units_that_cancel_out_go_together() -> None:
    # 0 and 1 have the lowest scores and add up to 3; with 2 in place of 0 it is -0.1. Nothing cancels 3.
    gates = np.array([[1.0], [2.0], [-2.1], [5.0]])
    assert exchange_units(gates, np.array([2, 3]), np.zeros(4, np.int64)).tolist() == [0, 3]
    # In blocks of two, 0 and 3 add up to 6; 1 in place of 0 makes that 7, and 2 in place of 3 makes it -1.1.
    assert exchange_units(gates, np.array([1, 2]), np.array([0, 0, 1, 1])).tolist() == [1, 3]
    assert exchange_units(gates, np.array([0, 1, 2, 3]), np.zeros(4, np.int64)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "request_",
    [{"ratio": 0.5}, {"ratio": 0.5, "scope": "global"}, {"ratio": 0.5, "scope": "isomorphic"}, {"target_params": 0.5}],
    ids=["local", "global", "isomorphic", "budget"],
)
def test_every_scope_exchanges_units(
    net: nn.Module, seen: tuple[ChannelGroups, Statistics], request_: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, statistics = seen
    plan = torchshear.plan(groups, "retrain_free", statistics=statistics, **request_)
    monkeypatch.setattr(_registry, "_REARRANGEMENTS", {})
    by_scores = torchshear.plan(groups, "retrain_free", statistics=statistics, **request_)
    gates = autograd_gates(net)
    assert plan.kept.keys() == by_scores.kept.keys()
    for name, kept in by_scores.kept.items():
        gone = sorted(set(range(len(gates[name]))) - set(kept.tolist()))
        blocks = [0] * len(gates[name]) if groups[name].balance is None else groups[name].balance.tolist()
        assert plan.kept[name].tolist() == naive(gates[name], gone, blocks)
    assert plan != by_scores
    small = torchshear.shrink(net, plan)
    assert torchshear.verify(net, small, plan, (data()[0][0],)).max_error < 1e-9


@pytest.mark.parametrize(
    ("group", "rearranged", "message"),
    [
        *(
            ("one.weight[0]", lambda kept, given=given: np.array(given), r"'one.weight\[0\]' to \[0.*expected 6")
            for given in ([0], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 10], [0.0, 1, 2, 3, 4, 5])
        ),
        ("three.weight[0]", lambda kept: np.arange(len(kept)), "of each block as many"),
    ],
)
def test_other_units_than_as_many_of_each_block_are_refused(
    seen: tuple[ChannelGroups, Statistics],
    group: str,
    rearranged: Callable,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for table in ("_CRITERIA", "_NEEDS", "_REARRANGEMENTS"):
        monkeypatch.setattr(_registry, table, dict(getattr(_registry, table)))

    @criterion("mine", needs=(), rearrange=lambda group, kept, statistics: rearranged(kept))
    def scores(group: object, weights: object, statistics: object) -> Tensor:
        return torch.arange(group.width)

    with pytest.raises(ArgumentError, match=message):
        torchshear.plan(seen[0], "mine", ratio={group: 0.5})
