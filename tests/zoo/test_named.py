"""Models that were refused, or pruned wrongly, before: each with the outcome that is right."""

import importlib.util
from pathlib import Path

import pytest
import torch

import torchshear
from tests.zoo.torchvision_models import load_torchvision
from tests.zoo.transformers_models import build, is_installed

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


@pytest.mark.skipif(not is_installed(), reason="needs transformers: make zoo-setup")
def test_qwen3_next_with_its_loops_over_chunks() -> None:
    """Its experts have no float64 kernel, and its traced form takes another branch for them."""
    model, args, kwargs = build("qwen3_next")
    result = torchshear.prune(model, args, kwargs)
    assert result.report.after.n_params < 0.35 * result.report.before.n_params
    assert result.verification.reference == "kept positions"
    assert result.verification.dtype == torch.float32
    assert result.verification.max_error < 1e-4
    assert result.verification.modes == ("eval", "train")


@pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="needs ultralytics: make zoo-setup")
def test_rt_detr_of_ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It picks its queries by top-k, and its batch norms meet gradients that torch's own kernel reads wrongly."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    load_torchvision()
    from ultralytics.nn.tasks import RTDETRDetectionModel

    torch.manual_seed(0)
    model = RTDETRDetectionModel("rtdetr-l.yaml", nc=5, verbose=False).eval()
    result = torchshear.prune(model, (torch.randn(1, 3, 128, 128),), ratio=0.3)
    assert result.report.after.n_params < 0.6 * result.report.before.n_params
    assert result.verification.dtype == torch.float64
    assert result.verification.max_error < 1e-9
    assert result.verification.max_gradient_error < 1e-5
