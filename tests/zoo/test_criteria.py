"""Every criterion in every scope on named architectures: what is shrunk equals what is masked, in float64."""

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchshear
from tests.oracle import fresh_inputs
from tests.zoo import zoo
from torchshear.calibration._statistics import Statistics
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners import UnscorableError, registered_criteria
from torchshear.pruners.criteria._criterion import find_criterion
from torchshear.pruners.selection._request import SCOPES

pytestmark = pytest.mark.zoo
NAMES = ("torchvision:resnet18", "torchvision:mobilenet_v2", "transformers:vit", "transformers:bert")


@cache
def seen(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], ChannelGroups, Statistics]:
    model, args, kwargs = zoo.build(name)
    if name.startswith("torchvision:"):
        args = (torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)
    groups = torchshear.analyze(torchshear.trace(model, args, kwargs))
    loader = [fresh_inputs(args or kwargs, seed) for seed in range(2)]
    return model, args, kwargs, groups, torchshear.collect(groups, loader, loss, 2, False, registered_criteria())


def loss(output: Any, _: Any) -> Tensor:
    """Another weight for each number of a sample, so that no gradient is the same everywhere."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    weighed = [leaf.flatten(1) * torch.linspace(-1, 2, leaf[0].numel()) for leaf in leaves]
    return torch.stack([each.square().mean() for each in weighed]).sum()


@pytest.mark.parametrize("criterion", registered_criteria())
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_shrunk_equals_what_is_masked(name: str, criterion: str, scope: str) -> None:
    if importlib.util.find_spec(name.partition(":")[0]) is None:
        pytest.skip(f"needs {name}")
    model, args, kwargs, groups, statistics = seen(name)
    weights = {key: entry.tensor for key, entry in groups.graph.state.items() if entry.kind == "parameter"}
    reasons = []
    for group in groups.prunable:
        try:
            find_criterion(criterion)(group, weights, statistics)
        except UnscorableError as error:
            reasons.append(str(error))
    assert all(reason.startswith(f"{criterion}: ") for reason in reasons)
    if len(reasons) == len(groups.prunable):
        with pytest.raises(ArgumentError, match="cannot score any"):
            torchshear.plan(groups, criterion, 0.3, statistics=statistics, scope=scope)
        return
    plan = torchshear.plan(groups, criterion, 0.3, statistics=statistics, scope=scope)
    assert plan.n_cut
    small = torchshear.shrink(model, plan)
    assert torchshear.verify(model, small, plan, args, kwargs).max_error < 1e-9
