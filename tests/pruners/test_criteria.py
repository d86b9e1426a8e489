"""Criteria: every registered one against a naive loop, under permutation, and on bad weights."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Attention, Grouped, Residual, Tied, image, randomise
from torchshear.calibration import Statistics
from torchshear.calibration._statistics import ALL_SUMS
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.groups._purposes import OWN_PURPOSES
from torchshear.errors import ArgumentError, WeightError
from torchshear.pruners import criterion, plan_from_kept, random_criterion
from torchshear.pruners.criteria import _criterion as _registry
from torchshear.pruners.criteria import _fpgm
from torchshear.pruners.criteria._criterion import find_criterion, needs_of
from torchshear.pruners.criteria._weight_sums import unit_sums

MODELS = {
    "residual": (Residual, lambda: image()),
    "grouped": (Grouped, lambda: image()),
    "attention": (Attention, lambda: torch.randn(2, 5, 24)),
    "tied": (Tied, lambda: torch.zeros(2, 3, dtype=torch.long)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.PReLU(6), nn.Conv2d(6, 2, 1)),
        lambda: image(),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose2d(6, 6, 2, groups=2), nn.Conv2d(6, 2, 1)),
        lambda: image(),
    ),
}


def analysed(name: str, seed: int = 0) -> ChannelGroups:
    build, example = MODELS[name]
    return torchshear.analyze(torchshear.trace(randomise(build(), seed).eval(), (example(),)))


def weights_of(groups: ChannelGroups) -> dict[str, torch.Tensor]:
    return {name: entry.tensor for name, entry in groups.graph.state.items() if entry.kind == "parameter"}


def naive_norms(groups: ChannelGroups, group: ChannelGroup, power: int) -> np.ndarray:
    """What removing one unit deletes from each weight, found by removing it and looking at the mask."""
    roles: dict[str, set[str]] = {}
    for member in group.members:
        roles.setdefault(member.name, set()).update(member.purposes)
    sums = np.zeros(group.width)
    for unit in range(group.width):
        for name, weight in weights_of(groups).items():
            if roles.get(name, set()) & OWN_PURPOSES:
                gone = deleted(groups, group, unit, name)
                sums[unit] += float((weight.detach().double().abs() ** power * gone).sum())
    return sums


def deleted(groups: ChannelGroups, group: ChannelGroup, unit: int, name: str) -> torch.Tensor:
    """Values of a weight that lie, along a dimension that the unit owns, at the unit's positions."""
    weight = groups.graph.state[name].tensor
    gone = torch.zeros(weight.shape, dtype=torch.bool)
    for member in group.members:
        if member.name != name or not member.purposes & OWN_PURPOSES:
            continue
        for position, of in zip(member.positions.tolist(), member.units.tolist(), strict=True):
            if of == unit and member.n_blocks == 0:
                gone.select(member.dim, position).fill_(True)
            elif of == unit:
                rows = weight.shape[0] // member.n_blocks
                block, inside = divmod(position, weight.shape[member.dim])
                gone[block * rows : (block + 1) * rows].select(member.dim, inside).fill_(True)
    return gone


# Criterion -> what it makes of the sums of the powers of what each unit's removal deletes.
NAIVE: dict[str, tuple[int, Callable[[np.ndarray], Any]]] = {
    "l1": (1, lambda sums: sums),
    "l2": (2, np.sqrt),
    "lamp": (2, lambda sums: [one / sums[sums >= one].sum() for one in sums]),
}


@pytest.mark.parametrize("word", NAIVE)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_made_of_what_is_deleted(word: str, name: str) -> None:
    (power, expected), groups = NAIVE[word], analysed(name)
    for group in groups:
        scores = find_criterion(word)(group, weights_of(groups), None)
        np.testing.assert_allclose(scores.detach(), expected(naive_norms(groups, group, power)), rtol=1e-6)


OF_WEIGHTS = ["fpgm", "l1", "l2", "lamp"]  # others look at data, or at some groups only: test_data_criteria.py


