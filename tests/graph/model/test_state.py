"""A run leaves no trace in a model."""

import copy
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchshear.graph.model._state import preserve_state


class Stateful(nn.Module):
    """Keeps something of every run, in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.calls, self.log, self.last, self.seen = 0, [], deque(maxlen=2), {"shapes": set()}
        self.record = SimpleNamespace(n=0, inner=SimpleNamespace(items=[1]))
        self.average, self.missing = torch.ones(4), None
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("past_autograd", torch.zeros(4))
        self.register_buffer("grown", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.count.add_(1)
            y = self.one(x)
            self.log.append(self.calls)
            self.last.append(y.detach())
            self.seen["shapes"].add(tuple(x.shape))
            self.record.n += 1
            self.record.inner.items.append(2)
            self.average.mul_(0.9)
            self.missing = y.detach()
            self.assigned = self.assigned + 1
            self.past_autograd.data.add_(y.mean(0))
            self.grown.resize_(2)
            self.extra = "new"
            self.one.register_forward_hook(lambda *_: None)
        return y


def state_of(model: nn.Module) -> dict[str, Any]:
    found = {k: copy.deepcopy(v) for k, v in vars(model).items() if not k.startswith("_")}
    found["record"] = (model.record.n, list(model.record.inner.items))
    return found | dict(copy.deepcopy(model.state_dict())) | {"hooks": len(model.one._forward_hooks)}


def test_all_that_a_run_keeps_is_put_back() -> None:
    model, x = Stateful(), torch.randn(2, 3)
    model(x)
    before, objects = state_of(model), dict(vars(model))
    with preserve_state(model):
        model(x)
        model(x)
        assert model.calls == 3
    after = state_of(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else str(value) == str(after[name])
        assert same, name
    assert all(vars(model)[name] is value for name, value in objects.items() if name != "training")


def test_it_is_put_back_when_a_run_fails() -> None:
    model = Stateful()
    model.one.register_forward_hook(lambda *_: 1 / 0)
    with preserve_state(model), pytest.raises(ZeroDivisionError):
        model(torch.randn(2, 3))
    assert model.calls == int(model.count) == 0


def test_what_autograd_holds_is_not_disturbed() -> None:
    model = nn.BatchNorm1d(3).eval()
    x = torch.randn(4, 3, requires_grad=True)
    loss = model(x).sum()  # its backward reads the running variance
    with preserve_state(model):
        model.train()(x)
    loss.backward()
    assert model.running_mean is not None
    assert model.running_mean.eq(0).all()


def test_what_hooks_write_to_is_put_back_also_where_functions_name_each_other() -> None:
    model, outer, seen = nn.Linear(3, 3), nn.Identity(), [1]
    outer.found = {}

    def note(output: Tensor, again: bool = True) -> None:
        outer.found["last"] = output
        seen.append(2)
        if again:
            note(output, again=False)

    made: dict[str, Any] = {}
    exec("def hook(module, args, output): note(output)", {"note": note}, made)  # of no module
    made["hook"].__module__ = None
    model.register_forward_hook(made["hook"])
    model.register_forward_hook(lambda module, args, output: note(output))
    with preserve_state(model):
        model(torch.randn(2, 3))
        assert len(seen) == 5
    assert seen == [1]
    assert outer.found == {}


def test_a_dictionary_that_refuses_changes_is_left_alone() -> None:
    class Frozen(dict[str, int]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError("this dictionary is frozen")

        def __setitem__(self, key: str, value: int) -> None:
            raise TypeError("this dictionary is frozen")

    model = nn.Linear(2, 2)
    model.config = Frozen(width=2)  # type: ignore[assignment]
    with preserve_state(model):
        model(torch.randn(1, 2))
    assert dict(model.config) == {"width": 2}
