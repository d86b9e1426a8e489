"""Targets of size against real files: ONNX and safetensors as a user writes them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import torchshear
from tests.latency_target.pretending import pretend
from tests.speedup.latency.making_tables import ALIGNMENT, joined
from torchshear import _file_size
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners.selection._size import parse_size

TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(50, 24), nn.LSTM(24, 40, 1, batch_first=True)
        self.head = nn.Linear(40, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.table(tokens))[0][:, -1])
        return out


class Tied(nn.Module):
    """A table that also makes the output, weights in half precision beside others in full, and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 32).half()
        self.norm, self.out = nn.BatchNorm1d(64), nn.Linear(32, 50, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.one(self.table(tokens).mean(1))))
        out: Tensor = self.out(self.two(x.half()).float())
        return out


def convolutions() -> nn.Sequential:
    """Convolutions with batch norms, which the exporter folds into them."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    layers += [nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Any, Any, tuple[float, ...]]] = {
    "batch norms": (convolutions, image, (0.9, 0.4)),
    "half precision": (lambda: convolutions().half(), lambda: image().half(), (0.6,)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(32, 4, 256, batch_first=True),
        lambda: image()[:, 0, :5].repeat(1, 1, 2),
        (0.95, 0.6),
    ),
    "lstm": (Recurrent, lambda: TOKENS, (0.7,)),
    "tied and mixed": (Tied, lambda: TOKENS, (0.7,)),
}


def files(model: nn.Module, x: Tensor, folder: Path) -> tuple[int, int]:
    """Bytes of both files, as anybody writes them."""
    with torch.no_grad():
        program = torchshear.export_onnx(model, folder / "model.onnx", x, rtol=0.1, atol=0.1)
    save_model(model, str(folder / "model.safetensors"))
    assert program.size_bytes == sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    return program.size_bytes, (folder / "model.safetensors").stat().st_size


SLOW = ("batch norms", "half precision", "transformer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.zoo) if name in SLOW else name for name in CASES]
)
def test_real_files_are_within_the_target_and_near_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, example, shares = CASES[name]
    model, x = make().eval(), example()
    dense, _ = files(model, x, tmp_path)
    for share in shares:
        result = torchshear.prune(model, x, target_size=share)
        onnx, weights = files(result.model, x, tmp_path)
        assert result.file is not None
        assert (result.file.dense_bytes, result.file.pruned_bytes) == (dense, onnx)
        assert max(onnx, weights) <= share * dense
        assert result.report.after.size_bytes < result.report.before.size_bytes
        assert onnx >= (share - 0.15) * dense
        assert result.report.target == {"target_size": int(share * dense)}
        assert f"bytes       {dense:,} -> {onnx:,}" in str(result.report)


def tensor_bytes(model: nn.Module) -> int:
    tensors = {one.data_ptr(): one for one in (*model.parameters(), *model.buffers()) if one.numel()}
    return sum(one.numel() * one.element_size() for one in tensors.values())


@pytest.mark.parametrize("name", CASES)
def test_a_plan_counts_tensors(name: str) -> None:
    torch.manual_seed(0)
    make, example, _ = CASES[name]
    model, x = make().eval(), example()
    groups = torchshear.analyze(torchshear.trace(model, x))
    plan = torchshear.plan(groups, target_size=0.6, scope="global")
    small = tensor_bytes(torchshear.shrink(model, plan, x))
    assert 0.5 * tensor_bytes(model) <= small <= 0.6 * tensor_bytes(model)
    most = tensor_bytes(model) * 3 // 4
    both = torchshear.plan(groups, target_size=f"{most}B", target_params=0.65)
    assert tensor_bytes(torchshear.shrink(model, both, x)) <= most


@pytest.fixture(scope="module")
def smallest() -> tuple[nn.Module, int]:
    """A model, and the smallest possible size as the refusal of less says it."""
    model = convolutions().eval()
    with pytest.raises(PlanError, match="target_size: at most 1,000 bytes") as raised:
        torchshear.prune(model, image(), target_size="1KB", criterion=never_called)
    found = re.search(r"best possible is ([0-9,]+)", str(raised.value))
    assert found is not None
    return model, int(found[1].replace(",", ""))


def never_called(group: Any, weights: Any, statistics: Any) -> Tensor:
    raise AssertionError("scored before the target was checked")


def test_the_smallest_possible_size_is_said_and_is_possible(smallest: tuple[nn.Module, int], tmp_path: Path) -> None:
    model, least = smallest
    result = torchshear.prune(model, image(), target_size=f"{least} B")
    assert max(files(result.model, image(), tmp_path)) <= least
    with pytest.raises(PlanError, match="best possible"):
        torchshear.prune(model, image(), target_size=f"{least - 1}B")


def test_a_file_that_turns_out_larger_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the exporter writes more for the result than for the narrowest network."""
    measure, seen = _file_size._file_bytes, []

    def larger(model: nn.Module, *given: Any) -> tuple[int, int]:
        seen.append(model)
        onnx, weights = measure(model, *given)
        return onnx + (2000 if len(seen) > 2 else 0), weights

    monkeypatch.setattr(_file_size, "_file_bytes", larger)
    result = torchshear.prune(convolutions().eval(), image(), target_size=0.5)
    assert len(seen) == 4
    assert result.file is not None
    assert result.file.pruned_bytes <= result.file.most_bytes


