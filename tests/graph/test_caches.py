"""Models that keep tensors of earlier runs in dictionaries."""

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.models import randomise
from torchshear.dependency import FormKind
from torchshear.speedup import shrink_to_form


class Remembering(nn.Module):
    """Attention with a bias that is picked from a table once, and kept until the model is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qk, self.v, self.out = nn.Linear(8, 32), nn.Linear(8, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(4, 9))
        self.index: Tensor
        self.register_buffer("index", torch.arange(25).reshape(5, 5) % 9)
        self.known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Remembering":
        self.known = {}
        return super().train(mode)

    def bias(self) -> Tensor:
        if self.training:
            return self.table[:, self.index]
        if "cpu" not in self.known:
            self.known["cpu"] = self.table[:, self.index] * 0.3
        return self.known["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = self.qk(x).view(b, n, self.heads, -1).transpose(1, 2).chunk(2, -1)
        v = self.v(x).view(b, n, self.heads, -1).transpose(1, 2)
        weights = (q @ k.transpose(-2, -1) + self.bias()).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("form", ["native", "traced"])
def test_what_a_model_computed_before_is_computed_again(form: FormKind) -> None:
    model, x = randomise(Remembering()).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model(x)
    kept = model.known["cpu"]
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.form == "native", result.report.form
    assert model.known["cpu"] is kept
    small = shrink_to_form(model, result.plan, form=form).model.eval()
    with torch.no_grad():
        before = small(x)
        small.train()
        small.get_parameter("table").add_(torch.randn(2, 9))
        assert not torch.allclose(small.eval()(x), before)


def test_tensors_that_a_forward_needs_are_no_cache() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)
            self.shifts = {"in": torch.ones(3)}

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(torch.relu(self.one(x + self.shifts["in"])))
            return out

    model, x = randomise(Given()).eval(), torch.randn(2, 3)
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.form == "native"
    assert torch.equal(result.model.shifts["in"], torch.ones(3))
