"""`torchshear shrink`, as a user runs it."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import torchshear
from tests.networks import Residual, image, randomise
from torchshear.cli import app


def test_a_checkpoint_is_shrunk_and_taken_up(tmp_path: Path) -> None:
    model = randomise(Residual()).eval()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (image(),))))
    plan.save(tmp_path / "plan.json")
    (tmp_path / "dense").mkdir()
    save_file(model.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "dense" / "model.safetensors")
    command = ["shrink", *(str(tmp_path / name) for name in ("plan.json", "dense", "small"))]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: the checkpoint in")
    assert '--unknown "copy" keeps them' in refused.stderr
    done = CliRunner().invoke(app, [*command, "--unknown", "drop"])
    assert done.exit_code == 0
    assert "1 files of tensors" in done.stdout
    assert "unknown     extra" in done.stdout
    assert "of which 1 were finished already" in CliRunner().invoke(app, [*command, "--unknown", "drop"]).stdout
    expected = torchshear.shrink(model, plan).state_dict()
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert small.keys() == expected.keys()
    assert all(torch.equal(small[name], expected[name]) for name in small)
