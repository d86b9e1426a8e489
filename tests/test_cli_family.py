"""`torchshear family`: what it writes and prints, and what it refuses before long work."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.latency_target.pretending import pretend
from torchshear.cli import _family as family_command
from torchshear.cli import app

NETS = """
import torch
from tests.speedup.latency.making_tables import joined


def net():
    return joined()[:2]


def score(model):
    return sum(parameter.numel() for parameter in model.parameters())


def batches():
    return [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
"""


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "family_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    pretend(monkeypatch)


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["family", "family_nets:net", "--align", "4", "--output", "out", *options])


def test_a_family_is_written_and_printed() -> None:
    words = ("--evaluate", "family_nets:score", "--data", "family_nets:batches", "--batches", "1", "--exclude", "right")
    result = run("--targets", "0.7, 1.2ms", "--targets", "0.5", "--compensate", "refit", "--threads", "2", *words)
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "Joined, onnxruntime" in text
    names = {"0.7", "1.2ms", "0.5"}
    files = {f"{kind}-{name}.{end}" for name in names for kind, end in MEMBER.items()}
    written = {file.name for file in Path("out").iterdir() if not file.name.startswith(".")}
    assert written == files | {"family.json", "family.txt", "family.png", "dense.onnx"}
    document = json.loads(Path("out/family.json").read_text())
    assert document["target"] == "family_nets:net"
    assert [one["name"] for one in document["members"]] == ["0.7", "1.2ms", "0.5"]
    assert document["dense"]["score"] > max(one["score"] for one in document["members"])
    assert all(one["report"]["refit"] is not None for one in document["members"])
    for line in Path("out/family.txt").read_text().splitlines():
        assert len(line) <= 100
    again = run("--targets", "0.6")  # in the place of the first one
    assert again.exit_code == 0, again.output
    assert not Path("out/plan-0.5.json").exists()
    assert Path("out/plan-0.6.json").exists()


MEMBER = {"plan": "json", "model": "safetensors", "pruned": "onnx"}


def test_without_matplotlib_the_rest_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_command, "has_matplotlib", lambda: False)
    monkeypatch.setattr("torchshear.family._record.has_matplotlib", lambda: False)
    result = run("--targets", "0.7")
    assert result.exit_code == 0, result.output
    assert "no picture  matplotlib is not installed; install torchshear[demo]" in result.stdout
    assert not Path("out/family.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--targets", ""), "--targets []; expected several targets of latency"),
        (("--targets", "0.7,fast"), "--target-latency 'fast'; expected a share"),
        (("--targets", "0.7,0.70"), "0.7 stands twice"),
        (("--targets", "0.7,0.01"), "the fastest possible is"),
        (("--targets", "4ms"), "the dense model takes 3 ms here already"),
        (("--targets", "0.7", "--evaluate", "family_nets:skore"), "Did you mean 'score'?"),
        (("--targets", "0.7", "--ratio", "0.5"), "ratio is float; expected a mapping"),
        (("--targets", "0.7", "--config", "none.yaml"), "config file 'none.yaml' cannot be read"),
        (("--targets", "0.7", "--compensate", "refit"), "runs data; give batches as --data"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(options: tuple[str, ...], message: str) -> None:
    result = run(*options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path("out").exists()
