"""One record for all that is known of an operator: a norm and a layer of a user's own, described in one place each."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

import torchshear
from tests.networks import Net, randomise
from tests.oracle import check_random_pruning
from torchshear.calibration._weight_calls import find_weight_calls
from torchshear.dependency import (
    Axes,
    Call,
    MaskedCall,
    Norm,
    Operator,
    Product,
    masked_operator,
    operator_rule,
    unregister,
)
from torchshear.dependency.plans._cut import dense_cost
from torchshear.errors import ArgumentError
from torchshear.graph._operator_record import describe_operator, operator_named, operator_of
from torchshear.pruners import plan_from_kept
from torchshear.speedup import fold_constants, shrink_to_form


@torch.library.custom_op("records::scale_norm", mutates_args=())
def scale_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Features divided by their root mean square, scaled and shifted."""
    return x * x.square().mean(-1, keepdim=True).add(1e-5).rsqrt() * gamma + beta


@scale_norm.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("records::affine", mutates_args=())
def affine(weight: Tensor, offset: Tensor, x: Tensor) -> Tensor:
    """A linear layer whose weight is (in, out)."""
    return x @ weight + offset


@affine.register_fake
def _(weight: Tensor, offset: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@pytest.fixture(autouse=True)
def described() -> Iterator[None]:
    """Describe both operators for the time of a test."""
    norm = Norm(over="features", channels=-1, input="x", scale="gamma", shift="beta")

    @operator_rule("records.scale_norm", operator=Operator(norm=norm))
    def scale_norm_rule(call: Call) -> Axes:
        x = call.axes("x")
        for name, role in (("gamma", "norm"), ("beta", "bias")):
            call.tie(x[-1], call.axes(name)[0])
            call.purpose(name, **{role: 0})
        call.mix(x[-1])
        return x

    @masked_operator("records.scale_norm")
    def kept_features_alone(call: MaskedCall) -> Tensor:
        last = [call.arg("x").ndim - 1]
        x = call.select_kept("x", last)
        normal = call.scatter_kept(x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), "x", last)
        return normal * call.arg("gamma") + call.arg("beta")

    layer = Product(left="x", right="weight", bias="offset", contracted=(-1, 0))

    @operator_rule("records.affine", operator=Operator(product=layer, macs=lambda operands, _: operands[0][1] * 10))
    def affine_rule(call: Call) -> Axes:
        x, weight = call.axes("x"), call.axes("weight")
        call.tie(weight[0], x[-1])
        call.tie(weight[1], call.axes("offset")[0])
        call.purpose("weight", in_=0, out=1)
        call.purpose("offset", bias=0)
        call.contract((call.arg("x"), call.arg("weight")), x[-1:], (x[:-1], weight[1:]))
        return (*x[:-1], weight[1])

    yield
    for name in ("records.scale_norm", "records.affine"):
        unregister(name)
        assert operator_named(name) == Operator()


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _model() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return affine(m.weight, m.offset, torch.relu(scale_norm(m.one(x), m.gamma, m.beta)))

    own = {name: nn.Parameter(torch.zeros(*shape)) for name, shape in SHAPES.items()}
    return randomise(Net(run, one=nn.Linear(6, 12), **own).double().eval(), seed=4)


SHAPES = {"gamma": (12,), "beta": (12,), "weight": (12, 3), "offset": (3,)}


def test_a_norm_and_a_layer_of_ones_own_shrink_and_are_scored() -> None:
    model = _model()
    groups = torchshear.analyze(torchshear.trace(model, (X,)))
    (group,) = groups
    assert {member.name: member.purposes for member in group.members} == {
        "one.weight": {"out"},
        "one.bias": {"bias"},
        "gamma": {"norm"},
        "beta": {"bias"},
        "weight": {"in"},
    }
    assert group.role == "ffn"
    plan = torchshear.plan(groups, criterion="bn_scale", ratio=0.5)
    kept = plan.kept[group.name].tolist()
    assert kept == sorted(model.gamma.abs().topk(6).indices.tolist())
    check_random_pruning(model, (X,), None, 0, is_cross_channel=True)


def test_constants_pass_the_norm_and_fold_into_the_layer() -> None:
    model = _model()
    groups = torchshear.analyze(torchshear.trace(model, (X,)))
    plan = plan_from_kept(groups, {groups[0].name: [0, 2, 3, 7, 11]})
    folded = fold_constants(model, shrink_to_form(model, plan), plan)
    assert [(one.layer, one.into) for one in folded.fold.folded] == [("records.affine.default", "offset")]
    gone = [unit for unit in range(12) if unit not in (0, 2, 3, 7, 11) and model.beta[unit] > 0]
    expected = model.offset + model.beta[gone] @ model.weight[gone]
    torch.testing.assert_close(folded.model.offset, expected, rtol=1e-12, atol=1e-12)


def test_costs_and_layers_are_read_from_the_record() -> None:
    graph = torchshear.trace(_model(), (X,))
    layers = {layer.weight: layer for layer in find_weight_calls(torchshear.analyze(graph))}
    assert (layers["weight"].dim, layers["weight"].inputs, layers["weight"].bias) == (1, 0, "offset")
    assert dense_cost(graph).macs == 6 * 12 + 3 * 10 // (graph.batch_hint or 1)


def test_an_operator_is_described_once() -> None:
    with pytest.raises(ArgumentError, match=r"'records\.affine' is described already"):
        describe_operator("records.affine", operator=Operator(passes="copy"))
    with pytest.raises(ArgumentError, match="'affine'; expected 'namespace"):
        describe_operator("affine", operator=Operator())


def test_overloads_share_a_record_unless_they_have_their_own() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    called = {
        name: operator_of(graph.call_function(target, (x,)))
        for name, target in (("relu", torch.ops.aten.relu.default), ("exp", torch.ops.aten.exp.default))
    }
    assert called["relu"].activation.has_zeros
    assert called["exp"] == Operator(is_pointwise=True), "told by torch's tag"
    assert operator_named("aten.transpose.int").passes == "layout"
    assert operator_named("aten.view.default").keeps_values
    assert operator_named("aten.view.dtype") == Operator(), "it counts positions in memory"
    assert operator_named("aten.never_heard_of") == operator_of(x) == Operator()
