"""Models that keep tensors of earlier runs in dictionaries."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import randomise
from torchshear.dependency.plans._form import FormKind
from torchshear.speedup import shrink_to_form


class Remembering(nn.Module):
    """Attention with a bias that is picked from a table once, and kept until the model is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qk, self.v, self.out = nn.Linear(8, 32), nn.Linear(8, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(4, 9))
        self.index: Tensor
        self.register_buffer("index", torch.arange(25).reshape(5, 5) % 9)
        self.known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Remembering":
        self.known = {}
        return super().train(mode)

    def bias(self) -> Tensor:
        if self.training:
            return self.table[:, self.index]
        if "cpu" not in self.known:
            self.known["cpu"] = self.table[:, self.index] * 0.3
        return self.known["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = self.qk(x).view(b, n, self.heads, -1).transpose(1, 2).chunk(2, -1)
        v = self.v(x).view(b, n, self.heads, -1).transpose(1, 2)
        weights = (q @ k.transpose(-2, -1) + self.bias()).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("form", ["native", "traced"])
def test_what_a_model_computed_before_is_computed_again(form: FormKind) -> None:
    model, x = randomise(Remembering()).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model(x)
    kept = model.known["cpu"]
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.form == "native", result.report.form
    assert model.known["cpu"] is kept
    small = shrink_to_form(model, result.plan, form=form).model.eval()
    with torch.no_grad():
        before = small(x)
        small.train()
        small.get_parameter("table").add_(torch.randn(2, 9))
        assert not torch.allclose(small.eval()(x), before)


def test_tensors_that_a_forward_needs_are_no_cache() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)
            self.shifts = {"in": torch.ones(3)}

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(torch.relu(self.one(x + self.shifts["in"])))
            return out

    model, x = randomise(Given()).eval(), torch.randn(2, 3)
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.form == "native"
    assert torch.equal(result.model.shifts["in"], torch.ones(3))


class Lazy(nn.Module):
    """Builds a table of positions, and weights merged from two, when it is first called, and keeps both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)
        self.merged: Tensor | None = None
        self.steps = torch.zeros(2)  # assigned by a method, and no cache

    def reset(self) -> None:
        self.steps = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[1] != x.shape[1]:
            self.table = torch.arange(x.shape[1]).float()[None, :]
        if self.merged is None:
            self.merged = (self.one.weight + self.two.weight).detach()
        out: Tensor = self.out(((x + self.table) @ self.merged.T + self.steps.sum()).relu())
        return out


def test_a_model_that_ran_is_the_network_of_a_fresh_one(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    graphs = []
    for ran in (False, True):
        model = randomise(Lazy()).eval()
        if ran:
            model(x)
            kept = model.table, model.merged
        graphs.append(torchshear.trace(model, (x,)))
    assert (model.table, model.merged) == kept
    assert graphs[0].fingerprint == graphs[1].fingerprint
    result = torchshear.prune(model, (x,), ratio=0.5)
    result.plan.save(tmp_path / "plan.json")
    small = torchshear.shrink(randomise(Lazy(), 5).eval(), torchshear.PruningPlan.load(tmp_path / "plan.json"))
    small.load_state_dict(result.model.state_dict())
    assert torch.equal(small(x), result.model(x))
    assert result.model.merged.shape == (4, 4)
    assert torch.equal(small.steps, model.steps)
