"""`torchshear search` and its workers, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from typer.testing import CliRunner

import torchshear
from torchshear.cli import app

pytest.importorskip("optuna")
NETS = """
import os, time
import torch
from torch import nn

torch.manual_seed(0)
X = torch.randn(32, 6)


def make():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def scored():
    model = make()

    def evaluate(small):
        time.sleep(float(os.environ.get("SECONDS_OF_NETS", 0)))
        with torch.no_grad():
            return -float((small(X) - model(X)).square().mean())

    return model, (X[:2],), evaluate


def yielding():
    model, args, evaluate = scored()

    def evaluate_twice(small):
        score = evaluate(small)
        yield 2 * score
        yield score

    return model, args, evaluate_twice


def tune(small):
    return small


number = 3
batches = [X for _ in range(2)]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "search_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "search_nets", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(*arguments: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, [*arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


def test_search_prints_and_writes() -> None:
    options = ("--method", "evolution", "--trials", "6", "--target-macs", "0.5", "--finetune", "search_nets:tune")
    options += ("--finetune-best", "search_nets:tune")
    code, text, errors = run("search", "search_nets:scored", *options, "--output", "out")
    assert code == 0, errors
    assert "Search by evolution for at most 50.0% of the MACs" in text
    assert "written in out: model.safetensors, plan.json, search.json, search.png, search.txt" in " ".join(text.split())
    document = json.loads(Path("out/search.json").read_text())
    assert len(document["trials"]) == 6
    import search_nets

    small = torchshear.shrink(search_nets.make(), torchshear.PruningPlan.load("out/plan.json"))
    load_model(small, "out/model.safetensors")
    score = -float((small(search_nets.X) - search_nets.make()(search_nets.X)).detach().square().mean())
    assert score == pytest.approx(document["trials"][document["best"]]["score"])
    assert document["final_score"] == pytest.approx(score)


def test_candidates_are_given_up_early() -> None:
    options = ("--method", "random", "--trials", "20", "--ratio", "0.5", "--stop-early", "median")
    code, text, errors = run("search", "search_nets:yielding", *options, "--output", "out")
    assert code == 0, errors
    document = json.loads(Path("out/search.json").read_text())
    states = [trial["state"] for trial in document["trials"]]
    assert f"{len(states)} trials, {states.count('stopped')} given up early" in text
    assert set(states) == {"complete", "stopped"}


def test_a_worker_takes_part_in_a_search_and_ends_with_it(folder: Path) -> None:
    storage, environment = f"journal://{folder}/search.log", dict(os.environ) | {"SECONDS_OF_NETS": "0.3"}
    options = ("--ratio", "0.4", "--method", "random", "--trials", "16", "--storage", storage)
    started = [
        sys.executable,
        "-c",
        "from torchshear.cli import main; main()",
        "search",
        "search_nets:scored",
        *options,
    ]
    leader = subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        while not (Path("search.log").exists() and "claim" in Path("search.log").read_text()):
            assert leader.poll() is None
        code, text, errors = run("search-worker", storage)
        printed, _ = leader.communicate(timeout=200)
    finally:
        leader.kill()
    assert code == 0, errors
    n_here = int(text.split()[1])
    assert f"{n_here} of 16 trials were scored here" in text
    assert 0 < n_here < 16
    assert "16 trials" in printed
    assert run("search-worker", storage)[1].startswith("done        0 of 16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "search_nets:scored"), "no budget is given; expected ratio, target_macs"),
        (("search", "search_nets:scored", "--ratio", "0.5", "--method", "magic"), "method='magic'"),
        (("search", "search_nets:scored", "--ratio", "0.5", "--finetune", "search_nets:number"), "nets:number is"),
        (("search", "search_nets:scored", "--ratio", "0.5", "--storage", "nowhere"), "storage"),
        (
            ("search", "search_nets:scored", "--ratio", "0.5", "--method", "random", "--stop-early", "mean"),
            "stop_early='mean'; expected one of 'median', 'halving'",
        ),
        (("search-worker", "journal://missing.log"), "there is no file 'missing.log'"),
        (("search-worker", "sqlite:///empty.db"), "holds no search"),
    ],
)  # fmt: skip
def test_bad_words(arguments: tuple[str, ...], message: str) -> None:
    code, _, errors = run(*arguments)
    assert code == 1
    assert message in errors


def test_a_worker_of_another_model_is_refused(folder: Path) -> None:
    storage = f"journal://{folder}/search.log"
    options = ("--ratio", "0.4", "--method", "random", "--trials", "2", "--storage", storage)
    assert run("search", "search_nets:scored", *options)[0] == 0
    (folder / "search_nets.py").write_text(NETS.replace("manual_seed(1)", "manual_seed(2)"))
    sys.modules.pop("search_nets")
    code, _, errors = run("search-worker", storage)
    assert code == 1
    assert "the storage holds another search: weights is" in errors


def test_a_search_of_python_names_no_model(folder: Path) -> None:
    import search_nets

    model, args, evaluate = search_nets.scored()
    storage = f"journal://{folder}/python.log"
    torchshear.search(model, args, evaluate=evaluate, method="uniform", ratio=0.5, storage=storage, progress=False)
    code, _, errors = run("search-worker", storage)
    assert code == 1
    assert "run the Python program that started it once more" in errors
    assert torch.is_grad_enabled()
