"""Operators that the library meets for the first time: never guessed, and described by a rule in a few lines."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Net, randomise
from tests.oracle import assert_equals_masked, assert_outputs_equal, check_random_pruning
from torchshear.dependency import (
    Axes,
    Call,
    MaskedCall,
    masked_operator,
    operator_rule,
    registered_operators,
    scatter_into_zeros,
    unregister,
)
from torchshear.dependency.rules._findings import Keep
from torchshear.errors import ArgumentError, VerificationError
from torchshear.pruners import plan_from_kept


@torch.library.custom_op("strange::swap_halves", mutates_args=())
def swap_halves(x: Tensor) -> Tensor:
    """The second half of the last axis, then the first."""
    first, second = x.chunk(2, -1)
    return torch.cat([second, first], -1)


@swap_halves.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("strange::shared_gate", mutates_args=())
def shared_gate(x: Tensor, weight: Tensor, n_blocks: int) -> tuple[Tensor, Tensor]:
    """A layer whose outputs are centred in blocks, and the means that were taken away."""
    y = (x @ weight.T).unflatten(-1, (n_blocks, -1))
    mean = y.mean(-1)
    return (y - mean[..., None]).flatten(-2), mean


@shared_gate.register_fake
def _(x: Tensor, weight: Tensor, n_blocks: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], n_blocks)


@contextmanager
def registered(name: str, rule: Callable[[Call], object]) -> Iterator[None]:
    """A rule, for the time of a test."""
    operator_rule(name)(rule)  # type: ignore[arg-type]
    try:
        yield
    finally:
        unregister(name)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Swapping(nn.Module):
    """The operator on hidden features, beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.skip, self.two = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Three features."""
        hidden = swap_halves(torch.relu(self.one(x)))
        return self.two(hidden + self.skip(x))


def _swapping() -> nn.Module:
    return randomise(Swapping().double().eval(), seed=4)


def _swap_rule(call: Call) -> Axes:
    x = call.axes("x")
    half = x[-1].size // 2
    first, second = call.algebra.take(x[-1], slice(0, half)), call.algebra.take(x[-1], slice(half, None))
    call.tie(first, second)
    return (*x[:-1], call.algebra.concat([second, first]))


def test_an_unknown_operator_is_fixed_and_reported() -> None:
    model = _swapping()
    groups = torchshear.analyze(torchshear.trace(model, (X,)))
    assert len(groups) == 0
    reasons = {(fixed.name, fixed.dim): fixed.reason for fixed in groups.fixed}
    reason = reasons["one.weight", 0]
    assert "operator without a rule" in reason
    assert "strange.swap_halves.default" in reason, "the operator is named"
    assert "test_custom_operators.py:" in reason, "with its source line"
    result = torchshear.prune(model, (X,), ratio=0.5)
    assert "strange.swap_halves.default" in str(result.report)
    assert_outputs_equal(result.model(X), model(X), 1e-12)


def test_it_is_fixed_at_its_boundary_only() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.two(torch.relu(m.between(swap_halves(m.one(x)))))

    layers = {"one": nn.Linear(6, 12), "between": nn.Linear(12, 10), "two": nn.Linear(10, 3)}
    model = randomise(Net(run, **layers).double().eval(), seed=4)
    groups = torchshear.analyze(torchshear.trace(model, (X,)))
    assert [(group.name, group.width) for group in groups] == [("between.weight[0]", 10)]
    assert "strange.swap_halves" in next(f.reason for f in groups.fixed if f.name == "one.weight")
    check_random_pruning(model, (X,), None, 0, is_cross_channel=False)


def test_a_rule_makes_it_shrink() -> None:
    with registered("strange.swap_halves", _swap_rule):
        assert "strange.swap_halves" in registered_operators()
        model = _swapping()
        result = torchshear.prune(model, (X,), ratio=0.5)
        assert (result.report.achieved_ratio, result.form) == (0.5, "native")
        assert_equals_masked(model, result.model, result.plan, (X,))
        kept = result.plan.kept["one.weight[0]"]
        assert np.array_equal(kept[: len(kept) // 2] + 6, kept[len(kept) // 2 :]) or len(kept) == 3
        for seed in (0, 1, 2):
            assert check_random_pruning(model, (X,), None, seed, is_cross_channel=False).n_cut > 0
    assert "strange.swap_halves" not in registered_operators()


def _gating(n_blocks: int = 3) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y, mean = shared_gate(x, m.weight, n_blocks)
        return m.two(y) + mean.sum(-1, keepdim=True)

    net = Net(run, weight=nn.Parameter(torch.zeros(12, 6)), two=nn.Linear(12, 3))
    return randomise(net.double().eval(), seed=6)


def _gate_rule(call: Call) -> list[Axes]:
    """Several results, a weight with roles, a size argument, and a mean that mixes positions."""
    x, weight = call.axes("x"), call.axes("weight")
    n_blocks = call.arg("n_blocks")
    call.tie(weight[1], x[-1])
    call.purpose("weight", out=0, in_=1)
    blocks, inside = call.algebra.factor(weight[0], (n_blocks, weight[0].size // n_blocks))
    call.mix(inside)
    call.edit_size("n_blocks", blocks)
    return [(*x[:-1], weight[0]), (*x[:-1], blocks)]


def _masked_gate(call: MaskedCall) -> tuple[Tensor, Tensor]:
    """The operator on the kept rows of its weight, put back among zeros."""
    kept = call.kept_masks("weight")[0]
    blocks = kept.unflatten(0, (call.arg("n_blocks"), -1)).any(1)
    y, mean = call.run(weight=call.select_kept("weight"), n_blocks=int(blocks.sum()))
    return scatter_into_zeros(y, kept, -1), scatter_into_zeros(mean, blocks, -1)


def test_a_rule_that_mixes_needs_a_masked_form() -> None:
    with registered("strange.shared_gate", _gate_rule):
        groups = torchshear.analyze(torchshear.trace(_gating(), (X,)))
    assert [(group.name, group.width) for group in groups] == [("weight[0]", 3)], "blocks go, what is inside stays"


def test_a_rule_with_results_sizes_and_a_mean() -> None:
    with registered("strange.shared_gate", _gate_rule):
        masked_operator("strange.shared_gate")(_masked_gate)
        model = _gating()
        groups = torchshear.analyze(torchshear.trace(model, (X,)))
        assert [(g.name, g.width, g.is_cross_channel) for g in groups] == [
            ("weight[0]", 4, True),
            ("weight[0]#2", 3, True),
        ]
        result = torchshear.prune(model, (X,), ratio=0.5)
        inside, blocks = result.plan.kept["weight[0]"], result.plan.kept["weight[0]#2"]
        y = (X @ model.weight.T).unflatten(1, (3, 4))[:, blocks][:, :, inside]
        mean = y.mean(-1, keepdim=True)
        columns = model.two.weight.unflatten(1, (3, 4))[:, blocks][:, :, inside].flatten(1)
        expected = (y - mean).flatten(1) @ columns.T + model.two.bias + mean.squeeze(-1).sum(1, keepdim=True)
        assert_outputs_equal(result.model(X), expected, 1e-12)


def test_a_wrong_rule_is_caught_and_the_node_named() -> None:
    with registered("strange.swap_halves", lambda call: call.axes("x")):
        model = _swapping()
        groups = torchshear.analyze(torchshear.trace(model, (X,)))
        plan = plan_from_kept(groups, {"one.weight[0]": [0, 1, 2, 3, 8, 9]})
        with pytest.raises(VerificationError, match=r"'swap_halves', strange.swap_halves.default .*rule"):
            torchshear.verify(model, torchshear.shrink(model, plan), plan, (X,))
        with pytest.raises(VerificationError, match="strange.swap_halves.default"):
            torchshear.prune(model, (X,), ratio=0.3)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda call: call.axes("x")[:1], r"axes of sizes \(\d+,\) for a result of shape \(\d+, 12\)"),
        (lambda call: call.axes("y"), "AttributeError"),
        (lambda call: call.refuse("too strange"), "too strange: strange.swap_halves.default"),
    ],
    ids=["wrong_sizes", "fails", "refuses"],
)
def test_a_rule_that_does_not_fit_fixes_the_call(rule: Callable[[Call], Axes], said: str) -> None:
    with registered("strange.swap_halves", rule):
        groups = torchshear.analyze(torchshear.trace(_swapping(), (X,)))
        assert len(groups) == 0
        assert re.search(said, next(f.reason for f in groups.fixed if f.name == "one.weight"))


def test_names_are_checked() -> None:
    with pytest.raises(ArgumentError, match=r"namespace\.operator"):
        operator_rule("swap_halves")
    with pytest.raises(ArgumentError, match="has a rule already"):
        operator_rule("aten.linear")(_swap_rule)
    with pytest.raises(ArgumentError, match="has no rule"):
        unregister("strange.swap_halves")


def test_a_rule_can_replace_the_whole_call() -> None:
    def rule(call: Call) -> Axes:
        x = call.axes("x")
        half = x[-1].size // 2
        first, second = call.algebra.take(x[-1], slice(0, half)), call.algebra.take(x[-1], slice(half, None))
        call.keep_some(first), call.keep_some(second)

        def rolled(keep: Keep) -> tuple[str, tuple[object, ...]]:
            return "aten.roll.default", (call.arg("x"), [int(keep(second).sum())], [-1])

        call.edit_call(rolled)
        return (*x[:-1], call.algebra.concat([second, first]))

    with registered("strange.swap_halves", rule):
        model = _swapping()
        groups = torchshear.analyze(torchshear.trace(model, (X,)))
        assert len(groups) == 2, "halves may lose other positions, and other numbers of them"
        plan = plan_from_kept(groups, {groups[0].name: [0, 1, 5], groups[1].name: [2]})
        small = torchshear.shrink(model, plan)
        assert torchshear.verify(model, small, plan, (X,)).max_error < 1e-12
        first, second = (torch.as_tensor([0, 1, 5]), torch.as_tensor([8]))
        hidden = functional.linear(X, model.one.weight, model.one.bias).relu()
        joined = torch.cat([hidden[:, second], hidden[:, first]], 1)
        rows = torch.cat([second - 6, first + 6])
        skip = functional.linear(X, model.skip.weight[rows], model.skip.bias[rows])
        expected = functional.linear(joined + skip, model.two.weight[:, rows], model.two.bias)
        assert_outputs_equal(small(X), expected, 1e-12)
