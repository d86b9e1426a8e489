"""Weights that are computed before each forward: norms, spectral norms, orthogonal matrices, new and old style."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import torchshear
from tests.networks import randomise
from tests.oracle import assert_outputs_equal, fingerprint

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old_weight_norm": weight_norm,
    "old_spectral_norm": spectral_norm,
}


def _network(name: str, is_training: bool) -> nn.Module:
    wrap = WRAPPERS[name]
    body = [wrap(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 5, 1)]
    model = nn.Sequential(*body).double()
    if "spectral" not in name:
        randomise(model, seed=8)
    model.train()(X)  # power iterations move, and old-style weights are computed
    return model.train(is_training)


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_rows_of_a_computed_weight_are_cut(name: str, is_training: bool) -> None:
    model = _network(name, is_training)
    before = fingerprint(model)
    result = torchshear.prune(model, (X,), ratio=0.5)
    assert fingerprint(model) == before, "power iterations of the original were moved"
    assert (result.form, result.report.achieved_ratio) == ("native", 0.5)
    assert result.model.training is is_training
    kept = torch.from_numpy(result.plan.kept["0.bias[0]"])
    weights = {n: t.shape for n, t in result.model.named_parameters()}
    assert weights["0.bias"] == (8,)
    assert weights["2.weight"] == (5, 8, 1, 1)
    assert next(shape for key, shape in weights.items() if key.startswith("0.") and shape[1:2] == (3,)) == (8, 3, 3, 3)
    if "weight_norm" not in name:
        return

    def reference(x: Tensor) -> Tensor:
        """One norm a row: the rows that stay are what they were."""
        model.eval()(x)
        hidden = torch.conv2d(x, model[0].weight[kept], model[0].bias[kept]).relu()
        return torch.conv2d(hidden, model[2].weight[:, kept], model[2].bias)

    with torch.no_grad():
        assert_outputs_equal(result.model.eval()(X), reference(X), 1e-12)


@pytest.mark.parametrize("name", ["spectral_norm", "old_spectral_norm"])
def test_power_iteration_goes_on_after_the_cut(name: str) -> None:
    small = torchshear.prune(_network(name, is_training=True), (X,), ratio=0.5).model
    buffers = {key: value.clone() for key, value in small.named_buffers()}
    for _ in range(100):
        small(X)
    assert all(not torch.equal(value, buffers[key]) for key, value in small.named_buffers())
    with torch.no_grad():
        largest = torch.linalg.matrix_norm(small[0].weight.flatten(1), 2)
    assert abs(float(largest) - 1) < 1e-3, "the spectral norm of the smaller weight is estimated anew"
    small(X).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_an_orthogonal_weight_is_fixed() -> None:
    body = [parametrizations.orthogonal(nn.Linear(27, 16)), nn.ReLU(), nn.Linear(16, 5)]
    groups = torchshear.analyze(torchshear.trace(nn.Sequential(*body), (torch.randn(4, 27),)))
    assert not groups.prunable
    assert any("decomposed or inverted as a whole" in fixed.reason for fixed in groups.fixed)


class Standardised(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1, over their inputs as well, as in BiT and NFNet."""

    def forward(self, x: Tensor) -> Tensor:
        """A map of `out_channels`."""
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        return functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_kernels_that_are_standardised_are_so_over_the_inputs_that_stay() -> None:
    model = nn.Sequential(Standardised(3, 16, 3), nn.ReLU(), Standardised(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 1))
    randomise(model.double(), seed=8)
    result = torchshear.prune(model.eval(), (X,), ratio=0.5)
    assert result.verification.reference == "kept positions"
    first, second = (torch.from_numpy(result.plan.kept[f"{layer}.weight[0]"]) for layer in (0, 2))
    sliced = nn.Sequential(
        Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1)
    ).double()
    with torch.no_grad():
        for layer, rows, columns in ((0, first, torch.arange(3)), (2, second, first), (4, torch.arange(5), second)):
            sliced[layer].weight.copy_(model[layer].weight[rows][:, columns])
            sliced[layer].bias.copy_(model[layer].bias[rows])
        assert_outputs_equal(result.model(X), sliced(X), 1e-12)
