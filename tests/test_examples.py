"""The examples run, and leave what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from torchshear import PruningPlan
from torchshear.pruners import registered_criteria
from torchshear.speedup.latency._alignment_profiles import profiles

pytest.importorskip("sklearn", reason="the demo needs the extra 'demo'", exc_type=ImportError)
pytest.importorskip("matplotlib", reason="the demo needs the extra 'demo'", exc_type=ImportError)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_demo(tmp_path: Path) -> None:
    """One test, so that the demo runs once wherever tests run."""
    folder = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "digits_demo.py"), "--fast", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("accuracy", "parameters", "MACs", "ONNX file", "latency", "95% interval"):
        assert row in done.stdout
    assert "equal to the original with its cut weights set to zero" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80

    names = {"plan.json", "dense.onnx", "pruned.onnx", "report.json", "demo.png"}
    assert {file.name for file in folder.iterdir()} == names
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "demo.png").stat().st_size > 10_000

    plan = PruningPlan.load(folder / "plan.json")
    granule = profiles()[plan.request["alignment"]].granule
    assert plan.request["target_latency"] == 0.9
    assert plan.request["device"]["threads"] == 1
    assert any(len(group.kept) < group.width for group in plan.groups)
    assert all(len(group.kept) == group.width or len(group.kept) % granule == 0 for group in plan.groups)

    document = json.loads((folder / "report.json").read_text())
    assert document["verification"]["max_error"] < 1e-9
    assert document["report"]["after"]["n_params"] < document["report"]["before"]["n_params"]
    assert document["allocation"]["target_share"] == 0.9
    for name in ("dense", "pruned"):
        file = folder / f"{name}.onnx"
        assert document["onnx"][name]["size_bytes"] == file.stat().st_size
        assert len(document["latency"]["results"][name]["times_ms"]) == 10
        assert 0 < document["accuracy"][name] <= 1
        onnx.checker.check_model(onnx.load(file), full_check=True)
        for batch in (1, 3):
            images = np.random.default_rng(0).random((batch, 1, 8, 8), np.float32)
            (scores,) = InferenceSession(file).run(None, {"x": images})
            assert scores.shape == (batch, 10)
            assert np.isfinite(scores).all()


@pytest.mark.zoo
def test_a_network_is_pruned_while_it_trains(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "training_digits.py"), "--epochs", "1", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = PruningPlan.load(tmp_path / "out" / "plan.json")
    assert {len(group.kept) / group.width for group in plan.groups} == {1 / 8}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"plan.json", "pruned.pt", "history.png"}
    assert (tmp_path / "out" / "history.png").read_bytes().startswith(b"\x89PNG")
    assert "dense" in done.stdout
    assert "equal to the masked network" in done.stdout


@pytest.mark.zoo
def test_each_step_after_the_cut_helps() -> None:
    command = [sys.executable, str(EXAMPLES / "after_the_cut.py"), "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.count("│") > 4
    ]
    accuracy = {row[0]: float(row[1].removesuffix("%")) for row in rows}
    loss = {row[0]: float(row[3]) for row in rows}
    folds = ("+ constants", "+ means")
    both = ("+ both (constants)", "+ both (means)")
    assert list(accuracy) == ["dense", "pruned", *folds, "+ refit", "+ statistics", *both]
    for one, two in zip(folds, both, strict=True):
        assert loss[one] < loss["pruned"]
        assert loss[two] < loss["+ statistics"] < loss["pruned"]
        assert accuracy[two] > accuracy["+ statistics"] > accuracy["pruned"]
    assert loss["+ refit"] < min(loss[two] for two in both)
    assert accuracy["+ refit"] > max(accuracy[two] for two in both)


@pytest.mark.zoo
def test_study_of_criteria_scores_every_method_and_takes_up_what_is_there(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "criteria_digits.py"), "--fast", "--seeds", "0", "--left", "0.5"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for model in ("cnn", "vit"):
        rows = json.loads((tmp_path / f"{model}-0.json").read_text())
        methods = [row["method"] for row in rows]
        assert len(set(methods)) == len(methods)
        assert {"dense", *registered_criteria(), "taylor, global", "narrower, trained as long"} <= set(methods)
        for row in rows:
            assert row["note"] or 0 <= row["tuned"] <= 1
            assert row["note"] or row["macs"] <= 0.5 or row["method"] == "dense"
        assert (tmp_path / f"{model}.md").read_text().count("\n") == len(methods) + 2
    assert (tmp_path / "criteria.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "cnn-0.json").read_bytes()
    assert subprocess.run(command, capture_output=True, timeout=3600, check=False).returncode == 0
    assert (tmp_path / "cnn-0.json").read_bytes() == before
