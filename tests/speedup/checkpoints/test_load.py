"""Loading a checkpoint into a model: one tensor at a time, tied, and nothing changed where it does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import torchshear
from tests.networks import Tied, randomise
from torchshear import load_checkpoint
from torchshear.errors import ArgumentError, CheckpointError
from torchshear.graph import parameters_on_meta


class Positioned(nn.Module):
    """Makes positions on the device of its input, and keeps a buffer that is not saved."""

    slope: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("slope", torch.tensor([0.5]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.tensor([], dtype=x.dtype, device=x.device).reshape(x.shape[0], 0, x.shape[2]), x], 1)
        places = torch.arange(x.shape[1], device=x.device)[:, None]
        return self.two(torch.relu(self.one(x) + self.slope * places))


def save(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


def test_a_tied_model_on_meta_comes_back_tied(tmp_path: Path) -> None:
    model = randomise(Tied(), 2).bfloat16()
    with parameters_on_meta():
        fresh = Tied()
    fresh.requires_grad_(False)
    load_checkpoint(fresh, save(model, tmp_path))
    for name, tensor in model.named_parameters(remove_duplicate=False):
        loaded = fresh.get_parameter(name)
        assert torch.equal(loaded, tensor)
        assert loaded.dtype == torch.bfloat16
        assert not loaded.requires_grad
    assert len(list(fresh.parameters())) == len(list(model.parameters()))


def test_a_traced_form_captured_on_meta_runs_where_its_weights_are(tmp_path: Path) -> None:
    model, x = Positioned().eval(), torch.randn(2, 3, 4)
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (x,))))
    torchshear.shrink_checkpoint(plan, save(model, tmp_path / "dense"), tmp_path / "small")
    with parameters_on_meta():
        fresh = Positioned().eval()
    small = torchshear.shrink(fresh, plan)
    load_checkpoint(small, tmp_path / "small")
    torch.testing.assert_close(small(x), torchshear.shrink(model, plan)(x))
    assert torch.equal(small.slope, model.slope)


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = randomise(Positioned())
    save(model, tmp_path)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    target = randomise(Positioned(), 5)
    before = {name: parameter.detach().clone() for name, parameter in target.named_parameters()}
    for change, message in (
        ({"one.weight": torch.zeros(5, 4)}, r"'one.weight' has shape \(5, 4\) in the checkpoint .* has \(6, 4\)"),
        ({"three.weight": torch.zeros(5)}, "holds 'three.weight', which Positioned has not"),
    ):
        save_file(tensors | change, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(target, tmp_path)
    save_file({name: t for name, t in tensors.items() if name != "two.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 'two.bias', which Positioned has"):
        load_checkpoint(target, tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in target.named_parameters())
    with torch.device("meta"):
        target = Positioned()
    with pytest.raises(ArgumentError, match=r"'slope' .*parameters_on_meta\(\)"):
        load_checkpoint(target, tmp_path)
    with pytest.raises(ArgumentError, match="model is int; expected a torch.nn.Module"):
        load_checkpoint(5, tmp_path)  # type: ignore[arg-type]


def test_there_must_be_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        load_checkpoint(Positioned(), tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_checkpoint(Positioned(), tmp_path / "notes.txt")


def test_a_header_that_would_fill_memory_is_not_read(tmp_path: Path) -> None:
    for size in (1 << 26, 1 << 62):
        (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="header .*33554432"):
            load_checkpoint(Positioned(), tmp_path)


@pytest.mark.parametrize("name", ["", "a\0b", "a" * 5000, "/dev/zero", None, 5])
def test_what_is_no_folder_of_a_checkpoint_is_refused(name: object) -> None:
    with pytest.raises(
        (ArgumentError, CheckpointError), match="the path of a checkpoint is|is not there|no safetensors"
    ):
        load_checkpoint(Positioned(), name)  # type: ignore[arg-type]
