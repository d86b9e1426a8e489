"""Refit of einsums with a weight: the linear layers that they are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import noise
from torchshear.pruners import plan_from_kept
from torchshear.speedup import refit
from torchshear.speedup.compensation._einsum_form import EinsumForm
from torchshear.speedup.compensation._least_squares import RIDGES


class Product(nn.Module):
    """A layer that is cut, and an einsum of what it gives; the einsum gives the output."""

    def __init__(self, equation: str, *weight: int, swap: bool = False) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(6, 16), nn.Parameter(noise(*weight, seed=1))
        self.equation, self.swap = equation, swap

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        both = (self.weight, x) if self.swap else (x, self.weight)
        out: Tensor = torch.einsum(self.equation, *both)
        return out


# As a weight of shape (out, in), the position of each output being the same after the batch dimensions.
EQUATIONS: dict[str, tuple[Callable[[], Product], Callable[[Any], Any]]] = {
    "plain": (lambda: Product("btd,do->bto", 16, 5), lambda w: w.T),
    "by heads": (lambda: Product("btd,dhe->bthe", 16, 2, 3), lambda w: w.reshape(w.shape[0], -1).T),
    "weight first": (lambda: Product("od,btd->bto", 5, 16, swap=True), lambda w: w),
    "any rank": (lambda: Product("...d,od->...o", 5, 16), lambda w: w),
}


def halved(model: nn.Module, steps: int = 3) -> torchshear.PruningPlan:
    groups = torchshear.analyze(torchshear.trace(model, noise(2, steps, 6)))
    (name,) = [group.name for group in groups if any(member.name == "first.weight" for member in group.members)]
    return plan_from_kept(groups, {name: list(range(8))})


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_weight_is_that_of_least_squares_in_numpy(name: str) -> None:
    make, matrix = EQUATIONS[name]
    torch.manual_seed(0)
    model: Any = make().double().eval()
    data = [noise(64, 3, 6, seed=seed) for seed in range(4)]
    plan = halved(model)
    cut: Any = torchshear.shrink(model, plan)
    small: Any
    small, record = refit(model, cut, plan, data, batches=4, progress=False)
    assert not record.skipped
    assert record.error_after < 0.7 * record.error_before
    x = torch.cat(data)
    x = x[torch.arange(len(x)) % 4 != 3]
    with torch.no_grad():
        inputs = nn.functional.linear(x, cut.first.weight, cut.first.bias).relu().flatten(0, 1).numpy()
        wanted = model(x).flatten(0, 1).flatten(1).numpy()
    present, found = (matrix(one.weight.detach().numpy()) for one in (cut, small))
    errors = []
    for share in RIDGES:
        more = np.sqrt(share * np.square(inputs).sum(0).mean()) * np.eye(8)
        rest = np.concatenate([wanted - inputs @ present.T, np.zeros((8, wanted.shape[1]))])
        step = np.linalg.lstsq(np.concatenate([inputs, more]), rest, rcond=None)[0]
        errors.append(abs(present + step.T - found).max())
    assert min(errors) < 1e-6


def test_a_matrix_for_each_head() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(6, 32), nn.Parameter(noise(4, 8, 5, seed=1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu().unflatten(-1, (4, -1))
            return torch.einsum("bthd,hde->bthe", x, self.weight)

    torch.manual_seed(0)
    model = Heads().double().eval()
    result = torchshear.prune(model, noise(2, 3, 6), ratio=0.5)
    data = [noise(64, 3, 6, seed=seed) for seed in range(4)]
    small, record = refit(model, result.model, result.plan, data, batches=4, progress=False)
    assert not record.skipped
    assert record.error_after < record.error_before
    x = noise(32, 3, 6, seed=9)
    before, after = (float((one(x) - model(x)).detach().square().sum()) for one in (result.model, small))
    assert after < before


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("btd,de->be", ((4, 3, 6), (6, 5))),  # sums the value alone
        ("btd,de->bt", ((4, 3, 6), (6, 5))),  # sums the weight alone
        ("bd,bd->bd", ((4, 6), (4, 6))),  # sums nothing
        ("bdd,de->be", ((4, 6, 6), (6, 5))),  # takes a diagonal
        ("btd,de->bte", ((4, 3, 1), (6, 5))),  # repeats the value
        ("hd,hde->he", ((2, 6), (2, 6, 5))),  # has no rows
    ],
)
def test_einsums_that_are_no_layers(equation: str, shapes: Any) -> None:
    assert EinsumForm.of(equation, shapes, 1) is None


def test_a_batch_norm_over_another_dimension_takes_no_offset() -> None:
    """Its channels are the steps of a sequence, of which there happen to be as many as outputs."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 5, bias=False)
            self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.norm(self.second(self.first(x).relu())).relu())
            return out

    torch.manual_seed(0)
    model = Steps().double().eval()
    plan = halved(model, steps=5)
    data = [noise(64, 5, 6, seed=seed) for seed in range(4)]
    _, record = refit(model, torchshear.shrink(model, plan), plan, data, batches=4, progress=False)
    by_name = {layer.name: layer for layer in record.layers}
    assert by_name["second"].method == "least squares"
    # The norm starts from about the error that the layer in front of it was left with.
    assert by_name["norm"].error_before < 1.5 * by_name["second"].error_after
