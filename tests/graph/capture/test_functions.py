"""Functions with a backward of their own: seen at capture, compared with their operators, and nothing left behind."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchshear
from tests.functions import (
    Adversarial,
    Clamped,
    Doubled,
    Itself,
    Masked,
    Product,
    Quantized,
    ReluInPlace,
    Reversed,
    Root,
    Rounded,
    Swish,
)
from tests.networks import Between
from torchshear.graph import ExampleInputs, Graph, parameters_on_meta
from torchshear.graph._function_call import Operand
from torchshear.graph.capture._functions import watch_functions
from torchshear.graph.capture._trace import capture_in_mode


def between(function: Callable[[Tensor], Tensor]) -> Between:
    return Between(function, nn.Linear(4, 6), nn.Linear(6, 3))


def traced(function: Callable[[Tensor], Tensor], *, x: Tensor | None = None) -> Graph:
    return torchshear.trace(between(function), (torch.randn(2, 4) if x is None else x,))


@pytest.mark.parametrize(
    ("function", "has_own_backward"),
    [
        (lambda h: Reversed.apply(h, 1.0), True),
        (Rounded.apply, True),
        (lambda h: Clamped.apply(h * 1e-3), True),  # on the example nothing is clamped
        (Itself.apply, True),
        (lambda h: Root.apply(h.square() + 1), True),  # on the example it is the derivative
        (lambda h: ReluInPlace.apply(h * 1, 2.0), True),
        (lambda h: ReluInPlace.apply(h * 1, 1.0), False),
        (Swish.apply, False),
        (Masked.apply, True),
        (Doubled.apply, False),
        (lambda h: Reversed.apply(h, -1.0), False),
        (lambda h: sum(Product.apply(h, torch.eye(6), torch.ones(6))), False),
    ],
)
@pytest.mark.parametrize("x", [torch.randn(2, 4), torch.zeros(3, 4)])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_backward_is_own_where_it_is_not_that_of_the_operators(
    function: Callable[[Tensor], Tensor], has_own_backward: bool, x: Tensor, enabled: bool
) -> None:
    with torch.set_grad_enabled(enabled):
        (call,) = traced(function, x=x).functions
    assert call.has_own_backward is has_own_backward
    assert call.is_replayable


def test_calls_are_found_with_their_operands_and_results() -> None:
    model = between(Swish.apply)
    model.product = nn.Linear(6, 6)
    model.call = lambda h: sum(Product.apply(h, model.product.weight, model.product.bias))
    (call,) = torchshear.trace(model, (torch.randn(2, 4),)).functions
    assert call.function is Product
    assert call.args == (Operand("linear"), Operand("product_weight"), Operand("product_bias"))
    assert call.outputs == ("add", "mul")
    assert set(call.operators) == {"t", "matmul", "add", "mul"}
    assert str(call).startswith("Product (functions.py:")


def test_a_tied_weight_is_found_under_its_first_name() -> None:
    model = between(Swish.apply)
    model.first = nn.Parameter(torch.randn(6, 6))
    model.product = nn.Linear(6, 6)
    model.product.weight = model.first
    model.call = lambda h: sum(Product.apply(h @ model.first, model.product.weight, model.product.bias))
    (call,) = torchshear.trace(model, (torch.randn(2, 4),)).functions
    assert call.args == (Operand("matmul"), Operand("first"), Operand("product_bias"))
    assert call.is_replayable
    assert not call.has_own_backward


@pytest.mark.parametrize(("factor", "has_own_backward"), [(1.0, False), (3.0, True)])
def test_gradients_that_a_function_itself_gives_to_parameters_are_compared_and_taken_back(
    factor: float, has_own_backward: bool
) -> None:
    model = between(Swish.apply)
    model.scale, added = nn.Parameter(torch.rand(6) + 1), []

    class Adding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * model.scale

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            added.append(1)
            model.scale.grad = (gradient * x).sum(0).to(model.scale.dtype) * factor
            return gradient * model.scale

    model.call = Adding.apply
    assert [call.has_own_backward for call in torchshear.trace(model, (torch.randn(2, 4),)).functions] == [
        has_own_backward
    ]
    assert added
    assert model.scale.grad is None


def test_wrong_weight_gradients_are_found_behind_right_ones_of_the_input() -> None:
    class Halved(Product):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor, of_double: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight, bias = Product.backward(ctx, gradient, of_double)
            return x, weight / 2, bias

    model = between(Swish.apply)
    model.call = lambda h: sum(Halved.apply(h, model.weight, model.bias))
    model.weight, model.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
    assert [call.has_own_backward for call in torchshear.trace(model, (torch.randn(2, 4),)).functions] == [True]


def test_gradients_that_reach_no_parameter_do_not_count() -> None:
    assert [call.has_own_backward for call in traced(lambda h: h + Rounded.apply(h.detach())).functions] == [False]

    def without_gradients(h: Tensor) -> Tensor:
        with torch.no_grad():
            return Rounded.apply(h)

    assert [call.has_own_backward for call in traced(lambda h: h + without_gradients(h)).functions] == [False]


def test_a_function_under_autocast_is_found() -> None:
    def narrow(h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return Rounded.apply(h @ torch.eye(6)).float()

    (call,) = traced(narrow).functions
    assert call.has_own_backward
    assert call.is_replayable


def test_functions_inside_a_checkpoint_are_found_and_gradients_go_on_behind_it() -> None:
    graph = traced(lambda h: checkpoint(lambda y: Swish.apply(Rounded.apply(y)), h, use_reentrant=True))
    assert [(call.function, call.has_own_backward) for call in graph.functions] == [(Rounded, True), (Swish, False)]
    assert not any(node.target is torch._C._set_grad_enabled for node in graph)


def test_a_function_inside_another_one_is_one_of_its_operators() -> None:
    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return Swish.apply(x) * 2  # type: ignore[no-any-return, no-untyped-call]

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    (call,) = traced(Outer.apply).functions
    assert call.function is Outer
    assert call.has_own_backward


def test_functions_that_only_training_calls_are_in_the_graph_of_train_mode() -> None:
    model = between(Swish.apply)
    model.call = lambda h: Reversed.apply(h, 1.0) if model.training else h
    inputs = ExampleInputs.of((torch.randn(2, 4),))
    assert capture_in_mode(model, inputs, "eval").functions == ()
    assert [call.has_own_backward for call in capture_in_mode(model, inputs, "train").lost_backwards] == [True]


def test_backwards_are_not_compared_on_the_meta_device() -> None:
    with parameters_on_meta():
        model = between(Swish.apply)
    assert len(torchshear.trace(model, (torch.randn(2, 4),)).lost_backwards) == 1


@pytest.mark.parametrize("model", [Adversarial(), Quantized(), Quantized(attends=True)])
def test_a_capture_leaves_gradients_and_functions_as_they_were(model: nn.Module) -> None:
    code = torch.autograd.Function.apply.__func__.__code__
    x = torch.randn(2, 5, 6)
    torchshear.trace(model, (x,))
    assert torch.autograd.Function.apply.__func__.__code__ is code
    assert not hasattr(torch.autograd.Function, "_torchshear_apply")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_threads_and_captures_do_not_disturb_one_another() -> None:
    code = torch.autograd.Function.apply.__func__.__code__
    found: list[Tensor] = []
    with watch_functions() as outer:
        with watch_functions():
            pass
        thread = threading.Thread(target=lambda: found.append(Reversed.apply(torch.ones(2), 1.0)))
        thread.start()
        thread.join()
        assert torch.autograd.Function.apply.__func__.__code__ is not code
    assert torch.autograd.Function.apply.__func__.__code__ is code
    assert found[0].tolist() == [1, 1]
    assert outer == []
