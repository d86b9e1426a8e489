"""Folders of results: nothing that somebody else wrote is overwritten or deleted, and no two runs are mixed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torchshear.cli import app
from torchshear.cli._folder import RECORD, output_folder
from torchshear.errors import OutputError

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(2, 6),)
"""
RESULTS = {"plan.json", "model.safetensors", "dense.onnx", "pruned.onnx", "report.json", RECORD}


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "small_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("small_nets", None)


def prune(*arguments: str) -> tuple[int, str]:
    command = ("prune", "small_nets:net", "--align", "none", "--no-bench", *arguments)
    result = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    return result.exit_code, result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, command: str = "prune", **files: str) -> None:
    """Write files of a run, "name_suffix" for "name.suffix"."""
    with output_folder(folder, command) as draft:
        for name, text in files.items():
            (draft / name.replace("_", ".")).write_text(text)


@pytest.mark.parametrize("name", ["mine.txt", "model.safetensors", "plan-0123456789ab.safetensors", "plan.json"])
def test_a_folder_of_the_users_is_refused_before_anything_is_run(name: str) -> None:
    Path("out").mkdir()
    (Path("out") / name).write_text("mine")
    code, said = prune("--output", "out")
    assert code == 1
    assert f"cannot write into 'out': it holds '{name}', which torchshear did not write. Expected a new" in said
    assert contents(Path("out")) == {name: b"mine"}


def test_with_force_only_names_of_results_are_replaced() -> None:
    (Path("out") / "sub").mkdir(parents=True)
    for name in ("mine.txt", "sub/mine.txt", "plan.json", "plan-0123456789ab.safetensors"):
        (Path("out") / name).write_text("mine")
    assert prune("--output", "out", "--force")[0] == 0
    found = contents(Path("out"))
    assert found.keys() == RESULTS | {"mine.txt", "sub/mine.txt", "plan-0123456789ab.safetensors"}
    assert {name for name, content in found.items() if content == b"mine"} == found.keys() - RESULTS


def test_a_second_run_replaces_the_first_and_only_it() -> None:
    assert prune("--output", "out")[0] == 0
    (Path("out") / "plan.json").chmod(0o600)
    assert prune("--output", "out", "--ratio", "0.25")[0] == 0
    assert contents(Path("out")).keys() == RESULTS
    assert json.loads((Path("out") / "plan.json").read_text())["request"]["ratio"] == 0.25
    assert (Path("out") / "plan.json").stat().st_mode & 0o777 == 0o600
    (Path("out") / "model.safetensors").write_text("trained for a week")
    before = contents(Path("out"))
    code, said = prune("--output", "out")
    assert code == 1
    assert "it holds 'model.safetensors', which was changed since torchshear wrote it" in said
    assert contents(Path("out")) == before


def test_an_empty_name_is_no_folder() -> None:
    before = contents(Path.cwd())
    for command in (("prune", "a:b", "--output", ""), ("compare", "a:b", "--output", ""), ("shrink", "p", "s", "")):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "it is empty; give the name" in " ".join(result.output.replace("│", " ").split())
    assert contents(Path.cwd()) == before


def test_the_current_folder_is_one_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "it holds 'small_nets.py', which torchshear did not write" in prune("--output", ".")[1]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert prune("--output", ".")[0] == 0
    assert contents(Path.cwd()).keys() == RESULTS


def test_files_of_an_earlier_run_that_the_next_one_lacks_are_gone() -> None:
    fill(Path("out"), plan_json="1", dense_onnx="1")
    fill(Path("out"), plan_json="2")
    assert contents(Path("out")).keys() == {"plan.json", RECORD}
    with output_folder(Path("out"), "prune", adds=True) as draft:
        (draft / "report.json").write_text("3")
    assert contents(Path("out")).keys() == {"plan.json", "report.json", RECORD}
    fill(Path("out"), plan_json="4")
    assert contents(Path("out")).keys() == {"plan.json", RECORD}


