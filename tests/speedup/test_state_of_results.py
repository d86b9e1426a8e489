"""Trial runs of the library leave nothing in what it returns, nor in the user's model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import randomise
from torchshear.speedup import shrink_to_form


class Counting(nn.Module):
    """Counts its calls in buffers, an attribute and a list, and observes what passes."""

    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.literal = literal
        self.calls, self.log = 0, []
        self.register_buffer("n", torch.full((), 5.0))
        self.register_buffer("peak", torch.zeros(12))
        self.register_buffer("assigned", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(tuple(x.shape))
        self.n.add_(1)
        self.assigned = self.assigned + 1
        h = self.norm(self.one(x))
        with torch.no_grad():
            self.peak.copy_(torch.maximum(self.peak, h.detach().amax(0)))
        h = h.reshape(-1, 2, 6).flatten(1) if self.literal else h
        return self.two(h.relu())


def observed(model: nn.Module) -> list[Any]:
    named = dict(model.named_buffers())
    return [named[name].tolist() for name in ("n", "assigned", "norm.num_batches_tracked")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["native", "traced"])
def test_buffers_of_a_result_are_those_of_the_original(form: Any, training: bool, tmp_path: Path) -> None:
    model, x = randomise(Counting()).train(training), torch.randn(4, 6)
    model(x)
    expected, state = observed(model), {name: value.clone() for name, value in model.state_dict().items()}
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (x,))), ratio=0.5)
    small = shrink_to_form(model, plan, form=form).model
    kept = torch.from_numpy(plan.kept["one.weight[0]"])
    assert observed(small) == expected
    for name in ("peak", "norm.running_mean", "norm.running_var"):
        assert torch.equal(dict(small.named_buffers())[name], state[name][kept]), name
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.calls, model.log) == (1, [(4, 6)])
    if form == "native":
        assert (small.calls, small.log) == (1, [(4, 6)])
    plan.save(tmp_path / "plan.json")
    again = torchshear.shrink(model, torchshear.PruningPlan.load(tmp_path / "plan.json"))
    assert observed(again) == expected


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_same_of_what_prune_gives_and_of_what_is_written_of_it(
    literal: bool, training: bool, tmp_path: Path
) -> None:
    model, x = randomise(Counting(literal)).train(training), torch.randn(4, 6)
    expected = observed(model)
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.form == ("traced" if literal else "native")
    assert observed(result.model) == expected
    assert observed(model) == expected
    torchshear.verify(model, result.model, result.plan, (x,))
    torchshear.export_onnx(result.model, tmp_path / "model.onnx", (x,))
    assert observed(result.model) == expected
    assert not literal or model.calls == 0
    assert getattr(result.model, "calls", 0) == 0
