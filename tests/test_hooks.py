"""Features that hooks put into a container and the forward reads back, as published depth networks do."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import randomise
from torchshear.graph.model._copy import copy_model

IN_A_FILE: dict[Any, Any] = {}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Keeper:
    """A hook that is an object."""

    def __init__(self, kept: dict[Any, Any]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["low"] = output


def _keep(kept: dict[Any, Any], module: nn.Module, args: Any, output: Tensor) -> None:
    kept["low"] = output


class Depth(nn.Module):
    """Adds a feature of an inner layer, which a hook keeps in one of several ways, to that of the last."""

    def __init__(self, kind: str, of_user: dict[Any, Any]) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.one, self.two, self.out = nn.Conv2d(16, 8, 1), nn.Conv2d(24, 8, 1), nn.Conv2d(8, 2, 1)
        self.kept: dict[Any, Any] = {}
        self.read = lambda: (of_user if kind == "the user's dictionary" else self.kept)["low"]
        self._register(kind, of_user, self.kept)

    def _register(self, kind: str, of_user: dict[Any, Any], own: dict[Any, Any]) -> None:
        def put(output: Tensor) -> None:
            self.kept["low"] = output

        def after(output: Tensor) -> Tensor:
            own["low"] = output
            return output

        first = self.low.forward
        if kind == "a patched forward":
            self.low.forward = lambda x: after(first(x))  # type: ignore[method-assign]
        elif kind == "a hook before":
            self.high.register_forward_pre_hook(lambda m, args: own.__setitem__("low", args[0]))
        else:
            hooks = {
                "the module": lambda m, args, out: self.kept.__setitem__("low", out),
                "its dictionary": lambda m, args, out: own.__setitem__("low", out),
                "a default argument": lambda m, args, out, kept=own: kept.__setitem__("low", out),
                "a function that does": lambda m, args, out: put(out),
                "a partial function": partial(_keep, own),
                "an object": Keeper(own),
                "the user's dictionary": lambda m, args, out: of_user.__setitem__("low", out),
            }
            self.low.register_forward_hook(hooks[kind])

    def forward(self, x: Tensor) -> Tensor:
        high = self.two(self.high(self.low(x)))
        return self.out(torch.relu(functional.interpolate(high, scale_factor=2.0) + self.one(self.read())))


KINDS = [
    "the module", "its dictionary", "a default argument", "a function that does", "a partial function", "an object",
    "the user's dictionary", "a hook before", "a patched forward",
]  # fmt: skip


def _by_hand(model: nn.Module, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """What the network computes with cut weights zeroed, without any hook."""
    p = {name: value * masks.get(name, torch.ones(())) for name, value in model.named_parameters()}
    low = functional.conv2d(x, p["low.weight"], p["low.bias"], 2, 1)
    high = functional.conv2d(
        functional.conv2d(low, p["high.weight"], p["high.bias"], 2, 1), p["two.weight"], p["two.bias"]
    )
    both = functional.interpolate(high, scale_factor=2.0) + functional.conv2d(low, p["one.weight"], p["one.bias"])
    return functional.conv2d(both.relu(), p["out.weight"], p["out.bias"])


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_run", [False, True], ids=["", "has run"])
def test_features_that_hooks_keep_are_followed(kind: str, has_run: bool) -> None:
    of_user: dict[Any, Any] = {"mine": 1}
    model = randomise(Depth(kind, of_user).double()).eval()
    if has_run:
        model(X)
    before = dict(of_user), dict(model.kept)
    result = torchshear.prune(model, (X,), ratio=0.5)
    assert _same(of_user, before[0])
    assert _same(model.kept, before[1])
    assert [len(group.kept) for group in result.plan.groups] == [8, 12, 4]
    expected = _by_hand(model, X, result.plan.masks())
    assert torch.allclose(result.model(X), expected, rtol=0, atol=1e-12)
    assert _same(model.kept, before[1]), "the small model writes to its own"
    other = torch.randn_like(X)
    assert torch.allclose(model(other), _by_hand(model, other, {}), rtol=0, atol=1e-12)
    assert torch.allclose(result.model(X), expected, rtol=0, atol=1e-12)


def test_a_dictionary_of_a_notebook_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    model[0].register_forward_hook(lambda m, args, out: IN_A_FILE.__setitem__("hidden", out.detach()))
    x = torch.randn(3, 4)
    model(x)
    hidden = IN_A_FILE["hidden"]
    small = torchshear.prune(model, (x,), ratio=0.5).model
    assert IN_A_FILE["hidden"] is hidden
    small(x)
    assert IN_A_FILE["hidden"].shape == (3, 4), "the hook of the small model works as that of the model did"


def test_hooks_of_an_extractor_around_a_model() -> None:
    class Extractor(nn.Module):
        def __init__(self, body: nn.Sequential) -> None:
            super().__init__()
            self.body, self.head, self.found = body, nn.Linear(24, 4), {}
            for at in (1, 3):
                body[at].register_forward_hook(lambda m, args, out, at=at: self.found.__setitem__(at, out))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.body(x)
            return self.head(self.found[3].mean((2, 3))), self.found[1]

    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3))
    model = randomise(Extractor(nn.Sequential(*layers)).double()).eval()
    result = torchshear.prune(model, (X,), ratio=0.5)
    assert result.model.body[2].weight.shape[:2] == (12, 16), "the feature that is given keeps its channels"
    assert [tuple(out.shape) for out in result.model(X)] == [(2, 4), (2, 16, 14, 14)]


def test_copies_of_functions_keep_what_they_are() -> None:
    model = nn.Linear(2, 2)

    def named(m: nn.Module, args: Any, out: Tensor, *, twice: bool = True) -> Tensor:
        """Docstring."""
        return 2 * out if twice and model.training else out

    def again() -> Any:
        return again, model

    named.mark = 3  # type: ignore[attr-defined]
    model.register_forward_hook(named)
    model.again = again
    twin = copy_model(model)
    (hook,) = twin._forward_hooks.values()
    assert hook is not named
    assert (hook.__name__, hook.__doc__, hook.__kwdefaults__, hook.mark) == ("named", "Docstring.", {"twice": True}, 3)
    twin.eval()
    x = torch.ones(1, 2)
    assert torch.equal(model(x), 2 * twin(x))
    assert twin.again()[1] is twin
    assert not any(value is named for value in vars(model).values())