def test_results_of_another_command_stay() -> None:
    fill(Path("out"), plan_json="1", dense_onnx="1")
    fill(Path("out"), "compare", comparison_json="1", report_json="1")
    assert contents(Path("out")).keys() == {"plan.json", "dense.onnx", "comparison.json", "report.json", RECORD}
    fill(Path("out"), plan_json="2", report_json="2")
    assert contents(Path("out")).keys() == {"plan.json", "comparison.json", "report.json", RECORD}
    fill(Path("out"), "compare", comparison_json="2")
    assert contents(Path("out")).keys() == {"plan.json", "comparison.json", "report.json", RECORD}


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    Path("out").mkdir()
    (Path("out") / "plan.json").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="it holds 'plan.json', which torchshear did not write"):
        fill(Path("out"), plan_json="1")
    with output_folder(Path("out"), "prune", force=True) as draft:
        (draft / "plan.json").write_text("1")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (Path("out") / "plan.json").is_symlink()


def test_what_comes_into_the_folder_meanwhile_is_kept() -> None:
    def late() -> None:
        with output_folder(Path("out"), "prune") as draft:
            (draft / "plan.json").write_text("1")
            (Path("out") / "plan.json").write_text("mine")

    with pytest.raises(OutputError, match=r"'plan\.json' came there meanwhile"):
        late()
    assert contents(Path("out")) == {"plan.json": b"mine"}


def test_a_failure_between_renames_brings_the_old_files_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fill(Path("out"), a_txt="1", b_txt="1", c_txt="1")
    before, rename = contents(Path("out")), Path.rename
    for fails_at in range(6):
        calls: list[Path] = []

        def failing(path: Path, target: Path, calls: list[Path] = calls, fails_at: int = fails_at) -> Path:
            calls.append(path)
            if len(calls) == fails_at + 1:
                raise OSError(5, "Input/output error")
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", failing)
            with pytest.raises(OutputError, match=r"Input/output error.*what was there before is unchanged"):
                fill(Path("out"), a_txt="2", b_txt="2", c_txt="2")
        after = contents(Path("out"))
        assert {n: c for n, c in after.items() if n != RECORD} == {n: c for n, c in before.items() if n != RECORD}
    fill(Path("out"), a_txt="3")
    assert contents(Path("out")).keys() == {"a.txt", RECORD}


KILLED = """
import os, signal, sys
from pathlib import Path
from torchshear.cli import _folder

rename, count = Path.rename, [0]
def counted(path, target):
    count[0] += 1
    if count[0] > n_renames:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
Path.rename = counted
for n_renames in map(int, sys.argv[1:]):
    if os.fork():
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
        continue
    with _folder.output_folder(Path(str(n_renames)), "prune") as draft:
        for name in "abc":
            (draft / f"{name}.txt").write_text("new")
"""


def test_a_record_that_a_killed_process_left_unfinished_is_no_file_of_the_users() -> None:
    fill(Path("out"), plan_json="1")
    (Path("out") / ".torchshear-0123456789abcdef.json").write_text("{")
    fill(Path("out"), plan_json="2")
    assert contents(Path("out"))["plan.json"] == b"2"


def test_a_process_that_is_killed_leaves_no_mixture() -> None:
    """Killed before the first, third, fourth and sixth renaming."""
    folders = [Path(n_renames) for n_renames in "0235"]
    for folder in folders:
        fill(folder, a_txt="old", b_txt="old", c_txt="old")
    subprocess.run([sys.executable, "-c", KILLED, *map(str, folders)], env=os.environ, check=True)
    for folder in folders:
        left = {path.read_text() for path in folder.glob("*.txt")}
        assert len(left) < 2, f"{folder}: files of two runs stand side by side"
        fill(folder, a_txt="3", b_txt="3")  # the next run knows what is there
        assert {path.name: path.read_text() for path in folder.glob("*.txt")} == {"a.txt": "3", "b.txt": "3"}
