"""Channels picked by a mask or in pairs: the model is right, and what stays whole says why in plain words."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import randomise
from tests.oracle import assert_equals_masked, assert_same_function, check_random_pruning, masked_copy
from tests.strategies import kept_sets
from torchshear.errors import PlanError
from torchshear.pruners import plan_from_kept

MASK = torch.arange(12) % 3 == 0
OTHERS = ~MASK
PAIRS = torch.triu_indices(12, 12, 1)


class Picking(nn.Module):
    """Two layers before a call that picks some of twelve channels, and one that reads them."""

    def __init__(self, pick: Callable[["Picking", Tensor], Tensor], n_picked: int) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(n_picked, 4)
        self.pick = pick
        self.register_buffer("mask", MASK.clone())
        self.register_buffer("pairs", PAIRS.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.pick(self, self.one(self.first(x).relu())).tanh())


BY_VALUES = "how many positions there are depends on values, as of a mask: "


@pytest.mark.parametrize(
    ("pick", "n_picked", "reason"),
    [
        (lambda m, h: h[:, (h > 9).any(0) | m.mask], 4, BY_VALUES),
        (lambda m, h: h[:, torch.where(m.mask)[0]], 4, BY_VALUES),
        (lambda m, h: h.index_select(1, m.mask.nonzero().flatten()), 4, BY_VALUES),
        (lambda m, h: h.masked_select(m.mask).view(-1, 4), 4, "counted or searched as a whole: "),
        (lambda m, h: h[:, m.pairs[0]] * h[:, m.pairs[1]], 66, "picked by an index that is computed or shared: "),
        (lambda m, h: h[:, m.pairs].prod(1), 66, "picked by an index tensor: "),
        (lambda m, h: (h[:, :, None] * h[:, None])[:, m.pairs[0], m.pairs[1]], 66, "picked by an index tensor: "),
    ],
)
def test_channels_that_cannot_be_followed_stay_and_say_why(
    pick: Callable[[Picking, Tensor], Tensor], n_picked: int, reason: str
) -> None:
    model, x = randomise(Picking(pick, n_picked).double()).eval(), torch.randn(3, 6, dtype=torch.float64)
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.model.first.out_features == 4
    assert_equals_masked(model, result.model, result.plan, (x,))
    assert any(why.startswith(reason) for why in result.plan.refused.values())
    assert not any("Error" in why or "does not fit" in why for why in result.plan.refused.values())


@pytest.mark.parametrize(
    ("pick", "n_picked", "form"),
    [
        (lambda m, h: h[:, m.mask], 4, "native"),
        (lambda m, h: h[..., m.mask] * h[:, m.mask].sigmoid(), 4, "native"),
        (lambda m, h: torch.cat([h[:, m.mask], h[:, OTHERS]], 1), 12, "traced"),
        (lambda m, h: h.T[[True, False] * 6].T, 6, "traced"),
    ],
)
def test_channels_picked_by_a_mask_of_the_model_are_cut(
    pick: Callable[[Picking, Tensor], Tensor], n_picked: int, form: str
) -> None:
    model, x = randomise(Picking(pick, n_picked).double()).eval(), torch.randn(3, 6, dtype=torch.float64)
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.form == form
    assert result.model.get_parameter("one.weight").shape == (6, 4)
    numbers = {name: mask for name, mask in result.plan.masks().items() if name != "mask"}
    assert_same_function(masked_copy(model, numbers), result.model, (x,))
    assert result.model(torch.cat([x, x])).shape == (6, 4)
    check_random_pruning(model, (x,), None, 0, is_cross_channel=True)


def test_a_mask_is_cut_with_its_channels_and_belongs_to_the_plan() -> None:
    model, x = randomise(Picking(lambda m, h: h[:, m.mask], 4).double()).eval(), torch.randn(3, 6, dtype=torch.float64)
    result = torchshear.prune(model, (x,), ratio=0.5)
    kept = result.plan.masks()["one.bias"]
    assert torch.equal(result.model.mask, MASK[kept])
    assert torch.equal(result.plan.masks()["two.weight"].any(0), kept[MASK])
    other = Picking(lambda m, h: h[:, m.mask], 4).double().eval()
    other.mask.copy_(torch.arange(12) % 3 == 1)
    with pytest.raises(PlanError, match="'mask' holds other values"):
        torchshear.shrink(other, result.plan, (x,))


class Pairing(nn.Module):
    """Channels multiplied in pairs that two buffers name, one for each side."""

    def __init__(self, pick: Callable[["Pairing", Tensor], Tensor], pairs: Tensor) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(pairs.shape[1], 4)
        self.pick = pick
        self.register_buffer("rows", pairs[0])
        self.register_buffer("columns", pairs[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.pick(self, self.one(self.first(x).relu())).tanh())


def paired(pick: Callable[[Pairing, Tensor], Tensor], pairs: Tensor) -> tuple[Pairing, Tensor]:
    return randomise(Pairing(pick, pairs).double()).eval(), torch.randn(3, 6, dtype=torch.float64)


def assert_random_cuts_are_exact(model: Pairing, x: Tensor) -> None:
    """As `check_random_pruning`, but for the buffers of positions, which are counted anew."""
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    for seed in range(3):
        plan = plan_from_kept(groups, kept_sets(groups, seed))
        small = torchshear.shrink(model, plan, (x,))
        assert_equals_masked(model, small, plan, (x,))


RING = torch.stack([torch.arange(12), torch.arange(12).roll(1)])
NO_NEIGHBOURS = torch.tensor([(i, j) for i in range(12) for j in range(i) if 1 < i - j < 11]).T
PICKS = {
    "two picks": lambda m, h: h[:, m.rows] * h[:, m.columns],
    "after more": lambda m, h: h[..., m.rows].sigmoid() - h.index_select(-1, m.columns).relu() * 2,
    "one pick": lambda m, h: (h[:, :, None] * h[:, None].sigmoid())[:, m.rows, m.columns],
}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", PICKS)
def test_pairs_go_with_either_of_their_channels(name: str, offset: int) -> None:
    model, x = paired(PICKS[name], torch.triu_indices(12, 12, offset))
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.form == "native"
    assert result.model.one.out_features == 6
    assert torch.equal(torch.stack([result.model.rows, result.model.columns]), torch.triu_indices(6, 6, offset))
    kept = result.plan.masks()["one.bias"]
    assert torch.equal(result.plan.masks()["two.weight"].any(0), kept[model.rows] & kept[model.columns])
    assert_random_cuts_are_exact(model, x)


@pytest.mark.parametrize(
    ("pairs", "least"),
    [
        (torch.triu_indices(12, 12, 1), 2),  # whichever two stay are a pair
        (torch.triu_indices(12, 12), 1),
        (NO_NEIGHBOURS, 6),  # of five channels all ten pairs may be missing: twelve are
        (RING, 7),  # every other one would leave nothing
    ],
)
def test_of_pairs_one_stays(pairs: Tensor, least: int) -> None:
    model, x = paired(PICKS["two picks"], pairs)
    result = torchshear.prune(model, (x,), ratio=0.99)
    assert result.model.one.out_features == least
    assert result.model.two.in_features > 0
    assert_equals_masked(model, result.model, result.plan, (x,))


def test_pairs_without_a_channel_in_common_stay_tied() -> None:
    model, x = paired(PICKS["two picks"], torch.arange(12).view(6, 2).T)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    assert [group.width for group in groups] == [8, 6]
    assert_random_cuts_are_exact(model, x)


def test_picks_that_do_not_meet_lose_what_they_pick_alone() -> None:
    model, x = paired(lambda m, h: torch.cat([h[:, m.rows], h[:, m.columns]], 1), RING)
    model.two = nn.Linear(24, 4).double()
    result = torchshear.prune(model, (x,), ratio=0.5)
    masks = result.plan.masks()
    assert torch.equal(masks["two.weight"].any(0), masks["one.bias"][torch.cat([model.rows, model.columns])])
    assert_equals_masked(model, result.model, result.plan, (x,))


def test_one_buffer_for_both_sides_is_not_renumbered_twice() -> None:
    model, x = paired(lambda m, h: (h[:, :, None] * h[:, None])[:, m.rows, m.rows], torch.arange(12).repeat(2, 1))
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert any(why.startswith("picked by an index tensor: ") for why in result.plan.refused.values())
    assert_equals_masked(model, result.model, result.plan, (x,))


def test_other_pairs_belong_to_another_plan() -> None:
    model, x = paired(PICKS["two picks"], torch.triu_indices(12, 12, 1))
    result = torchshear.prune(model, (x,), ratio=0.5)
    other, _ = paired(PICKS["two picks"], torch.triu_indices(12, 12, 1).flip(0))
    with pytest.raises(PlanError, match="'(rows|columns)' holds other values"):
        torchshear.shrink(other, result.plan, (x,))
