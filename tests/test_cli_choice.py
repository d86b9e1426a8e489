"""Options of the command line that choose what may shrink."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import torchshear
from torchshear.cli import app, load_example
from torchshear.cli._shared_options import parse_ratio
from torchshear.errors import ArgumentError

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """A residual stream, channels inside a block, a hidden layer, and a map that is given out."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.down = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 5)
        self.map = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(self.up(x).relu())
        return {"logits": self.two(self.one(x.mean((2, 3))).relu()), "map": self.map(x)}


def net():
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 3, 8, 8),)
'''


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chosen_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})
    return result.exit_code, result.stdout, result.stderr


def pruned(*options: str) -> dict:
    code, _, errors = run("prune", "chosen_nets:net", "--output", "out", "--align", "none", "--no-bench", *options)
    assert code == 0, errors
    return json.loads(Path("out/report.json").read_text())


def widths(document: dict) -> dict[str, int]:
    return {group["name"].split(".")[0]: group["kept"] for group in document["report"]["groups"]}


def test_options_reach_the_plan() -> None:
    document = pruned("--ratio", "channels=0.5", "--ratio", "*=0.25", "--exclude", "one", "--prunable-output", "map")
    # `one` reads the stream of the stem, so that the stream stays as well.
    assert widths(document) == {"stem": 8, "up": 6, "one": 16, "map": 3}
    assert document["request"]["ratio"] == {"channels": 0.5, "*": 0.25}
    assert document["request"]["exclude"] == ["one"]
    assert document["report"]["outputs"] == [
        {"name": "map", "before": [None, 6, 8, 8], "after": [None, 3, 8, 8], "note": ""}
    ]
    assert {group["role"] for group in document["report"]["groups"]} == {"residual", "channels", "ffn"}
    plan = torchshear.PruningPlan.load("out/plan.json")
    model, args, _ = load_example("chosen_nets:net")
    assert torchshear.shrink(model, plan)(*args)["map"].shape == (2, 3, 8, 8)


def test_a_form_may_be_insisted_on() -> None:
    assert pruned()["report"]["form"].startswith("native")
    assert pruned("--form", "traced", "--force")["report"]["form"] == "traced: asked for"
    code, _, errors = run("prune", "chosen_nets:net", "--output", "new", "--no-bench", "--form", "graph")
    assert code != 0
    assert "expected one of 'auto', 'native', 'traced'" in " ".join(errors.split())


def test_axes_may_be_given_more_than_once() -> None:
    assert widths(pruned("--roles", "ffn", "--roles", "residual")) == {"stem": 4, "up": 12, "one": 8}


def test_roles_are_shown() -> None:
    code, text, _ = run("inspect", "chosen_nets:net")
    assert code == 0
    assert re.search(r"up\.weight\[0\] +│ +12 .*\n│ +│ channels +│", text)
    document = json.loads(run("inspect", "chosen_nets:net", "--json")[1])
    assert {group["name"]: group["role"] for group in document["groups"]} == {
        "stem.weight[0]": "residual",
        "up.weight[0]": "channels",
        "one.weight[0]": "ffn",
    }


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--roles", "heads"), 1, "no group has the role 'heads'"),
        (("--exclude", "layer4"), 1, "exclude: 'layer4' fits no parameter"),
        (("--prunable-output", "logit"), 1, "fits no output of chosen_nets.Net, which has logits"),
        (("--ratio", "ffn=0.5", "--ratio", "0.5"), 2, "'0.5' among several"),
        (("--ratio", "ffn=half"), 2, "'half' is no number"),
        (("--ratio", "ffn=0.5", "--ratio", "ffn=0.4"), 2, "two shares for 'ffn'"),
    ],
)
def test_bad_choices(options: tuple[str, ...], code: int, message: str) -> None:
    found, _, errors = run("prune", "chosen_nets:net", "--output", "out", *options)
    assert found == code
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", errors).split())
    assert not Path("out").exists()


def test_shares_are_read() -> None:
    assert parse_ratio(["0.5"]) == 0.5
    assert parse_ratio(["layer[3]=0.5", "a=b=1e-1"]) == {"layer[3]": 0.5, "a=b": 0.1}
    with pytest.raises(ArgumentError, match="no number"):
        parse_ratio(["half"])


def test_scopes_targets_and_limits_reach_the_plan() -> None:
    document = pruned(
        "--scope", "global", "--target-macs", "0.5", "--max-ratio", "residual=0.3", "--max-ratio", "*=0.9",
        "--group-reduction", "mean", "--normalize", "none",
    )  # fmt: skip
    assert (document["request"]["group_reduction"], document["request"]["normalize"]) == ("mean", "none")
    assert document["request"]["scope"] == "global"
    assert document["request"]["max_ratio"] == {"residual": 0.3, "*": 0.9}
    assert "ratio" not in document["request"]
    report = document["report"]
    assert report["after"]["macs"] <= report["target"]["target_macs"] == report["before"]["macs"] // 2
    assert widths(document)["stem"] >= 6
    document = pruned("--target-size", "0.9", "--target-params", "0.9", "--force")
    onnx = document["onnx"]
    assert onnx["pruned"]["size_bytes"] <= 0.9 * onnx["dense"]["size_bytes"]
    assert document["report"]["file"]["pruned_bytes"] == onnx["pruned"]["size_bytes"]
    assert document["request"]["target_size"] == "0.9"
    code, _, errors = run("prune", "chosen_nets:net", "--output", "out", "--target-params", "0.001")
    assert code == 1
    assert "the best possible is" in " ".join(errors.split())
