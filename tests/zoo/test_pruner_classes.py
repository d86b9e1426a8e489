"""Config lists and pruner classes on named torchvision architectures."""

import pytest
import torch

from tests.zoo.torchvision_models import build, is_installed
from torchshear.compat import nni

pytestmark = [pytest.mark.zoo, pytest.mark.skipif(not is_installed(), reason="needs torchvision: make zoo-setup")]


def agree(masked: torch.nn.Module, small: torch.nn.Module, *args: torch.Tensor) -> bool:
    with torch.no_grad():
        expected, got = masked.double().eval()(*args), small.double().eval()(*args)
    return torch.allclose(expected, got, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_resnet18_by_a_list_of_nni() -> None:
    model, args = build("resnet18")
    config = [
        {"op_types": ["Conv2d"], "sparsity": 0.5},
        {"op_partial_names": ["layer2."], "op_types": ["Conv2d"], "sparsity": 0.25},
        {"op_names": ["layer3.0.conv1", "layer4.1.conv2"], "exclude": True},
    ]
    pruner = nni.L1FilterPruner(model, config, args=args)
    masked, result = pruner.compress(), pruner.shrink()
    small = result.model
    assert small.conv1.out_channels == small.layer1[1].conv2.out_channels == 32
    assert small.layer2[0].conv1.out_channels == small.layer2[0].downsample[0].out_channels == 96
    assert small.layer3[0].conv1.out_channels == 256  # excluded itself
    assert small.layer3[0].conv2.out_channels == 128
    assert small.layer4[0].conv2.out_channels == 512  # coupled with what is excluded
    assert small.fc.out_features == 1000
    assert agree(masked, small, *(arg.double() for arg in args))
    assert result.verification.max_error <= 1e-9
    reasons = {row.layer: row.reason for row in pruner.resolved.rows}
    assert "coupled with 'layer4.1.conv2', which config_list[2] excludes" in reasons["layer4.0.conv2"]


def test_mobilenet_v2_by_its_norms() -> None:
    model, args = build("mobilenet_v2")
    config = [{"op_types": ["BatchNorm2d"], "sparsity": 0.3}]
    pruner = nni.SlimPruner(model, config, args=args)
    masked, result = pruner.compress(), pruner.shrink()
    groups = [group for group in result.plan.groups if group.ratio]
    total, left = sum(group.width for group in groups), sum(len(group.kept) for group in groups)
    assert total - left == int(total * 0.3 + 1e-9)
    assert len({len(group.kept) / group.width for group in groups}) > 2
    assert agree(masked, result.model, *(arg.double() for arg in args))
