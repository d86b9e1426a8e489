"""UniPruning's selection against a plain rendering of its definition, its limits, and its mask file."""

import json
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.compat.unipruning.plain import STEP, Stages, n_params, reference
from tests.networks import Grouped, Net, image, randomise
from torchshear.compat.unipruning import plan_from_unipruning_mask, plan_unipruning, write_unipruning_mask
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners.criteria._criterion import find_criterion


def groups_of(model: nn.Module) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, (image(),)))


@pytest.fixture(scope="module")
def stages() -> tuple[nn.Module, ChannelGroups]:
    model = randomise(Stages())
    return model, groups_of(model)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("use_gamma", [True, False])
@pytest.mark.parametrize("floor", [1, 8])
def test_selection_is_the_definition(
    stages: tuple[nn.Module, ChannelGroups], share: float, use_gamma: bool, floor: int
) -> None:
    model, groups = stages
    plan = plan_unipruning(groups, share, STEP, floor, use_gamma)
    expected = reference(model, share, use_gamma, floor)
    assert {name: kept.tolist() for name, kept in plan.kept.items()} == expected
    assert plan.request["target_params"] == share


@pytest.mark.parametrize(("use_gamma", "kept"), [(True, [1, 3]), (False, [0, 2])])
def test_importance_is_the_norm_of_a_channel_times_its_scale(use_gamma: bool, kept: list[int]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    model[0].weight.data.copy_(torch.tensor([[3.0, 4], [0, 1], [6, 8], [2, 0]])[:, :, None, None])  # norms 5, 1, 10, 2
    model[1].weight.data.copy_(torch.tensor([0.1, -4, -0.2, 3]))  # with these 0.5, 4, 2, 6
    groups = torchshear.analyze(torchshear.trace(model.eval(), (torch.randn(2, 2, 4, 4),)))
    if use_gamma:
        weights = {name: entry.tensor for name, entry in groups.graph.state.items()}
        found = find_criterion("unipruning")(groups["0.weight[0]"], weights, None)
        np.testing.assert_allclose(found, [0.5, 4, 2, 6], rtol=1e-6)
    assert plan_unipruning(groups, 0.6, 2, 2, use_gamma).kept["0.weight[0]"].tolist() == kept


def test_a_run_that_weighs_nothing_goes_first() -> None:
    model = randomise(Stages())
    model.one.weight.data[3:7] = 0
    plan = plan_unipruning(groups_of(model), 0.99, STEP, 1)
    assert sorted(set(range(20)) - set(plan.kept["one.weight[0]"].tolist())) == [3, 4, 5, 6]


def test_widths_that_are_no_multiple_lose_the_rest_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 22, 1), nn.ReLU(), nn.Conv2d(22, 5, 1))
    plan = plan_unipruning(groups_of(randomise(model)), 0.95, 8, 8)
    assert [len(kept) for kept in plan.kept.values()] == [16]


@pytest.mark.parametrize(("width", "min_width", "left"), [(40, 32, 32), (128, 48, 64), (128, 32, 32)])
def test_a_layer_keeps_its_minimum_where_runs_do_not_divide_it(width: int, min_width: int, left: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 5, 1))
    groups = groups_of(randomise(model))
    share = (9 * left + 5) / (9 * width + 5)
    assert [len(kept) for kept in plan_unipruning(groups, share, 32, min_width).kept.values()] == [left]
    with pytest.raises(PlanError, match=f"run=32 and min_width={min_width}"):
        plan_unipruning(groups, share - 1e-3, 32, min_width)


def test_balanced_blocks_lose_equally_many() -> None:
    model = randomise(Grouped())
    plan = plan_unipruning(groups_of(model), 0.7, 6, 6)
    assert all(len(kept) in (6, 12) for kept in plan.kept.values())
    assert torchshear.shrink(model.eval(), plan)(image()).shape == model(image()).shape


def blocks() -> Net:
    """Two convolutions in two filter groups each, whose results are added."""
    return Net(
        lambda m, x: m.head(torch.relu(m.one(x) + m.two(x))),
        one=nn.Conv2d(4, 16, 3, padding=1, groups=2),
        two=nn.Conv2d(4, 16, 3, padding=1, groups=2),
        head=nn.Conv2d(16, 3, 1),
    )


def reference_of_blocks(model: nn.Module, n_runs: int) -> list[int]:
    """Runs of 4 of two layers in turn, of which each block of 8 has 2, of the channels that are left."""
    norms = [getattr(model, name).weight.detach().double().flatten(1).norm(dim=1).tolist() for name in ("one", "two")]
    left = list(range(16))
    for _ in range(n_runs):
        best: tuple[float, list[int]] = (-1.0, [])
        for own in norms:
            blocks = [sorted((c for c in left if c // 8 == block), key=lambda c: own[c]) for block in range(2)]
            first, last = ([c for block in blocks for c in block[part]] for part in (slice(0, 2), slice(-2, None)))
            ratio = median(own[c] for c in last) / (median(own[c] for c in first) + 1e-5)
            best = max(best, (ratio, first), key=lambda pair: pair[0])
        left = [c for c in left if c not in best[1]]
    return left


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_runs", [1, 2, 3])
def test_runs_of_coupled_layers_in_blocks_are_those_of_what_is_left(n_runs: int, seed: int) -> None:
    model = randomise(blocks(), seed).eval()
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(2, 4, 8, 8),)))
    dense, width = 2 * (2 * 9 + 1) * 16 + 3 * 16 + 3, 16 - 4 * n_runs
    share = (2 * (2 * 9 + 1) * width + 3 * width + 3) / dense
    plan = plan_unipruning(groups, share, 4, 4)
    assert plan.kept["one.weight[0]"].tolist() == reference_of_blocks(model, n_runs)


