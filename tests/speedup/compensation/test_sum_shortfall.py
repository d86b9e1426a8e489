"""Layers in front of a sum make up for what the other operand lacks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.pruners import plan_from_kept
from torchshear.speedup.compensation import _layer_fits
from torchshear.speedup.compensation._refit import refit
from torchshear.speedup.compensation._sum_shortfall import find_sum, shortfall


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "sum, turned": lambda a, b: b + a,
    "in place": lambda a, b: a.clone().add_(b, alpha=0.5),
    "difference": lambda a, b: a - b,
    "difference, turned": lambda a, b: torch.sub(b, a, alpha=2),
}


class Summed(nn.Module):
    """A layer, perhaps with a norm behind it, whose value is joined with another value."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], with_norm: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.join = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4) if with_norm else nn.Identity(), join

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.join(self.norm(self.layer(x)), other)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_the_sum_comes_out_as_it_was(name: str, with_norm: bool) -> None:
    model = Summed(SUMS[name], with_norm).double().eval()
    if with_norm:
        with torch.no_grad():
            model.norm.running_var.uniform_(0.5, 2)
            model.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0, 0.7]))
    x, other, less = noise(2, 3, 5, 5), noise(2, 4, 5, 5, seed=1), noise(2, 4, 5, 5, seed=2)
    graph = torchshear.trace(model, (x, other))
    (node,) = [node for node in graph if "conv" in node.name]
    found = find_sum(node)
    assert found is not None
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        made_up = model.layer(x) + shortfall(found, other, less, state)
        assert torch.allclose(model.join(model.norm(made_up), less), model(x, other))


class Branches(nn.Module):
    """A branch that is cut, and a wide one whose layer stands in front of the sum."""

    def __init__(self, with_norm: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 6)
        self.wide, self.last = nn.Linear(4, 80), nn.Linear(80, 6)
        self.norm = nn.BatchNorm1d(6) if with_norm else nn.Identity()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(self.up(x).relu())
        out: Tensor = self.head((first + self.norm(self.last(self.wide(x).relu()))).relu())
        return out


@pytest.mark.parametrize("with_norm", [False, True])
def test_one_branch_makes_up_for_the_other(with_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Branches(with_norm).double().eval()
    loader = [(noise(128, 4, seed=number),) for number in range(8)]
    groups = torchshear.analyze(torchshear.trace(model, loader[0][0][:2]))
    plan = plan_from_kept(groups, {next(group.name for group in groups if group.width == 12): [0, 1, 2]})
    small = torchshear.shrink(model, plan)
    fitted, record = refit(model, small, plan, loader, batches=8, progress=False)
    monkeypatch.setattr(_layer_fits, "find_sum", lambda node: None)
    alone, without = refit(model, small, plan, loader, batches=8, progress=False)
    assert record.error_after < 0.3 * without.error_after
    unseen = noise(256, 4, seed=99)
    with torch.no_grad():
        errors = [float((one(unseen) - model(unseen)).square().sum()) for one in (fitted, alone)]
    assert errors[0] < 0.3 * errors[1]


class Tangled(nn.Module):
    """Layers without a sum of their own: read twice, with an activation in between, and in a sum with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, z = self.one(x), self.three(x)
        return y + x, y * 2, self.two(x).relu() + x, z + z


def test_layers_without_a_sum_of_their_own_are_left_alone() -> None:
    model = Tangled().double().eval()
    x = noise(16, 4)
    graph = torchshear.trace(model, x[:2])
    plan = plan_from_kept(torchshear.analyze(graph), {})
    _, record = refit(model, torchshear.shrink(model, plan), plan, [x, x], batches=2, progress=False)
    assert record.error_after == 0
