"""Gradients through functions with a backward of their own: those of the model, or an error that names the function."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.functions import Adversarial, Quantized, Rounded, Swish
from tests.networks import randomise
from torchshear.calibration._statistics import Statistics
from torchshear.errors import DataError

OF_WEIGHTS = {"taylor": lambda w, g: (w * g) ** 2, "snip": lambda w, g: (w * g).abs(), "gradient": lambda w, g: g.abs()}


def samples(n_classes: int, shape: tuple[int, ...] = (5, 6)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, *shape, generator=generator), torch.randint(0, n_classes, (4,), generator=generator))
        for _ in range(2)
    ]


def of_domain(output: Any, target: Tensor) -> Tensor:
    return functional.cross_entropy(output[1], target)


NETS: dict[str, tuple[Callable[[], nn.Module], str, int, Any]] = {
    "adversarial": (Adversarial, "features.weight", 2, of_domain),
    "quantized": (Quantized, "one.weight", 3, functional.cross_entropy),
    "quantized attention": (lambda: Quantized(attends=True), "one.weight", 3, functional.cross_entropy),
}


def gradients(model: nn.Module, name: str, data: list[Any], loss_fn: Any) -> list[Tensor]:
    """Of each batch, on the model itself."""
    model = copy.deepcopy(model)
    return [torch.autograd.grad(loss_fn(model(x), y), model.get_parameter(name))[0] for x, y in data]


@pytest.mark.parametrize("net", NETS)
def test_sums_are_of_the_gradients_of_the_model_itself(net: str) -> None:
    build, name, n_classes, loss_fn = NETS[net]
    model, data = randomise(build()).eval(), samples(n_classes)
    seen = torchshear.collect(torchshear.trace(model, (data[0][0],)), data, loss_fn, 2)
    weight, found = model.get_parameter(name).detach(), gradients(model, name, data, loss_fn)
    sums = seen.weights[name]
    assert all(bool(gradient.any()) for gradient in found)
    for word, formula in OF_WEIGHTS.items():
        expected = sum(formula(weight, gradient) for gradient in found)
        torch.testing.assert_close(getattr(sums, {"snip": "saliency"}.get(word, word)), expected)


@pytest.mark.parametrize("criterion", ["taylor", "snip", "gradient", "group_fisher", "retrain_free", "sensitivity"])
def test_straight_through_rounding_is_scored_as_if_it_were_not_there(criterion: str) -> None:
    """The loss is linear behind the rounding, so that gradients before it do not depend on what is rounded."""
    data = [(x.double(), y) for x, y in samples(3)]
    kept = []
    for through in (Rounded.apply, lambda h: h):
        model = randomise(Quantized(through=through)).double().eval()
        options: Any = {"data": data, "loss_fn": lambda output, _: output.sum(), "batches": 2}
        plan = torchshear.prune(model, (data[0][0],), criterion=criterion, ratio=0.5, **options).plan
        kept.append({name: units.tolist() for name, units in plan.kept.items()})
    assert kept[0] == kept[1]
    assert kept[0]["one.weight[0]"] != list(range(8))  # as of scores that are all zero


class Swishing(nn.Module):
    """Two convolutions and an activation, as a function or as operators."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.activation(self.one(x))).mean((2, 3))


def images() -> list[tuple[Tensor, Tensor]]:
    return samples(3, (3, 6, 6))


def collected(model: nn.Module, criterion: str | None = None) -> Statistics:
    graph = torchshear.trace(randomise(model).eval(), (images()[0][0],))
    return torchshear.collect(graph, images(), functional.cross_entropy, 2, criteria=criterion)


def test_a_function_with_the_derivative_is_left_to_the_graph() -> None:
    seen, expected = (collected(Swishing(one)) for one in (Swish.apply, lambda x: x * torch.sigmoid(x)))
    for name, sums in expected.weights.items():
        assert torch.equal(seen.weights[name].taylor, sums.taylor)
    for name, gates in expected.gates.items():
        assert torch.equal(gates.squares, seen.gates[name].squares)


def test_a_function_with_the_derivative_is_not_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torchshear.trace(Swishing(Swish.apply).eval(), (images()[0][0],))
    monkeypatch.setattr(Swish, "forward", None)
    assert torchshear.collect(graph, images(), functional.cross_entropy, 2).weights


class Weighted(nn.Module):
    """A function that reads a weight which it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.scale = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3), nn.Parameter(torch.ones(8, 1, 1))
        model = self

        class Scaled(Rounded):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * model.scale

        self.function = Scaled

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function.apply(self.one(x))).mean((2, 3))


class Noisy(Rounded):
    """Gives other values in every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


class Twice(torch.autograd.Function):
    """Two layers in one function, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        ctx.save_for_backward(x, one, two)
        return functional.conv2d(functional.conv2d(x, one), two)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.ones_like(tensor) for tensor in ctx.saved_tensors)  # type: ignore[return-value]


class Inside(Swishing):
    """Both of its layers in one function."""

    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x, self.one.weight, self.two.weight).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "criterion", "message"),
    [
        (Weighted(), None, r"Scaled \(test_functions.*reads 'scale' without being given it"),
        (Swishing(Noisy.apply), "taylor", r"Noisy \(test_functions.*other values than in the captured graph"),
        (Inside(Swish.apply), "group_fisher", r"Twice \(test_functions.*a layer that is to be scored is inside it"),
    ],
)
def test_gradients_that_cannot_be_had_are_refused_by_name(
    model: nn.Module, criterion: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        collected(model, criterion)
    assert collected(model, "wanda").n_batches == 2


def test_weights_inside_a_function_have_the_gradients_that_it_gives() -> None:
    seen = collected(Inside(Swish.apply), "gradient")
    assert torch.equal(seen.weights["one.weight"].gradient, torch.full((8, 3, 3, 3), 2.0))


def test_a_function_that_fails_on_the_data_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torchshear.trace(Swishing(Rounded.apply).eval(), (images()[0][0],))

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Rounded, "forward", staticmethod(fail))
    with pytest.raises(DataError, match=r"Rounded.* it raises RuntimeError: no such kernel"):
        torchshear.collect(graph, images(), functional.cross_entropy, 2)
