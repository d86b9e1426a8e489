"""Regularizers against sums that are written out, and the two ways in which a session adds them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.training.loops import images, perceptron, residual, sgd, train, vectors
from torchshear.errors import ArgumentError, DataError
from torchshear.pruners.regularizers import BlockLasso, GroupLasso, GrowingL2, Regularizer, ScaleL1
from torchshear.pruners.schedules import Linear, OneShot


def session_of(model: nn.Module, regularizer: Regularizer, **options: Any) -> torchshear.PruningSession:
    batch = vectors if isinstance(model, nn.Sequential) else images
    settings: dict[str, Any] = {"schedule": OneShot(at=500), **options}
    return torchshear.PruningSession(model, batch(0)[0], regularizer=regularizer, **settings)


def penalty_of(model: nn.Module, regularizer: Regularizer, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The penalty in a first step, and its gradients by name of the parameter."""
    session = session_of(model, regularizer, **options)
    session.on_train_begin()
    session.on_epoch_begin(0)
    session.on_step_begin(0)
    value = session.penalty()
    value.backward()
    return value.detach(), {
        name.replace("parametrizations.", "").replace(".original", ""): one.grad
        for name, one in model.named_parameters()
    }


def test_scales_of_norms() -> None:
    model = residual()
    with torch.no_grad():
        model.norm.weight[2], model.norm.weight[3] = 0.0, -0.7
    scales = {name: getattr(model, name).weight.detach().clone() for name in ("norm", "scale")}
    value, gradients = penalty_of(model, ScaleL1(0.01))
    assert float(value) == pytest.approx(0.01 * sum(float(one.abs().sum()) for one in scales.values()))
    for name, one in scales.items():
        torch.testing.assert_close(gradients[f"{name}.weight"], 0.01 * one.sign())
    assert gradients["stem.weight"] is None
    assert float(gradients["norm.weight"][2]) == 0


def units_by_hand(model: nn.Module) -> list[tuple[float, int]]:
    """Sum of squares and number of weights of each unit of the residual network, written out."""
    found = []
    parts = {name: one.detach() for name, one in model.named_parameters()}
    for width, rows, columns in (
        (8, ("stem.weight", "stem.bias", "norm.weight", "norm.bias", "side.weight"), "last.weight"),
        (12, ("last.weight", "last.bias", "scale.weight", "scale.bias"), "head.weight"),
    ):
        for unit in range(width):
            values = torch.cat([parts[name][unit].flatten() for name in rows] + [parts[columns][:, unit].flatten()])
            found.append((float((values**2).sum()), len(values)))
    return found


@pytest.mark.parametrize("settings", [GroupLasso(0.1), GroupLasso(0.1, run=3), GroupLasso(0.1, run=4, sized=True)])
def test_group_lasso_over_all_members_of_a_unit(settings: GroupLasso) -> None:
    model = residual()
    units = units_by_hand(model)
    runs = [part[i : i + settings.run] for part in (units[:8], units[8:]) for i in range(0, len(part), settings.run)]
    expected = 0.0
    for run in runs:
        size = math.sqrt(sum(count for _, count in run)) if settings.sized else 1.0
        expected += size * math.sqrt(sum(squares for squares, _ in run))
    value, gradients = penalty_of(model, settings)
    assert float(value) == pytest.approx(0.1 * expected, rel=1e-12)
    if settings == GroupLasso(0.1):  # the slope of a weight in one unit's row and another's column: w / norm of each
        row, column = (math.sqrt(units[place][0]) for place in (8 + 5, 3))
        weight = float(model.last.weight.detach()[5, 3, 0, 0])
        assert float(gradients["last.weight"][5, 3, 0, 0]) == pytest.approx(0.1 * (weight / row + weight / column))


