"""What users of NNI run into most often: each is a network or a config that is pruned here while it trains."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.compat.nni import AGPPruner, SlimPruner

ENTRY = {"initial_sparsity": 0.0, "final_sparsity": 0.5, "start_epoch": 0, "end_epoch": 2, "frequency": 1}


def conv(before: int, after: int, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, **options), nn.BatchNorm2d(after), nn.ReLU())


class Gated(nn.Module):
    """A squeeze-and-excitation block: its multiplication ties channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = conv(3, 8), nn.Linear(8, 4), nn.Linear(4, 8)
        self.act, self.head = nn.Hardswish(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        gate = torch.sigmoid(self.two(self.act(self.one(y.mean((2, 3))))))
        return self.head(functional.mish(y * gate[:, :, None, None]).amax((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual, as of MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depth = conv(3, 8), conv(8, 16), conv(16, 16, groups=16)
        self.project, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head((y + self.project(self.depth(self.expand(y)))).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.group, self.head = conv(3, 16), conv(16, 16, groups=4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.group(self.stem(x)).mean((2, 3)))


class Concatenated(nn.Module):
    """A head as of detectors: parts are joined, and sizes in a view are fixed numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 8), conv(3, 4)
        self.mask = nn.Conv2d(12, 1, 1)  # one output
        self.fc = nn.Linear(12 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x)], 1)
        y = y * torch.sigmoid(self.mask(y))
        return self.fc(y.view(-1, 12 * 36))


class ByDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)) * scale)


def trained(model: nn.Module, config: list[dict[str, Any]], call: Callable[[], Tensor], **options: Any) -> AGPPruner:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = AGPPruner(model, config, optimizer, pruning_algorithm="l1", **options)
    pruner.compress()
    for epoch in range(3):
        pruner.update_epoch(epoch)
        optimizer.zero_grad()
        call().square().sum().backward()
        optimizer.step()
    return pruner


@pytest.mark.parametrize("kind", [Gated, Depthwise, Grouped, Concatenated])
@pytest.mark.parametrize("batch", [1, 4])
def test_masked_and_small_model_agree(kind: type[nn.Module], batch: int, tmp_path: Any) -> None:
    """Counts of channels agree, with shifts of norms behind them, grouped layers, products, cat, views; batch 1 too."""
    torch.manual_seed(0)
    model = kind().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -1, 1)
    x = torch.randn(batch, 3, 6, 6, dtype=torch.float64)
    pruner = trained(
        model, [{**ENTRY, "op_types": ["Conv2d", "Linear"]}], lambda: model.train()(x) if batch > 1 else model.eval()(x)
    )
    result = pruner.shrink()
    for inputs in (x, torch.randn(3, 3, 6, 6, dtype=torch.float64)):
        torch.testing.assert_close(result.model.eval()(inputs), model.eval()(inputs), rtol=1e-10, atol=1e-10)
    assert result.plan.n_cut
    assert sum(one.numel() for one in result.model.parameters()) < sum(one.numel() for one in model.parameters())
    result.plan.save(tmp_path / "plan.json")  # reloading: the original class, the plan, then the weights
    fresh = torchshear.shrink(kind().double(), torchshear.PruningPlan.load(tmp_path / "plan.json"), x)
    fresh.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(fresh.eval()(x), result.model.eval()(x))


def test_an_excluded_layer_keeps_its_outputs() -> None:
    torch.manual_seed(0)
    model, x = Depthwise(), torch.randn(2, 3, 6, 6)
    config = [{**ENTRY, "op_types": ["Conv2d"]}, {"exclude": True, "op_names": ["expand.0"]}]
    small = trained(model, config, lambda: model(x)).shrink().model
    assert (small.expand[0].out_channels, small.depth[0].out_channels, small.stem[0].out_channels) == (16, 16, 4)


def test_no_layer_vanishes() -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(2, 3, 6, 6)
    config = [{**ENTRY, "final_sparsity": 0.99, "op_types": ["Conv2d", "Linear"]}]
    small = trained(model, config, lambda: model(x)).shrink().model
    assert (small.body[0].out_channels, small.one.out_features) == (1, 1)
    norms = Depthwise()
    with torch.no_grad():
        norms.expand[1].weight.fill_(0.0)  # all of one layer would go by a threshold
        norms.depth[1].weight.fill_(0.0)
    given = {"trainer": lambda model, optimizer: (model(x).sum().backward(), optimizer.step()), "training_epochs": 1}
    optimizer = torch.optim.SGD(norms.parameters(), lr=0.0)
    pruner = SlimPruner(norms, [{"sparsity": 0.7, "op_types": ["BatchNorm2d"]}], optimizer=optimizer, **given)
    assert min(one.out_channels for one in pruner.shrink().model.modules() if isinstance(one, nn.Conv2d)) >= 1


def test_example_inputs_in_any_packaging() -> None:
    torch.manual_seed(0)
    config = [{**ENTRY, "op_types": ["Conv2d"]}]
    x, scale = torch.randn(2, 3, 6, 6), torch.rand(2, 1)
    for options in ({}, {"dummy_input": {"x": x, "scale": scale}}, {"args": x, "kwargs": {"scale": scale}}):
        model = ByDictionary()
        small = trained(model, config, lambda: model(x, scale=scale), **options).shrink().model  # noqa: B023
        assert small(x, scale=scale).shape == (2, 3)


def test_odd_widths_are_told() -> None:
    """Masks alone bring no speed, and neither may widths that the device does not like: the report has a verdict."""
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(2, 3, 6, 6)
    report = trained(model, [{**ENTRY, "op_types": ["Conv2d", "Linear"]}], lambda: model(x)).shrink().report
    assert report.speed is not None
    assert "MACs" in str(report)
