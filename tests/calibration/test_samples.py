"""Samples that are held out: those that are alike together, and every fourth where none are."""

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.calibration._samples import SampleSplit, hold_out_alike


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def from_sources(n_sources: int, n: int, order: str) -> tuple[Tensor, Tensor]:
    """Images, each with the colours and contrasts of its source; returns them, and the number of the source."""
    numbers = torch.arange(n)
    source = numbers % n_sources if order == "in turn" else numbers * n_sources // n
    colours, contrasts = 3 * noise(n_sources, 3, 1, 1), noise(n_sources, 3, 1, 1, seed=2).exp()
    return colours[source] + contrasts[source] * noise(n, 3, 6, 6, seed=1), source


@pytest.mark.parametrize("order", ["in turn", "one after another"])
def test_samples_of_one_source_are_held_out_together(order: str) -> None:
    images, source = from_sources(13, 104, order)
    graph = torchshear.trace(nn.Conv2d(3, 4, 3), images[:2])
    held_out = hold_out_alike(graph, [[images[:60]], [images[60:]]], [60, 44])
    assert held_out is not None
    assert 104 // 8 <= int(held_out.sum()) <= 104 // 4
    shares = [float(held_out[source == number].float().mean()) for number in range(13)]
    assert sum(0 < share < 1 for share in shares) <= 1
    split = SampleSplit((60, 44), held_out)
    both = torch.cat([split.is_held_out(torch.arange(60), 0), split.is_held_out(torch.arange(44), 1)])
    assert torch.equal(both, held_out)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Conv2d(3, 4, 3), noise(128, 3, 8, 8)),
        (nn.Linear(6, 3), noise(200, 6)),
        (nn.Embedding(9, 3), torch.randint(0, 9, (128, 12), generator=torch.Generator().manual_seed(0))),
        (nn.Conv2d(3, 4, 3), torch.ones(128, 3, 8, 8)),
        (nn.Conv2d(3, 4, 3), torch.full((128, 3, 8, 8), torch.nan)),
        (nn.Conv2d(3, 4, 3), from_sources(4, 32, "in turn")[0]),
    ],
    ids=["images", "vectors", "tokens", "all alike", "NaN", "few"],
)
def test_elsewhere_every_fourth_is_held_out(model: nn.Module, x: Tensor) -> None:
    graph = torchshear.trace(model, x[:2])
    assert hold_out_alike(graph, [[x]], [len(x)]) is None
    assert SampleSplit((len(x),)).is_held_out(torch.arange(8), 0).tolist() == [False, False, False, True] * 2


def test_the_error_of_a_removal_is_taken_on_other_sources() -> None:
    """Products over samples held out are those of whole sources."""
    images, _ = from_sources(13, 104, "in turn")
    graph = torchshear.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), images[:2])
    held_out = hold_out_alike(graph, [[images]], [104])
    assert held_out is not None
    statistics = torchshear.collect(graph, [images], batches=1, criteria="reconstruction", progress=False)
    (seen,) = (one for one in statistics.values.values() if len(one.grams))
    assert int(seen.held_out[-1, -1]) == min(int(held_out.sum()) * 36, 1024)
    assert int(seen.grams[-1, -1]) == 1024
