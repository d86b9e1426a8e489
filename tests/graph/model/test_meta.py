"""Models with parameters on the meta device and buffers with values."""

import torch
from torch import Tensor, nn

import torchshear
from torchshear.graph import parameters_on_meta


class Picking(nn.Module):
    """A network in which the values of a buffer decide what can shrink."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))
        self.twin = self.order

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).index_select(1, self.order))


def test_only_parameters_are_on_meta_and_the_class_is_as_before() -> None:
    register = nn.Module.register_parameter
    with parameters_on_meta():
        model = Picking()
        model.two.weight = model.two.weight
    assert nn.Module.register_parameter is register
    assert all(parameter.is_meta and parameter.requires_grad for parameter in model.parameters())
    assert model.order.tolist() == [3, 1, 0, 2, 7, 6, 5, 4]
    assert not nn.Linear(2, 2).weight.is_meta


def test_an_analysis_reads_buffers() -> None:
    x = torch.randn(2, 4)
    whole = torchshear.analyze(torchshear.trace(Picking(), (x,)))
    with parameters_on_meta():
        model = Picking()
    order = model.order
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    assert model.order is order
    assert [(group.name, group.width) for group in groups] == [(group.name, group.width) for group in whole]
    assert groups.graph.fingerprint == whole.graph.fingerprint
    with torch.device("meta"):
        bare = Picking()
    assert not torchshear.analyze(torchshear.trace(bare, (x,))).prunable


def test_a_model_that_cannot_be_captured_gets_its_buffers_back() -> None:
    with parameters_on_meta():
        model = Picking()
    order = model.order
    try:
        torchshear.trace(model, (torch.randn(2, 5),))
    except torchshear.errors.CaptureError:
        assert model.order is order
    else:
        raise AssertionError("a wrong width was captured")