def test_group_lasso_at_zero_and_in_grouped_convolutions() -> None:
    """A unit without any weight has slope 0, and channels of a grouped convolution are found block by block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Unflatten(1, (12, 1)), nn.Conv1d(12, 6, 1, groups=3, bias=False),
                          nn.Flatten(), nn.Linear(6, 5)).double()  # fmt: skip
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, 0
        model[2].weight[2:4, 1] = 0  # channel 5 is the second of block 1, which rows 2 and 3 read
    parts = {name: one.detach().clone() for name, one in model.named_parameters()}
    groups = torchshear.analyze(torchshear.trace(model, vectors(0)[0]))
    value, gradients = penalty_of(model, GroupLasso(1.0))
    expected = 0.0
    for unit in range(12):
        block, place = divmod(unit, 4)
        readers = parts["2.weight"][2 * block : 2 * block + 2, place].flatten()
        own = torch.cat([parts["0.weight"][unit], parts["0.bias"][unit, None], readers])
        expected += float(own.norm())
    for unit in range(6):
        expected += float(torch.cat([parts["2.weight"][unit].flatten(), parts["4.weight"][:, unit]]).norm())
    assert len(groups.prunable) == 2
    assert float(value) == pytest.approx(expected, rel=1e-12)
    assert not gradients["0.weight"][5].any()
    assert all(bool(one.isfinite().all()) for one in gradients.values() if one is not None)


@pytest.mark.parametrize("sized", [False, True])
def test_block_lasso_of_neural_compressor(sized: bool) -> None:
    """The gradient of a block is reg_coeff * W_b / norm(W_b), for blocks of four outputs at one tap and input."""
    model = residual()
    weights = {name: getattr(model, name).weight.detach().clone() for name in ("stem", "side", "last")}
    value, gradients = penalty_of(model, BlockLasso("4x1", 0.05, sized=sized), pattern="4x1")
    total, factor = 0.0, 2.0 if sized else 1.0
    for name, weight in weights.items():
        norms = weight.reshape(-1, 4, *weight.shape[1:]).square().sum(1, keepdim=True).sqrt()
        total += float(norms.sum()) * factor
        expected = (0.05 * factor * weight.reshape(-1, 4, *weight.shape[1:]) / norms).reshape(weight.shape)
        torch.testing.assert_close(gradients[f"{name}.weight"], expected)
    assert float(value) == pytest.approx(0.05 * total)
    assert gradients["head.weight"] is None  # 5 outputs are no multiple of 4


def test_growing_l2() -> None:
    model = residual()
    growing = GrowingL2(0.01, every=3, most=0.025)
    assert [growing.factor(step) for step in (0, 2, 3, 5, 6, 9, 100)] == [0.01, 0.01, 0.02, 0.02, 0.025, 0.025, 0.025]
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, images(0)[0])), "l1", 0.5)
    value, gradients = penalty_of(model, growing, ratio=0.5)
    total = 0.0
    for name, mask in plan.masks().items():
        if name in before:
            goes = torch.where(mask, 0.0, before[name])
            total += float((goes**2).sum())
            torch.testing.assert_close(gradients[name], 0.01 * goes)
    assert float(value) == pytest.approx(0.5 * 0.01 * total)


def test_growing_l2_leaves_little_to_go() -> None:
    """Under a growing penalty what goes at the end is nearly nothing, and is what was chosen at the beginning."""
    model, plain = residual(), residual()
    for one, regularizer in ((model, GrowingL2(0.5, every=2, most=8.0)), (plain, None)):
        optimizer = sgd(one, 0.02)
        session = torchshear.PruningSession(
            one, images(0)[0], ratio=0.5, regularizer=regularizer, schedule=OneShot(at=60), optimizer=optimizer
        )
        train(session, one, optimizer, images, 60)
        gone = ~one.last.parametrizations.weight[0].mask
        norm = float(one.last.parametrizations.weight.original.detach()[gone].norm())
        assert norm < 0.05 if regularizer is not None else norm > 0.5


@pytest.mark.parametrize("regularizer", [ScaleL1(0.1), GroupLasso(0.01), BlockLasso("4x1", 0.01), GrowingL2(0.1)])
def test_the_loss_and_the_gradients_are_two_ways_to_the_same(regularizer: Regularizer) -> None:
    found = []
    for adds_penalty in (True, False):
        model = residual()
        optimizer = sgd(model)
        session = session_of(model, regularizer, schedule=Linear(end=4, frequency=2), optimizer=optimizer)
        train(session, model, optimizer, images, 6, adds_penalty=adds_penalty)
        found.append((session.history.penalties, [one.detach().clone() for one in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_penalty_that_was_only_looked_at_is_added_to_the_gradients() -> None:
    model, other = residual(), residual()
    for one, looks in ((model, True), (other, False)):
        session = session_of(one, ScaleL1(0.5))
        session.on_train_begin()
        session.on_epoch_begin(0)
        session.on_step_begin(0)
        (one(images(0)[0]).square().mean()).backward()
        if looks:
            float(session.penalty().detach())
        session.on_before_optimizer_step()
    assert torch.equal(
        model.norm.parametrizations.weight.original.grad, other.norm.parametrizations.weight.original.grad
    )


@pytest.mark.parametrize(("make", "match"), [
    (lambda: GroupLasso(-1.0), "coefficient=-1.0"), (lambda: GroupLasso(1e-3, run=0), "run"),
    (lambda: ScaleL1(math.nan), "coefficient=nan"), (lambda: BlockLasso("2:4"), "2:4"),
    (lambda: BlockLasso("four"), "pattern='four'"), (lambda: GrowingL2(every=0), "every"),
    (lambda: GrowingL2("much"), "growth='much'"),  # type: ignore[arg-type]
])  # fmt: skip
def test_bad_settings(make: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        make()


@pytest.mark.parametrize(("regularizer", "options", "match"), [
    (ScaleL1(1e-3), {}, "no group that may shrink has a norm"),
    (GroupLasso(1e-3), {"pattern": "1x1"}, "use BlockLasso"),
    (BlockLasso("7x1"), {}, "fits none"),
    (GrowingL2(), {"ratio": 0.0}, "nothing goes"),
])  # fmt: skip
def test_networks_that_have_nothing_to_press(regularizer: Regularizer, options: dict[str, Any], match: str) -> None:
    session = session_of(perceptron(), regularizer, **options)
    with pytest.raises(ArgumentError, match=match):
        session.on_train_begin()


def test_penalties_that_are_no_numbers() -> None:
    model = residual()
    session = session_of(model, ScaleL1(0.5))
    session.on_train_begin()
    session.on_epoch_begin(0)
    session.on_step_begin(0)
    with torch.no_grad():
        model.norm.parametrizations.weight.original[0] = math.nan
    with pytest.raises(DataError, match="the penalty of step 0 is nan"):
        session.penalty()
