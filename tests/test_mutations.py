"""Wrong operator rules must make `prune` raise: the proof may not believe what the rules say.

A few of what `benchmarks/mutations.py` does with all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.mutating import Mutation, calls_of, mutated, mutations_of, watched
from tests.networks import Between, randomise
from torchshear.dependency.plans._cut import Cut
from torchshear.errors import TorchshearError
from torchshear.pruners import random_criterion


def _filtered(x: Tensor) -> Tensor:
    """Each sample convolved with filters of its own, twelve by twelve, with the batch in the groups."""
    h = x.mT.sigmoid()
    filters = h.mean(2)[:, :, None, None] * h.amax(2)[:, None, :, None]
    y = functional.conv1d(h.reshape(1, -1, 5), filters.flatten(0, 1), groups=len(x))
    return y.view(len(x), -1, 5).mT


@dataclass(frozen=True)
class Case:
    """A call between two layers, and what is made wrong of the rule of one operator in it."""

    operator: str
    wrong: str
    call: Callable[[Tensor], Tensor]
    n_read: int = 12


CASES = (
    Case("aten.cumsum", "mirror", lambda x: x.cumsum(2)),
    Case("aten.softmax", "swap", lambda x: x.softmax(2)),
    Case("aten.layer_norm", "shift", lambda x: functional.layer_norm(x, (12,))),
    Case("aten.layer_norm", "fresh", lambda x: functional.layer_norm(x, (12,))),
    Case("aten.sum", "mirror", lambda x: x.sum(1)),
    Case("aten.relu", "fresh", lambda x: x.relu()),
    Case("aten.relu", "shift", lambda x: x.relu().softmax(2)),
    Case("aten.cat", "swap", lambda x: torch.cat([x, x.sin()], 2), 24),
    Case("aten.flip", "shift", lambda x: x.flip(2)),
    Case("aten.reshape", "mirror", lambda x: x.reshape(-1, 5, 3, 4).reshape(-1, 5, 12)),
    Case("aten.linear", "forget tie", lambda x: x.tanh()),
    Case("aten.softmax", "forget mix", lambda x: x.softmax(2)),
    Case("aten.mean", "forget mix", lambda x: x - x.mean(2, keepdim=True)),
    Case("aten.roll", "no edit", lambda x: x.roll(5, 2)),
    Case("aten.slice.Tensor", "no edit", lambda x: x[..., 2:9], 7),
    Case("aten.conv1d", "mirror", _filtered),
    Case("aten.conv1d", "shift", _filtered),
    Case("aten.conv1d", "forget mix", _filtered),
)


def _prune(model: nn.Module, x: Tensor) -> torchshear.PruneResult:
    return torchshear.prune(model, (x,), criterion=random_criterion(1), ratio=0.5)


def _mutation(case: Case, model: nn.Module, x: Tensor) -> Mutation:
    """What the case says, at the last call of its operator; pruning with the right rules must work."""
    with watched() as seen:
        plan = _prune(model, x).plan
    assert plan.analysis is not None
    node = calls_of(plan.analysis, case.operator)[-1]
    found = mutations_of(plan.analysis, Cut(plan.analysis, plan.kept), node, seen)
    return next(mutation for mutation in found if str(mutation).startswith(case.wrong))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator} {case.wrong}")
def test_a_wrong_rule_is_noticed(case: Case) -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = Between(case.call, nn.Linear(4, 12), nn.Linear(case.n_read, 3)).double().eval()
    randomise(model)
    mutation = _mutation(case, model, x)
    with mutated(mutation), pytest.raises(TorchshearError):
        _prune(model, x)
    assert _prune(model, x).verification.max_error < 1e-9, "the rules are right again"
