"""Refit beyond the memory: activations in files, and layers with too many unknowns for one system."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.errors import ArgumentError, OutputError
from torchshear.pruners import plan_from_kept
from torchshear.speedup.compensation import _frontier, _layer_fits
from torchshear.speedup.compensation._frontier import Frontier, Values
from torchshear.speedup.compensation._refit import refit


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Branches(nn.Module):
    """Activations in place, views of them, a residual, parts of a tensor, and a transposed layout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        seen = x.flatten(2)
        x = x.add_(1.0)
        both = self.inner(x)
        left, right = both[:, :12], both[:, 12:]
        x = x + self.outer(torch.cat([left.relu_(), right], 1))
        out: Tensor = self.head((x.flatten(2) + seen).permute(0, 2, 1)).mean(1)
        return out


def data(n_batches: int = 4) -> list[tuple[Tensor]]:
    return [(noise(8, 3, 6, 6, seed=100 + number),) for number in range(n_batches)]


def test_activations_in_files_give_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = Branches().double().eval()
    result = torchshear.prune(model, noise(2, 3, 6, 6), ratio=0.5)
    stored: list[int] = []
    store = Values.store

    def counted(values: Values, *given: object) -> int:
        stored.append(store(values, *given))  # type: ignore[arg-type]
        return stored[-1]

    monkeypatch.setattr(Values, "store", counted)
    small, expected = refit(model, result.model, result.plan, data(), batches=4, progress=False)
    assert not stored
    again, record = refit(model, result.model, result.plan, data(), batches=4, memory=1, progress=False)
    assert sum(stored) > 100_000
    assert record == expected
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in small.state_dict().items())
    assert not list(tmp_path.glob("torchshear-*"))


@pytest.mark.parametrize(
    "tensor",
    [
        noise(4, 3, 5, 5).to(memory_format=torch.channels_last),
        noise(4, 6).T,
        noise(9)[3:],
        noise(3, 4).bfloat16(),
        noise(5) > 0,
        torch.arange(7),
    ],
)
def test_a_tensor_comes_back_from_its_file_as_it_was(tensor: Tensor, tmp_path: Path) -> None:
    values = Values([tensor, 3], can_move=True)
    assert values.store(tmp_path, ()) == tensor.nbytes
    assert values[1] == 3
    assert torch.equal(values[0], tensor)
    assert values[0].stride() == tensor.stride()
    assert len(list(tmp_path.iterdir())) == 1


def test_memory_that_is_written_to_stays_and_what_is_read_last_goes_first(tmp_path: Path) -> None:
    written, late, early = noise(100), noise(100, seed=1), noise(100, seed=2)
    with Frontier(limit=2000, last_use={"late": 9, "early": 2, "view": 99, "written": 99}) as frontier:
        frontier.dense = {"written": Values([written]), "view": Values([written[:50]], can_move=True)}
        frontier.small = {"late": Values([late], can_move=True), "early": Values([early], can_move=True)}
        frontier.small["new"] = frontier.collect(lambda number: noise(10), 1, can_move=True)
        in_memory = {name for held in (frontier.dense, frontier.small) for name in held if list(held[name].tensors())}
        assert in_memory == {"written", "view", "early", "new"}
        assert torch.equal(frontier.small["late"][0], late)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_frontier._StoredTensor, "__init__", full)
    model = Branches().double().eval()
    result = torchshear.prune(model, noise(2, 3, 6, 6), ratio=0.5)
    with pytest.raises(OutputError, match="memory=.*No space left"):
        refit(model, result.model, result.plan, data(), batches=4, memory=1, progress=False)


@pytest.mark.parametrize("memory", [0, -1, 1.5, True, None])
def test_memory_is_a_number_of_bytes(memory: object) -> None:
    model = Branches().double().eval()
    result = torchshear.prune(model, noise(2, 3, 6, 6), ratio=0.5)
    with pytest.raises(ArgumentError, match="memory"):
        refit(model, result.model, result.plan, data(), batches=4, memory=memory, progress=False)  # type: ignore[arg-type]


WIDE = {
    "convolution": (nn.Conv2d(8, 6, 3, padding=1, stride=2), (16, 8, 9, 9), "channel form"),
    "without bias": (nn.Conv1d(8, 6, 5, dilation=2, bias=False), (16, 8, 20), "channel form"),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), (16, 8, 5, 5), "channel form"),
    "grouped": (nn.Conv2d(8, 6, 3, groups=2), (16, 8, 6, 6), "least squares"),
    "linear": (nn.Linear(8, 6), (64, 8), "least squares"),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_layers_make_up_for_channels_that_were_copies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each removed channel has a copy that stays, what reads it loses nothing."""
    layer, shape, method = WIDE[name]
    torch.manual_seed(0)
    first = nn.Linear(4, 8) if name == "linear" else type(layer)(4, 8, 1)
    model = nn.Sequential(first, nn.ReLU(), layer).double().eval()
    with torch.no_grad():  # channels 2k and 2k + 1 are alike
        weight = first.weight.transpose(0, 1) if name == "transposed" else first.weight
        weight[1::2], first.bias[1::2] = weight[0::2].clone(), first.bias[0::2].clone()
    loader = [(noise(shape[0], 4, *shape[2:], seed=number),) for number in range(8)]
    groups = torchshear.analyze(torchshear.trace(model, loader[0][0][:2]))
    (group,) = (group for group in groups if group.width == 8)
    plan = plan_from_kept(groups, {group.name: [0, 2, 4, 6]})
    small = torchshear.shrink(model, plan)
    monkeypatch.setattr(_layer_fits, "MAX_UNKNOWNS", 3 if name == "linear" else 4)  # four channels are left
    fitted, record = refit(model, small, plan, loader, batches=8, progress=False)
    assert record.error_before > 0.01
    assert record.error_after < 1e-9
    assert method in record.layers[-1].method
    unseen = noise(2, 4, *shape[2:], seed=77)
    with torch.no_grad():
        assert torch.allclose(fitted(unseen), model(unseen), atol=1e-3)


@pytest.mark.zoo
def test_a_layer_of_too_many_unknowns_is_fitted_by_its_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 256, 8), nn.ReLU(), nn.Conv1d(256, 16, 64, padding=32), nn.ReLU()).eval()
    loader = [torch.randn(4, 1, 200).cumsum(2) for _ in range(4)]
    result = torchshear.prune(model, loader[0][:1], ratio=0.5)
    small, record = refit(model, result.model, result.plan, loader, batches=4, progress=False)
    assert record.layers[-1].method
    assert record.is_kept
    assert record.error_after < 0.2 * record.error_before
    unseen = torch.randn(2, 1, 300).cumsum(2)
    with torch.no_grad():
        errors = [float((one(unseen) - model(unseen)).square().sum()) for one in (result.model, small)]
    assert errors[1] < 0.5 * errors[0]
