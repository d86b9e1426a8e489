"""A second capture by one recorded run gives what torch.export gives."""

import pytest
import torch
from torch import Tensor, nn

from torchshear.graph import ExampleInputs, Graph
from torchshear.graph._nodes import shape_of
from torchshear.graph._outputs import drop_opaque_outputs
from torchshear.graph.capture._export import export
from torchshear.graph.capture._replay import replay
from torchshear.graph.capture._trace import capture_in_mode
from torchshear.graph.model._state import in_mode


class Factories(nn.Module):
    """Makes tensors of its own, writes in place and splits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)
        self.table = torch.arange(4.0)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        places = torch.arange(x.shape[0]).view(-1, 1)
        y = torch.zeros(x.shape[0], 8) + x + places
        y[:, 0] = 3.0
        a, b, c = self.layer(y).relu_().chunk(3, dim=-1)
        with torch.no_grad():
            scale = a.mean() + torch.tensor(2.0)
        return a + self.table, {"b": b * scale, "c": c.reshape(x.shape[0] * 2, 2)}


class Masks(nn.Module):
    """Assigns by a mask, which is captured as a choice."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[y > 0] = 1.0
        return y


class Counts(nn.Module):
    """Branches by the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) if x.shape[0] > 10 else x.mean(1)


class Squares(nn.Module):
    """Has as many calls as its batch tells."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x * 2
        return x


class Remembers(nn.Module):
    """Keeps what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        return self.last + 1


def _convolutional() -> nn.Module:
    layers = (nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout2d(0.1))
    return nn.Sequential(*layers, nn.GroupNorm(2, 6), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5))


def _attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


NETWORKS = {
    "convolutional": (_convolutional, (2, 3, 9, 9)),
    "attention": (_attention, (2, 5, 8)),
    "recurrent": (lambda: nn.GRU(8, 6, batch_first=True), (2, 5, 8)),
    "factories": (Factories, (2, 8)),
    "masks": (Masks, (2, 8)),
}


def _first(model: nn.Module, inputs: ExampleInputs, batch: int, mode: str) -> Graph:
    return export(model, inputs.without_values(batch), inputs, mode, batch)  # type: ignore[arg-type]


def _described(graph: Graph) -> list[str]:
    return [f"{n.op} {n.name} {n.args} {n.kwargs} {shape_of(n) if n.op != 'output' else ''}" for n in graph]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_is_what_torch_export_gives(name: str, mode: str) -> None:
    make, shape = NETWORKS[name]
    model = make()
    inputs = ExampleInputs.of((torch.randn(shape),))
    model(*inputs.args)
    with in_mode(model, mode), drop_opaque_outputs(model):  # type: ignore[arg-type]
        first = _first(model, inputs, 37, mode)
        found = replay(first, model, inputs.without_values(3))
        wanted = _first(model, inputs, 3, mode)
    assert found is not None
    assert _described(found) == _described(wanted)
    assert _described(first) != _described(found)


@pytest.mark.parametrize("make", [Counts, Squares])
def test_other_calls_are_left_to_torch_export(make: type[nn.Module]) -> None:
    inputs = ExampleInputs.of((torch.randn(2, 4),))
    model = make()
    with in_mode(model, "eval"), drop_opaque_outputs(model):
        assert replay(_first(model, inputs, 37, "eval"), model, inputs.without_values(3)) is None


def test_a_call_more_is_left_to_torch_export() -> None:
    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("large", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            if x.shape[0] > 10:
                self.large.add_(1)  # type: ignore[operator]
            return y

    inputs = ExampleInputs.of((torch.randn(2, 4),))
    model = Notes()
    with in_mode(model, "eval"), drop_opaque_outputs(model):
        assert replay(_first(model, inputs, 3, "eval"), model, inputs.without_values(37)) is None


def test_other_constants_are_left_to_torch_export() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0 / x.shape[0], 2.0])

    inputs = ExampleInputs.of((torch.randn(2, 2),))
    model = Scaled()
    with in_mode(model, "eval"), drop_opaque_outputs(model):
        assert replay(_first(model, inputs, 37, "eval"), model, inputs.without_values(3)) is None
    assert capture_in_mode(model, inputs, "eval").batch_hint is None


def test_other_order_of_operands_is_another_network() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            one, two = (self.a, self.b) if x.shape[0] > 10 else (self.b, self.a)
            return (x - one) * two

    inputs = ExampleInputs.of((torch.randn(2, 4),))
    model = Turns()
    assert capture_in_mode(model, inputs, "eval").batch_hint is None


def test_leaves_no_traces() -> None:
    model = Remembers()
    inputs = ExampleInputs.of((torch.randn(2, 4),))
    generator = torch.get_rng_state()
    with in_mode(model, "eval"), drop_opaque_outputs(model):
        first = _first(model, inputs, 37, "eval")
        model.last = None
        assert replay(first, model, inputs.without_values(3)) is not None
        assert model.last is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.backends.mkldnn.enabled
