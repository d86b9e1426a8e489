"""Named torchvision architectures: pruned by half, verified, exported, run in onnxruntime with batches 1 and 3."""

from pathlib import Path

import pytest
import torch

import torchshear
from tests.zoo.torchvision_models import NAMES, build, is_installed

pytestmark = [pytest.mark.zoo, pytest.mark.skipif(not is_installed(), reason="needs torchvision: make zoo-setup")]

# Share of the parameters that may be left when half of every channel group goes: a quarter where all widths are free,
# more where few are (ShuffleNet's halves are tied to each other by its shuffles).
MOST_LEFT = {"shufflenet_v2_x1_0": 0.5, "mobilenet_v3_small": 0.37, "mobilenet_v2": 0.35, "efficientnet_b0": 0.33}


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_channels_go(name: str, tmp_path: Path) -> None:
    model, args = build(name)
    result = torchshear.prune(model, args, ratio=0.5)
    left = result.report.after.n_params / result.report.before.n_params
    assert left <= MOST_LEFT.get(name, 0.32)
    assert result.verification.dtype == torch.float64
    assert result.verification.max_error <= 1e-9
    assert result.verification.reference == ("kept positions" if name == "convnext_tiny" else "masked")
    file = torchshear.export_onnx(result.model, tmp_path / "small.onnx", args, check_batches=(1, 3))
    assert file.dynamic_batch
    assert {1, 3} <= set(file.batches_checked)
    small = result.model.train()
    outputs = small(torch.randn(2, *args[0].shape[1:]))
    main = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    main.square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in small.parameters() if p.grad is not None)
