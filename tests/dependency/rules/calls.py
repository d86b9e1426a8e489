"""Calls between two layers, and what proves that the rule of an operator is exact.

A call is pruned at random and compared with the masked network by `verify`. Where it names no size of the hidden axis,
the pruned network must also be the same Python code on the kept rows of the first layer and columns of the second.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Between, randomise
from tests.oracle import assert_is_slice, assert_outputs_equal
from tests.strategies import kept_sets
from torchshear.pruners import plan_from_kept

SHAPES = {"features": (3, 4), "maps": (3, 4, 6, 6), "tokens": (3, 5, 4)}


@dataclass(frozen=True)
class Case:
    """A call on hidden values.

    Attributes:
        name: of the case.
        call: what stands between the layers.
        shrinks: how many groups with units to cut are expected; none where the rule has to refuse.
        kind: "features" (batch, 12), "maps" (batch, 12, 6, 6) or "tokens" (batch, 5, 12).
        sizes: whether the call names sizes of the hidden axis, so that it does not run on fewer units as it stands.
    """

    name: str
    call: Callable[[Tensor], Tensor]
    shrinks: int = 1
    kind: str = "features"
    sizes: bool = False


def between_layers(call: Callable[[Tensor], Tensor], kind: str = "features", n_read: int = 12) -> nn.Module:
    """A layer of 12 units, the call, and a layer of 3; float64, in eval mode."""
    layer, more = (nn.Conv2d, (1,)) if kind == "maps" else (nn.Linear, ())
    model = Between(lambda x: call(x + 0.1), layer(4, 12, *more), layer(n_read, 3, *more))
    return randomise(model).double().eval()


def example(kind: str, seed: int = 3) -> Tensor:
    """Input of the network of a kind."""
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_rule(case: Case) -> None:
    """Cut units at random, and assert that the result is exact, and the same for other batches."""
    model, x = between_layers(case.call, case.kind), example(case.kind)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    assert len(groups.prunable) == case.shrinks, [(g.name, g.width) for g in groups] or [f.reason for f in groups.fixed]
    if not case.shrinks:
        assert any("aten." in fixed.reason and "without a rule" not in fixed.reason for fixed in groups.fixed)
        return
    for seed in range(2):
        plan = plan_from_kept(groups, kept_sets(groups, seed))
        small = torchshear.shrink(model, plan, verify=False)
        assert torchshear.verify(model, small, plan, args=(x,)).max_error <= 1e-9
        assert_is_slice(model, small, plan)
        if not case.sizes and len(plan.masks()) > 1:
            assert_outputs_equal(small(x), _sliced(model, plan.masks(), x), 1e-9)
        for batch in (1, 4):
            other = torch.randn(batch, *x.shape[1:], dtype=torch.float64)
            assert small(other).shape == model(other).shape


def _sliced(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written down with the kept rows of the first layer and the kept columns of the second."""
    rows = masks["one.bias"]
    others = range(2, masks["two.weight"].ndim)
    columns = masks["two.weight"].any(0).amax([d - 1 for d in others]) if others else masks["two.weight"].any(0)
    apply = functional.conv2d if others else functional.linear
    hidden = model.call(apply(x, model.one.weight[rows], model.one.bias[rows]))
    return apply(hidden, model.two.weight[:, columns], model.two.bias)