@pytest.mark.parametrize("word", OF_WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(word: str, value: float) -> None:
    groups = analysed("residual")
    weights = {name: tensor.detach().clone() for name, tensor in weights_of(groups).items()}
    weights["two.weight"][1, 2] = value
    with pytest.raises(WeightError, match="'two.weight' holds 9 values that are NaN or infinite"):
        find_criterion(word)(groups["stem.weight[0]"], weights, None)


@pytest.mark.parametrize("word", [*OF_WEIGHTS, "random"])
def test_scores_in_bfloat16_rank_like_float32(word: str) -> None:
    groups = analysed("residual")
    halves = {name: tensor.detach().bfloat16() for name, tensor in weights_of(groups).items()}
    for group in groups:
        exact = find_criterion(word)(group, weights_of(groups), None)
        torch.testing.assert_close(find_criterion(word)(group, halves, None), exact, rtol=1e-2, atol=0)


def test_weights_on_meta_have_no_scores() -> None:
    with torch.device("meta"):
        model = Residual()
    groups = torchshear.analyze(torchshear.trace(model, (torch.empty(2, 3, 8, 8, device="meta"),)))
    with pytest.raises(WeightError, match="on the meta device"):
        torchshear.plan(groups)
    assert plan_from_kept(groups, {"one.weight[0]": [0, 1]}).n_cut == 14


def test_missing_weights_are_named() -> None:
    with pytest.raises(WeightError, match="no weight of group 'stem.weight.0.' was given"):
        unit_sums(analysed("residual")[0], {}, lambda weight: weight.abs())


def test_a_large_weight_is_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = analysed("residual")
    whole = find_criterion("l1")(groups[0], weights_of(groups), None)
    monkeypatch.setattr("torchshear.pruners.criteria._weight_sums._PIECE", 7)
    torch.testing.assert_close(find_criterion("l1")(groups[0], weights_of(groups), None), whole)


def test_unknown_and_double_names() -> None:
    with pytest.raises(ArgumentError, match=r"criterion='l11'; .*, l1, l2, .*'l1'\?"):
        find_criterion("l11")
    with pytest.raises(ArgumentError, match="criterion 'l1' is registered already, as l1_scores"):
        criterion("l1")(find_criterion("l1"))
    assert "l1" in _registry._CRITERIA


@pytest.mark.parametrize("group_reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_scores_of_any_real_type_count(dtype: torch.dtype, group_reduction: str) -> None:
    def first_half(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
        return (torch.arange(group.width) < group.width // 2).to(dtype)

    plan = torchshear.plan(analysed("residual"), criterion=first_half, group_reduction=group_reduction)
    assert plan.kept["stem.weight[0]"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda n: None, "gave NoneType"),
        (lambda n: torch.zeros(1), r"shape \(1,\)"),
        (lambda n: [1.0] * n, "gave list"),
        (lambda n: np.ones(n), "gave ndarray"),
        (lambda n: torch.ones(n, device="meta"), "on meta"),
        (lambda n: torch.ones(n) + 1j, "torch.complex64 numbers"),
        (lambda n: torch.ones(n).to_sparse(), "torch.sparse_coo"),
        (lambda n: torch.full((n,), torch.nan), "NaN or infinite"),
    ],
)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_what_is_no_scores_is_refused(made: Callable[[int], Any], said: str, scope: str) -> None:
    with pytest.raises(ArgumentError, match=f"{said}.*'stem.weight.0.'.*expected .* 8 "):
        torchshear.plan(analysed("residual"), criterion=lambda group, w, s: made(group.width), scope=scope)


def test_random_scores_need_no_weights_and_follow_seed_and_name() -> None:
    with torch.device("meta"):
        model = Residual()
    groups = torchshear.analyze(torchshear.trace(model, (torch.empty(2, 3, 8, 8, device="meta"),)))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    plan = torchshear.plan(groups, criterion="random")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert plan == torchshear.plan(groups, criterion=random_criterion(0))
    assert plan != torchshear.plan(groups, criterion=random_criterion(1))
    assert plan.request["criterion"] == "random"
    assert torchshear.plan(groups, criterion=random_criterion(1)).request["criterion"] == "random(seed=1)"
    scores = [find_criterion("random")(group, {}, None) for group in groups]
    assert all(((score >= 0) & (score < 1)).all() and score.unique().numel() == len(score) for score in scores)
    assert not torch.equal(scores[0], scores[1][: len(scores[0])])
    with pytest.raises(ArgumentError, match="seed=1.5; expected an integer"):
        random_criterion(1.5)  # type: ignore[arg-type]


def test_lamp_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 5, bias=False), nn.ReLU(), nn.Linear(5, 1))
    model[0].weight.data.copy_(torch.tensor([[2.0], [0.0], [1.0], [-2.0], [3.0]]))
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(2, 1),)))
    # squares 4, 0, 1, 4, 9 go in the order 0, 1, the later 4, the earlier 4, 9
    found = find_criterion("lamp")(groups[0], weights_of(groups), None)
    np.testing.assert_allclose(found, [4 / 13, 0, 1 / 18, 4 / 17, 1], rtol=1e-12)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights_of(groups).items()}
    assert find_criterion("lamp")(groups[0], zeros, None).tolist() == [0] * 5


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_fpgm_keeps_small_distances(
    monkeypatch: pytest.MonkeyPatch, precision: str, offset: float, spread: float
) -> None:
    monkeypatch.setattr(_fpgm, "_ROWS", 16)
    monkeypatch.setattr(_fpgm, "_PIECE", 64)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    generator = torch.Generator().manual_seed(3)
    filters = offset + torch.randn(53, 40, generator=generator)
    filters[20:30] = filters[3] + spread * torch.randn(10, 40, generator=generator)  # a cluster, in several blocks
    filters[40] = filters[41]
    filters[44:48] = 0
    wide = filters.double()
    pairs = torch.tensor([[float((a - b).norm()) for b in wide] for a in wide], dtype=torch.float64)
    torch.testing.assert_close(_fpgm._distances(filters), pairs.sum(1), rtol=1e-6, atol=0)
    rows = torch.tensor([3, *range(20, 30), 40, 41])
    cluster = filters[rows]
    expected = pairs[rows][:, rows].sum(1)
    torch.testing.assert_close(_fpgm._distances(cluster), expected, rtol=1e-5, atol=0)


def test_needs_are_declared_at_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_CRITERIA", dict(_registry._CRITERIA))
    monkeypatch.setattr(_registry, "_NEEDS", dict(_registry._NEEDS))
    criterion("mine")(lambda group, weights, statistics: torch.zeros(group.width))
    assert needs_of("mine") == ALL_SUMS
    assert needs_of(lambda group, weights, statistics: torch.zeros(1)) == ALL_SUMS
    assert needs_of("l1") == frozenset()
    assert needs_of(find_criterion("apoz")) == {"zeros"}
    with pytest.raises(
        ArgumentError, match=r"needs=\['zeroes'\] of criterion 'typo'; expected some of gates, gradient"
    ):
        criterion("typo", needs=("zeroes",))  # type: ignore[arg-type]
