"""A network in the manner of YOLOv8 prunes whole: exact, in native form, trains, and runs in onnxruntime."""

import copy
from pathlib import Path

import pytest
import torch

import torchshear
from tests.networks import randomise
from tests.oracle import assert_equals_masked, assert_is_slice
from tests.strategies import kept_sets
from tests.yolo import Yolo
from torchshear.dependency import ChannelGroups
from torchshear.pruners import plan_from_kept
from torchshear.speedup import shrink_to_form


@pytest.fixture(scope="module")
def model() -> Yolo:
    return randomise(Yolo(8).eval(), 3)


@pytest.fixture(scope="module")
def groups(model: Yolo) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, (IMAGE,)))


@pytest.fixture(scope="module")
def result(model: Yolo) -> torchshear.PruneResult:
    return torchshear.prune(model, (IMAGE,), ratio=0.5)


IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_half_of_every_group_goes(model: Yolo, result: torchshear.PruneResult, tmp_path: Path) -> None:
    assert result.form == "native"
    assert result.verification.reference == "masked"
    assert result.verification.max_error < 1e-9
    assert result.report.achieved_ratio == 0.5
    assert result.report.after.n_params < 0.35 * result.report.before.n_params
    assert_equals_masked(model, result.model, result.plan, (IMAGE,))
    block = result.model.large[1]
    assert (block.hidden, block.enter.conv.out_channels) == (32, 64)
    assert all(len(p.unique()) == p.numel() for p in [result.model.head.bins])
    file = torchshear.export_onnx(result.model, tmp_path / "small.onnx", (IMAGE,))
    assert file.dynamic_batch
    assert result.model(torch.randn(1, 3, 96, 64)).shape == (1, 11, 12 * 8 + 6 * 4 + 3 * 2)


def test_it_trains_on_raw_maps(result: torchshear.PruneResult) -> None:
    small = copy.deepcopy(result.model).train()
    maps = small(IMAGE)
    assert [tuple(x.shape) for x in maps] == [(2, 71, 8, 8), (2, 71, 4, 4), (2, 71, 2, 2)]
    sum(x.square().mean() for x in maps).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in small.parameters())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.zoo)])
@pytest.mark.parametrize("form", ["native", "traced"])
def test_random_units_of_every_group(model: Yolo, groups: ChannelGroups, seed: int, form: str) -> None:
    """Halves of a C2f may lose different numbers of channels; the sizes of its split then are not one attribute."""
    plan = plan_from_kept(groups, kept_sets(groups, seed))
    small = shrink_to_form(model, plan, form="traced" if form == "traced" else None).model
    assert_equals_masked(model, small, plan, (IMAGE,))
    if form == "native":
        assert_is_slice(model, small, plan)