def test_a_target_out_of_reach_ends_with_the_best_that_is(stages: tuple[nn.Module, ChannelGroups]) -> None:
    _, groups = stages
    best = n_params(8, 8) / n_params(20, 24)
    with pytest.raises(PlanError, match=rf"target_params=0.05 .*run=4 and min_width=8: .*{best:.4f}"):
        plan_unipruning(groups, 0.05, STEP, 8)
    plan = plan_unipruning(groups, best + 1e-6, STEP, 8)
    assert sorted(len(kept) for kept in plan.kept.values()) == [8, 8]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target_params": 1.0}, "target_params=1.0: the dense model has"),
        ({"target_params": -0.5}, "target_params=-0.5; expected what may be left"),
        ({"target_params": 0.5, "run": 0}, "run must be a whole number of at least 1"),
        ({"target_params": 0.5, "min_width": 0}, "min_width=0; expected an integer"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    stages: tuple[nn.Module, ChannelGroups], asked: dict[str, float], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan_unipruning(stages[1], **asked)  # type: ignore[arg-type]


def test_masks_are_written_and_read(stages: tuple[nn.Module, ChannelGroups], tmp_path: Path) -> None:
    _, groups = stages
    plan = plan_unipruning(groups, 0.5, STEP, 8)
    write_unipruning_mask(plan, tmp_path / "mask.json")
    document = json.loads((tmp_path / "mask.json").read_text())
    about = document.pop("torchshear")
    assert about["fingerprint"] == plan.fingerprint
    assert about["shapes"]["two"] == [24, 20, 3, 3]
    assert document["two"] == document["three"] == sorted(set(range(24)) - set(plan.kept["two.weight[0]"].tolist()))
    assert plan_from_unipruning_mask(groups, tmp_path / "mask.json") == plan
    (tmp_path / "theirs.json").write_text(json.dumps({"three": document["three"][::-1], "one": document["one"]}))
    assert plan_from_unipruning_mask(groups, tmp_path / "theirs.json") == plan


class Recurrent(nn.Module):
    """A recurrent layer in both directions, whose weights have units of their own in one group."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.cells = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.table(x))[0])


def projections() -> Net:
    """Attention that keeps three projections in one module, whose rows are products of heads and their widths."""
    return Net(
        lambda m, x: m.last(m.attention(m.first(x), x, x, need_weights=False)[0]),
        first=nn.Linear(6, 16),
        attention=nn.MultiheadAttention(16, 4, batch_first=True, kdim=6, vdim=6),
        last=nn.Linear(16, 3),
    )


@pytest.mark.parametrize(
    ("model", "x", "names"),
    [
        (Recurrent(), torch.zeros(2, 3, dtype=torch.long), {"cells.weight_ih_l0", "cells.weight_hh_l0_reverse"}),
        (projections(), torch.randn(2, 5, 6), {"attention.q_proj_weight", "attention.v_proj_weight"}),
    ],
)
def test_masks_of_modules_with_several_weights(model: nn.Module, x: Tensor, names: set[str], tmp_path: Path) -> None:
    groups = torchshear.analyze(torchshear.trace(randomise(model).eval(), (x,)))
    plan = torchshear.plan(groups, ratio=0.5, exclude="table" if isinstance(model, Recurrent) else ())
    write_unipruning_mask(plan, tmp_path / "mask.json")
    assert names < json.loads((tmp_path / "mask.json").read_text()).keys()
    assert plan_from_unipruning_mask(groups, tmp_path / "mask.json") == plan


def test_what_no_layer_makes_is_not_left_out_of_a_mask(tmp_path: Path) -> None:
    groups = torchshear.analyze(torchshear.trace(Recurrent(), (torch.zeros(2, 3, dtype=torch.long),)))
    with pytest.raises(ArgumentError, match="'table.weight.1.' loses 3 units"):
        write_unipruning_mask(torchshear.plan(groups, ratio=0.5), tmp_path / "mask.json")
    assert not list(tmp_path.iterdir())


def test_a_norm_without_scale_has_no_gamma() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 4, 1))
    groups = torchshear.analyze(torchshear.trace(randomise(plain).eval(), (torch.randn(2, 3, 4, 4),)))
    plans = [plan_unipruning(groups, 0.6, 2, 2, use_gamma=use_gamma) for use_gamma in (True, False)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the mask"),
        ("[" * 100_000, "cannot read the mask"),
        ('{"one": [1], "one": [2]}', "the key 'one' stands twice"),
        ("[]", "holds list; expected an object"),
        ('{"won": [1]}', r"'won' is no layer whose channels can go.*Close to it: .*one"),
        ('{"one": [20]}', "different whole numbers below 20"),
        ('{"one": [1, 1]}', "different whole numbers below 20"),
        ('{"one": "all"}', "different whole numbers below 20"),
        ('{"two": [1], "three": [2]}', "'two' and 'three' are coupled and must lose the same channels"),
        ('{"torchshear": {"fingerprint": "abc"}, "one": [1]}', "is a mask of another network"),
    ],
)
def test_damaged_masks_are_refused(
    stages: tuple[nn.Module, ChannelGroups], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "mask.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        plan_from_unipruning_mask(stages[1], tmp_path / "mask.json")


def test_a_missing_mask_is_said(stages: tuple[nn.Module, ChannelGroups], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the mask .*none\.json"):
        plan_from_unipruning_mask(stages[1], tmp_path / "none.json")
    with pytest.raises(ArgumentError, match="the path of a mask is NoneType"):
        plan_from_unipruning_mask(stages[1], None)  # type: ignore[arg-type]
