"""Results keep what tensors are besides their values: dtypes that differ inside a model, order in memory, training."""

import copy
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Residual, image, randomise
from tests.oracle import assert_equals_masked, n_elements
from torchshear.compat.nni import L1FilterPruner
from torchshear.errors import ArgumentError
from torchshear.pruners import masks
from torchshear.speedup import shrink_to_form

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}


class Mixed(nn.Module):
    """A convolution and a norm in one dtype, a linear layer in another, with casts where one hands on to the other."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.casts = [first, second, "float"]
        self.one, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.two, self.out = nn.Linear(8, 12), nn.Linear(12, 4)
        self.one.to(DTYPES[first]), self.norm.to(DTYPES[first]), self.two.to(DTYPES[second])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.casts
        y = self.norm(self.one(getattr(x, first)())).relu().mean((2, 3))
        return self.out(getattr(self.two(getattr(y, second)()).relu(), last)())


@pytest.mark.parametrize(("first", "second"), list(permutations(DTYPES, 2)))
def test_layers_of_two_dtypes_are_cut_and_keep_them(first: str, second: str) -> None:
    model = randomise(Mixed(first, second)).eval()
    result = torchshear.prune(model, (image(),), ratio=0.5)
    small = result.model
    assert n_elements(small) < 0.5 * n_elements(model)
    assert {n: t.dtype for n, t in small.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert small(image()).dtype is torch.float32
    for one in (model, small):
        one.casts = ["double", "double", "double"]
    assert_equals_masked(model, small, result.plan, (image(),))


@pytest.mark.parametrize(("first", "second"), [("bfloat16", "float"), ("half", "double")])
def test_a_graph_of_two_dtypes_trains(first: str, second: str) -> None:
    model = randomise(Mixed(first, second)).eval()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (image(),))), ratio=0.5)
    small = shrink_to_form(model, plan, form="traced").model.train()
    small(image()).sum().backward()
    assert {p.grad.dtype for p in small.parameters()} == {DTYPES[first], DTYPES[second], torch.float32}


def _order(tensor: Tensor) -> list[int]:
    """Dimensions in the order that they have in memory, the slowest first; those of size 1 are nowhere."""
    return sorted((dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1), key=lambda dim: -tensor.stride(dim))


class Layouts(nn.Module):
    """Convolutions of each kind, and a linear layer whose weight is stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=4),
            nn.Conv2d(16, 16, 3, groups=16, padding=1),
            nn.ConvTranspose2d(16, 8, 3),
            nn.Conv2d(8, 6, 1),
        )
        self.head = nn.Linear(6, 4)
        self.head.weight = nn.Parameter(self.head.weight.detach().t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("form", ["native", "traced"])
def test_channels_stay_last(form: str) -> None:
    model = randomise(Layouts()).eval().to(memory_format=torch.channels_last)
    x = image().to(memory_format=torch.channels_last)
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (x,))), ratio=0.5)
    small = shrink_to_form(model, plan, form=form).model
    for name, parameter in small.named_parameters():
        assert _order(parameter) == _order(model.get_parameter(name)), name
    assert small.get_parameter("body.0.weight").is_contiguous(memory_format=torch.channels_last)
    assert not small.get_parameter("body.0.weight").is_contiguous()
    assert_equals_masked(model, small, plan, (image(),))


def test_channels_of_volumes_stay_last() -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 2, 3)).eval()
    model.to(memory_format=torch.channels_last_3d)
    small = torchshear.prune(model, (torch.randn(2, 3, 6, 6, 6),), ratio=0.5).model
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not small[0].weight.is_contiguous()


def _trains(model: nn.Module) -> bool:
    model.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    buffers_are_ordinary = not any(buffer.is_inference() for buffer in model.buffers())
    return buffers_are_ordinary and all(p.grad is not None for p in model.parameters())


def test_what_is_pruned_in_inference_mode_trains() -> None:
    model = randomise(Residual()).eval()
    with torch.inference_mode():
        x = image()
        result = torchshear.prune(model, (x,), ratio=0.5, compensate="constants")
        groups = torchshear.analyze(torchshear.trace(model, (x,)))
        shrunk = torchshear.shrink(model, torchshear.plan(groups, ratio=0.5))
        traced = shrink_to_form(model, torchshear.plan(groups, ratio=0.5), form="traced").model
        renewed = torchshear.recalibrate(result.model, [(x,)], batches=1, progress=False)
        assert torch.is_inference_mode_enabled()
    assert result.verification.modes == ("eval", "train")
    assert result.verification.max_gradient_error is not None
    assert all(_trains(one) for one in (result.model, shrunk, traced, renewed))
    assert _trains(model)


def test_gradients_are_collected_in_inference_mode() -> None:
    model, batches = randomise(Residual()).eval(), [(image(), torch.tensor([0, 4]))] * 3
    asked = {"criterion": "taylor", "data": batches, "loss_fn": functional.cross_entropy, "batches": 3}
    outside = torchshear.prune(model, (image(),), **asked).plan.masks()
    with torch.inference_mode():
        inside = torchshear.prune(model, (image(),), **asked).plan.masks()
    assert all(torch.equal(inside[name], mask) for name, mask in outside.items())


def test_masks_laid_in_inference_mode_train() -> None:
    model, dense = randomise(Residual()).eval(), randomise(Residual()).eval()
    with torch.inference_mode():
        masks.apply(model, masks.choose_masks(model, "2:4"))
        pruner = L1FilterPruner(dense, [{"op_types": ["Conv2d"], "sparsity": 0.5}], args=(image(),))
        masked, small = pruner.compress(), pruner.shrink().model
    assert all(_trains(one) for one in (model, masked, small))


def test_checkpoints_loaded_in_inference_mode_train(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(Residual().state_dict(), tmp_path / "model.safetensors")
    model = Residual().to("meta")
    with torch.inference_mode():
        torchshear.load_checkpoint(model, tmp_path)
    assert _trains(model)


def test_a_model_that_can_never_train_is_refused() -> None:
    with torch.inference_mode():
        model = Residual().eval()
        with pytest.raises(ArgumentError, match=r"'stem\.weight' was made in torch\.inference_mode\(\)"):
            torchshear.prune(model, (image(),))
    with pytest.raises(ArgumentError, match=r"copy\.deepcopy\(model\), called outside"):
        torchshear.trace(model, (image(),))
    assert _trains(torchshear.prune(copy.deepcopy(model), (image(),)).model)
