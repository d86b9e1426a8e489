"""Models that hold what cannot be copied, captured or computed with: they are pruned, or one error says why not."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.errors import ArgumentError, CaptureError, WeightError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def pair(**attributes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Pair().eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def with_buffer(value: Tensor) -> nn.Module:
    model = pair()
    model.register_buffer("table", value)
    return model


def sliced_by_hand(model: nn.Module, plan: torchshear.PruningPlan) -> Tensor:
    kept = torch.from_numpy(plan.kept["one.weight[0]"])
    hidden = nn.functional.linear(X, model.one.weight[kept], model.one.bias[kept]).relu()
    return nn.functional.linear(hidden, model.two.weight[:, kept], model.two.bias)


class Holder:
    """An object of the user's that holds a lock beside numbers."""

    def __init__(self) -> None:
        self.lock, self.numbers = threading.Lock(), [1, 2]


UNCOPIED: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "lock in a dictionary": lambda: {"lock": threading.Lock(), "numbers": [1, 2]},
    "lock in an object": Holder,
    "generator": lambda: (number for number in range(3)),
    "module of Python": lambda: threading,
    "local of threads": threading.local,
    "random numbers": torch.Generator,
}


@pytest.mark.parametrize("kind", UNCOPIED)
def test_what_python_does_not_copy_is_shared(kind: str) -> None:
    held = UNCOPIED[kind]()
    model = pair(held=held)
    result = torchshear.prune(model, (X,))
    assert result.form == "native"
    assert model.held is held
    torch.testing.assert_close(result.model(X), sliced_by_hand(model, result.plan))


def test_what_can_be_copied_beside_it_is_copied() -> None:
    model = pair(held=Holder())
    small = torchshear.prune(model, (X,)).model
    assert small.held.lock is model.held.lock
    small.held.numbers.append(3)
    assert model.held.numbers == [1, 2]


def test_an_open_file_is_shared(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        assert torchshear.prune(pair(log=file), (X,)).model.log is file


def test_a_class_that_refuses_copies_is_named() -> None:
    class Single(Pair):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Single":
            raise RuntimeError("there is one of me")

    with pytest.raises(ArgumentError, match="Single .*RuntimeError: there is one of me"):
        torchshear.prune(Single().eval(), (X,))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_parameters_without_values_stay(shape: tuple[int, ...]) -> None:
    model = pair(empty=nn.Parameter(torch.empty(shape)))
    result = torchshear.prune(model, (X,))
    assert result.model.empty.shape == shape
    torch.testing.assert_close(result.model(X), sliced_by_hand(model, result.plan))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_layers_of_no_width_run() -> None:
    model = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    result = torchshear.prune(model, (X,))
    assert [layer.weight.shape for layer in result.model if isinstance(layer, nn.Linear)] == [(0, 6), (4, 0), (3, 4)]


@pytest.mark.parametrize(
    ("make", "expected", "message"),
    [
        (lambda: with_buffer(torch.eye(3).to_sparse()), ArgumentError, "'table' is in the layout torch.sparse_coo"),
        (
            lambda: with_buffer(torch.zeros(3).to(torch.float8_e4m3fn)),
            ArgumentError,
            "'table' is of torch.float8_e4m3fn",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), ArgumentError, "'0.weight' is lazy"),
        (lambda: torch.jit.script(pair()), ArgumentError, "model is a ScriptModule"),
        (
            lambda: nn.Sequential(nn.Linear(6, 8), torch.jit.script(nn.Linear(8, 3))),
            CaptureError,
            r"its module '1' is a ScriptModule\. Put the module that it was made from in its place",
        ),
        (lambda: pair().to("meta"), WeightError, "'one.weight' is on the meta device"),
    ],
    ids=["sparse", "float8", "lazy", "scripted", "scripted part", "meta"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:Lazy modules:UserWarning")
def test_what_cannot_be_pruned_says_why(make: Callable[[], nn.Module], expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message):
        torchshear.prune(make().eval(), (X,))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X * float("nan"), "tensor 0 of the example inputs holds NaN"),
        (X.to_sparse(), "tensor 0 of the example inputs is in the layout torch.sparse_coo"),
        (X.to(torch.float8_e4m3fn), "tensor 0 of the example inputs is of torch.float8_e4m3fn"),
        (torch.empty(0, 6), r"has shape \(0, 6\) and so no values"),
    ],
    ids=["nan", "sparse", "float8", "empty"],
)
def test_inputs_that_prove_nothing_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.prune(pair(), (x,))


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_change_nothing(context: str) -> None:
    model = pair()
    with CONTEXTS[context]():
        result = torchshear.prune(model, (X,))
    torch.testing.assert_close(result.model(X), sliced_by_hand(model, result.plan))


def test_the_meta_device_as_default_is_told() -> None:
    model = pair()
    with torch.device("meta"), pytest.raises(ArgumentError, match="default device is meta"):
        torchshear.prune(model, (X,))
