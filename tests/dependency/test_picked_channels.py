"""Channels picked by a mask or in pairs: the model is right, and what stays whole says why in plain words."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.models import randomise
from tests.oracle import assert_equals_masked

MASK = torch.arange(12) % 3 == 0
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
        """Four numbers."""
        return self.two(self.pick(self, self.one(self.first(x).relu())).tanh())


BY_VALUES = "how many positions there are depends on values, as of a mask: "


@pytest.mark.parametrize(
    ("pick", "n_picked", "reason"),
    [
        (lambda m, h: h[:, m.mask], 4, BY_VALUES),
        (lambda m, h: h[..., [True, False] * 6], 6, BY_VALUES),
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
