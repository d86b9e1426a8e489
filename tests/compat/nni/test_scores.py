"""What pruner classes rank channels by, against the definitions worked out by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.compat.nni.plain import HALF, Plain, batches
from tests.networks import image, randomise
from torchshear.compat.nni import ConfigPruner, L1NormPruner, L2NormPruner, SlimPruner, TaylorFOWeightPruner
from torchshear.errors import MaskError


def with_loud_norm() -> nn.Module:
    """Its norm has scales that would decide alone, were they counted."""
    model = randomise(Plain()).double().eval()
    model.norm.weight.data.copy_(torch.arange(8, 0, -1) * 100.0)
    model.one.weight.data.mul_(torch.arange(1, 9).reshape(-1, 1, 1, 1))
    return model


def kept(rows: Tensor) -> list[int]:
    """The better half of the rows."""
    return sorted(rows.argsort(descending=True)[: len(rows) // 2].tolist())


def taylor_rows(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    total = torch.zeros(8, dtype=torch.float64)
    for x, y in data:
        weight = model.one.weight
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x), y), [weight])
        total += (weight * gradient).square().flatten(1).sum(1).detach()
    return total


@pytest.mark.parametrize("pruner", [L1NormPruner, L2NormPruner, TaylorFOWeightPruner])
@pytest.mark.parametrize("dependency_aware", [False, True])
def test_filters_are_ranked_by_their_own_weights_alone(pruner: type, dependency_aware: bool) -> None:
    model, args = with_loud_norm(), (image().double(),)
    weight, data = model.one.weight.detach().flatten(1), [(x.double(), y) for x, y in batches()]
    expected = {
        L1NormPruner: lambda: weight.abs().sum(1),
        L2NormPruner: lambda: weight.square().sum(1).sqrt(),
        TaylorFOWeightPruner: lambda: taylor_rows(model, data),
    }[pruner]()
    given = {"data": data, "loss_fn": functional.cross_entropy, "batches": 3} if pruner is TaylorFOWeightPruner else {}
    plan = pruner(model, HALF, args=args, dependency_aware=dependency_aware, **given).plan
    assert plan.kept["one.weight[0]"].tolist() == kept(expected)
    with_norm = torchshear.plan(torchshear.analyze(torchshear.trace(model, args)), "l1", {"one": 0.5})
    assert with_norm.kept["one.weight[0]"].tolist() != kept(expected), "the criterion counts the norm, and it decides"


def test_a_config_of_neural_compressor_ranks_weights_alone() -> None:
    model, args = with_loud_norm(), (image().double(),)
    config = [{"pruning_type": "magnitude", "pattern": "1xchannel", "target_sparsity": 0.5, "pruning_scope": "local"}]
    expected = kept(model.one.weight.detach().abs().flatten(1).sum(1))
    assert ConfigPruner(model, config, args=args).plan.kept["one.weight[0]"].tolist() == expected
    result = torchshear.prune(model, args, config=config)
    assert result.plan.kept["one.weight[0]"].tolist() == expected


class CoupledNorms(nn.Module):
    """Two norms whose channels are added, and one that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        for name, inputs in (("a", 3), ("b", 8), ("c", 8)):
            self.add_module(name, nn.Conv2d(inputs, 8, 1))
            self.add_module(f"norm_{name}", nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(self.a(x))
        x = torch.relu(x + self.norm_b(self.b(torch.relu(x))))
        return self.head(torch.relu(self.norm_c(self.c(x))))


def test_slim_takes_the_mean_of_coupled_norms_to_rank_them_beside_single_ones() -> None:
    model = CoupledNorms().eval()
    scales = {"a": [0.2, 0.3, 0.1, 0.9, 0.7, 0.5, 0.6, 0.8], "b": [0.2, 0.1, 0.3, 0.7, 0.9, 0.7, 0.6, 0.8]}
    with torch.no_grad():
        for name, own in scales.items():
            model.get_submodule(f"norm_{name}").weight.copy_(torch.tensor(own))
        model.norm_c.weight.copy_(torch.tensor([-0.25, 0.75, 0.45, 0.35, 0.65, -0.15, 0.85, 0.95]))
    pruner = SlimPruner(model, [{"op_types": ["BatchNorm2d"], "sparsity": 0.4375}], args=(image(),))
    plan = pruner.plan  # 7 of 16 go: 0.2, 0.2, 0.2 of the coupled ones, and 0.15, 0.25, 0.35, 0.45
    assert plan.kept["a.weight[0]"].tolist() == [3, 4, 5, 6, 7]
    assert plan.kept["c.weight[0]"].tolist() == [1, 4, 6, 7]


def test_a_layer_that_no_pattern_fits_is_skipped_and_says_so() -> None:
    model = randomise(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    x = torch.randn(2, 8)
    asked = {"pruning_type": "magnitude", "target_sparsity": 0.5}
    six, eight = ({"op_names": [name], "pattern": "4x1", **asked} for name in ("0", "2"))
    pruner = ConfigPruner(model, [six, eight], args=(x,))
    skipped, masked = pruner.masks.layers
    assert (skipped.name, skipped.n_masked) == ("0", 0)
    assert "6 outputs cannot be divided" in skipped.note
    assert (masked.name, masked.achieved) == ("2", 0.5)
    assert pruner.masks.tensors.keys() == {"2.weight"}
    with pytest.raises(MaskError, match="pattern '4x1' fits none of 1 layers: '0' was skipped"):
        ConfigPruner(model, [six], args=(x,)).compress()