@pytest.mark.zoo
def test_it_holds_beside_a_latency_and_in_a_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch)
    model, args, _ = joined()
    words: dict[str, Any] = {"align": ALIGNMENT, "target_size": 0.5, "must_be_faster": False}
    dense, _ = files(model, args[0], tmp_path)
    alone = torchshear.prune(model, args, target_latency=0.9, align=ALIGNMENT)
    assert files(alone.model, args[0], tmp_path)[0] > 0.5 * dense
    both = torchshear.prune(model, args, target_latency=0.9, **words)
    family = torchshear.prune_family(model, args, targets=[0.9, 0.6], progress=False, **words)
    for result in (both, *family.members):
        assert max(files(result.model, args[0], tmp_path)) <= 0.5 * dense
        assert result.allocation is not None
        assert result.file is not None
    with pytest.raises(PlanError, match="target_size: at most 1,000 bytes"):
        torchshear.prune(model, args, target_latency=0.9, **(words | {"target_size": "1KB"}))


def test_parameters_and_bytes_hold_together_and_after_a_compensation(tmp_path: Path) -> None:
    model = convolutions().eval()
    dense, _ = files(model, image(), tmp_path)
    result = torchshear.prune(
        model, image(), target_size=0.6, target_params=0.3, target_macs=0.9, compensate="constants"
    )
    assert files(result.model, image(), tmp_path)[0] <= 0.6 * dense
    assert result.report.after.n_params <= 0.3 * result.report.before.n_params


def test_of_a_model_without_values_tensors_count() -> None:
    with torch.device("meta"):
        model = convolutions().eval()
        x = torch.empty(2, 3, 16, 16)
    result = torchshear.prune(model, x, target_size=0.5, criterion=lambda group, weights, _: torch.ones(group.width))
    assert result.file is None
    assert result.report.after.size_bytes <= 0.5 * result.report.before.size_bytes
    assert "of tensors alone" in str(result.report)


@pytest.mark.parametrize(
    ("given", "share", "size"),
    [
        (0.5, 0.5, None),
        (1, 1.0, None),
        ("0.5", 0.5, None),
        ("2.5MB", None, 2.5e6),
        ("800 kb", None, 8e5),
        ("1MiB", None, 2**20),
        ("1_000B", None, 1000),
        ("2GiB", None, 2**31),
    ],
)
def test_sizes_as_they_are_written(given: object, share: float | None, size: float | None) -> None:
    assert parse_size(given) == (share, size)


@pytest.mark.parametrize("given", [0, -1, 1.5, 2_000_000, True, "2.5", "MB", "2.5 meters", "-1MB", "0MB", [1], ""])
def test_what_is_no_size_is_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"target_size=.*2\.5MB"):
        torchshear.prune(convolutions(), image(), target_size=given)


def test_parts_of_a_model_have_no_file() -> None:
    model = nn.Sequential(convolutions(), nn.Identity()).eval()
    with pytest.raises(ArgumentError, match="only parts are captured"):
        torchshear.prune(model, image(), submodules=["0"], target_size=0.5)


def test_what_holds_already_and_what_says_it_twice_is_refused() -> None:
    with pytest.raises(ArgumentError, match="keeps within it already"):
        torchshear.prune(convolutions(), image(), target_size="1GB")
    with pytest.raises(ArgumentError, match="both say how much"):
        torchshear.prune(convolutions(), image(), target_size=0.5, ratio=0.5)
