"""Code that looks at values: masks that say where to assign, and layers that are dropped at random."""

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import analyzed
from torchshear.errors import CaptureError
from torchshear.speedup import shrink_to_form


class Masking(nn.Module):
    """Puts one learned row where a mask says so, and a number where another does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)
        self.row = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.up(x).clone()
        y[mask] = self.row
        y[mask.flip(1)] = 0.5
        return self.down(y)


class Dropping(nn.Module):
    """In train mode, leaves out a layer at random and overwrites places at random with a row that only then is read."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.row = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.training:
            y = y.clone()
            y[torch.rand(y.shape[:2]) < 0.3] = self.row
        if not (self.training and torch.rand([]) < 0.5):
            y = y + self.middle(y)
        return self.down(y)


MASK = torch.tensor([[True, False, False, True], [False, False, True, False]])


def test_an_assignment_where_a_mask_says_so_is_captured_and_pruned() -> None:
    model, x = Masking().eval(), torch.randn(2, 4, 6)
    result = torchshear.prune(model, (x, MASK), ratio=0.5)
    assert (result.model.up.out_features, result.model.row.shape) == (8, (8,))
    assert result.form == "native"
    assert result.verification.max_error < 1e-12


def test_what_an_assignment_writes_is_what_the_model_writes() -> None:
    model, x = Masking().eval(), torch.randn(2, 4, 6)
    traced = shrink_to_form(model, torchshear.plan(analyzed(model, x, MASK), ratio=0.0), form="traced").model
    other = torch.rand(2, 4) < 0.5
    torch.testing.assert_close(traced(x, other), model(x, other))


def test_a_row_that_only_training_reads_shrinks_though_layers_are_dropped_at_random() -> None:
    model, x = Dropping().eval(), torch.randn(2, 4, 6)
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.model.row.shape == (8,)
    assert result.form == "native"
    small = result.model.train()
    for _ in range(8):  # with and without the layer
        small(x).square().mean().backward()
    assert small.row.grad is not None


def test_a_graph_of_assumed_branches_is_not_trained_with() -> None:
    model, x = Dropping().eval(), torch.randn(2, 4, 6)
    plan = torchshear.plan(analyzed(model, x), ratio=0.5)
    traced = shrink_to_form(model, plan, form="traced").model
    assert traced(x).shape == (2, 4, 3)
    with pytest.raises(CaptureError, match="no graph for train mode"):
        traced.train()(x)
