"""Fake quantisation: models of quantization-aware training prune with their observers off, or say why they do not."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

import torchshear
from torchshear.errors import CaptureError

IMAGE = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.one, self.norm, self.relu = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.two, self.last = nn.Conv2d(16, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.one(self.quant(x))))
        return self.dequant(self.last(self.two(x).mean((2, 3))))


@pytest.fixture(autouse=True)
def _old_ways() -> Iterator[None]:
    """torch calls this way of quantisation an old one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prepared(fused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Net().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    if fused:
        quantization.fuse_modules_qat(model, [["one", "norm", "relu"]], inplace=True)
    model = quantization.prepare_qat(model)
    model(IMAGE)
    return model


def without(model: nn.Module, plan: torchshear.PruningPlan) -> nn.Module:
    """The original with all cut weights at zero; grids are as they were, since 0 / 0 is nothing."""
    masked = copy.deepcopy(model)
    tensors = dict(masked.named_parameters())
    with torch.no_grad():
        for name, mask in plan.masks().items():
            if name in tensors:
                tensors[name].masked_fill_(~mask, 0)
    return masked


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_in_training_for_quantisation_is_pruned_with_observers_off(fused: bool) -> None:
    model = prepared(fused).apply(quantization.disable_observer).eval()
    result = torchshear.prune(model, (IMAGE,))
    assert result.form == "native"
    assert result.report.after.n_params < 0.4 * result.report.before.n_params
    torch.testing.assert_close(result.model(IMAGE), without(model, result.plan)(IMAGE), atol=1e-5, rtol=1e-5)
    grids = result.model.one.weight_fake_quant
    kept = torch.from_numpy(result.plan.state["one.weight"].kept[0])
    torch.testing.assert_close(grids.scale, model.one.weight_fake_quant.scale[kept])
    trained = result.model.apply(quantization.enable_observer).train()
    trained(IMAGE).sum().backward()
    assert trained.one.weight.grad is not None


def test_observers_that_are_on_keep_all_channels_and_say_why() -> None:
    model = prepared().eval()
    result = torchshear.prune(model, (IMAGE,))
    assert result.report.after == result.report.before
    assert "disable_observer" in result.report.refused["one.weight[0]"]


def test_observers_before_quantisation_cannot_be_captured_and_say_what_they_are() -> None:
    model = Net().eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    model = quantization.prepare(model)
    with pytest.raises(CaptureError, match="observer of torch.ao.quantization"):
        torchshear.prune(model, (IMAGE,))


class Functional(nn.Module):
    """The two functions by themselves, with grids that are not around zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.register_buffer("scale", torch.rand(8, generator=torch.Generator().manual_seed(2)) * 0.01 + 0.01)
        self.register_buffer("zero", torch.arange(8, dtype=torch.int32) - 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_channel_affine(self.one.weight, self.scale, self.zero, 0, -128, 127)
        y = nn.functional.conv2d(x, weight, self.one.bias).relu()
        return self.two(torch.fake_quantize_per_tensor_affine(y, 0.05, 7, 0, 255))


def test_fake_quantisation_alone() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    result = torchshear.prune(model, (IMAGE,))
    assert result.report.after.n_params < 0.6 * result.report.before.n_params
    kept = torch.from_numpy(result.plan.state["one.weight"].kept[0])
    assert torch.equal(result.model.zero, model.zero[kept])
    torch.testing.assert_close(result.model(IMAGE), without(model, result.plan)(IMAGE), atol=1e-5, rtol=1e-5)
