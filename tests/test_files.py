"""Single files that are written: where they go, what they may replace, and who may read them."""

import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torchshear
from tests.networks import analyzed
from torchshear.errors import ArgumentError, OutputError
from torchshear.speedup.onnx import _export as onnx
from torchshear.storage import _writing as _files
from torchshear.storage._writing import atomic_path


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    os.mkfifo("pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, kind in (
            ("pipe", "a device, a pipe or a socket"),
            ("socket", "a device, a pipe or a socket"),
            ("/dev/null", "a device"),
            ("folder", "a folder"),
        ):
            before = os.lstat(name).st_mode
            with pytest.raises(OutputError, match=rf"cannot write '.*{name}': it is .*{kind}"):
                write(Path(name))
            assert os.lstat(name).st_mode == before
    assert sorted(os.listdir()) == ["folder", "pipe", "socket"]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("old")
    (tmp_path / "a.txt").symlink_to(tmp_path / "real" / "a.txt")
    (tmp_path / "b.txt").symlink_to("real/b.txt")  # to what is not there yet
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == "new"
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("null", "loop"):
        with pytest.raises(OutputError, match="cannot write"):
            write(tmp_path / name)
        assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_file_that_is_replaced_hands_on_its_permissions(tmp_path: Path, mode: int) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "a.txt").chmod(mode)
    write(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_a_new_file_has_the_permissions_of_any(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("")
    write(tmp_path / "a.txt")
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "a.txt").chmod(0o400)
    with pytest.raises(OutputError, match="it is read-only"):
        write(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_names_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    write(tmp_path / f"{'a' * 251}.txt")
    write(tmp_path / f"a.{'b' * 253}")
    for name in ("a" * 256, "a" * 5000):
        with pytest.raises(OutputError, match="File name too long"):
            write(tmp_path / name)
    for name in ("", "a\0b", 5):
        with pytest.raises(ArgumentError, match="the path of a file to write is"):
            write(name)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_over_a_plan_touches_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchshear.dependency.plans._plan_file._LONGEST_TEXT", 3)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    plans = [torchshear.pruners.plan_from_kept(groups, {"0.weight[0]": kept}) for kept in ([0, 2, 5], [1, 2, 7])]
    (tmp_path / "weights.bin").write_text("mine")
    (tmp_path / "plan.json").write_text('{"format": "torchshear.plan", "indices": {"file": "weights.bin"}}')
    plans[0].save(tmp_path / "plan.json")
    assert (tmp_path / "weights.bin").read_text() == "mine"
    (tmp_path / "copy.json").write_bytes((tmp_path / "plan.json").read_bytes())
    plans[1].save(tmp_path / "plan.json")
    assert torchshear.PruningPlan.load(tmp_path / "copy.json") == plans[0]
    assert torchshear.PruningPlan.load(tmp_path / "plan.json") == plans[1]


@pytest.fixture
def plan(tmp_path: Path) -> torchshear.PruningPlan:
    """A plan for the checkpoint in the folder "src"."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    (tmp_path / "src").mkdir()
    save_file(model.state_dict(), tmp_path / "src" / "model.safetensors")
    return torchshear.plan(analyzed(model, torch.randn(2, 6)))


def test_a_shrunk_checkpoint_is_as_private_as_its_source(plan: torchshear.PruningPlan, tmp_path: Path) -> None:
    (tmp_path / "src" / "config.json").write_text("{}")
    for file in (tmp_path / "src").iterdir():
        file.chmod(0o600)
    torchshear.shrink_checkpoint(plan, tmp_path / "src", tmp_path / "small")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "small" / name).stat().st_mode & 0o777 == 0o600


def test_what_looks_like_a_draft_is_not_deleted_from_a_folder_of_the_users(
    plan: torchshear.PruningPlan, tmp_path: Path
) -> None:
    for name in (".shrink-draft-mine", ".torchshear-draft-mine"):
        (tmp_path / "used" / name).mkdir(parents=True)
        (tmp_path / "used" / name / "thesis.txt").write_text("mine")
    (tmp_path / "used" / ".torchshear-shrink-mine").write_text("mine")
    with pytest.raises(torchshear.errors.CheckpointError, match="no record of a run"):
        torchshear.shrink_checkpoint(plan, tmp_path / "src", tmp_path / "used")
    assert len(list((tmp_path / "used").rglob("thesis.txt"))) == 2
    assert (tmp_path / "used" / ".torchshear-shrink-mine").exists()


def test_no_graph_is_left_beside_the_weights_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "_MAX_EMBEDDED_BYTES", 0)
    small, large = nn.Linear(6, 3), nn.Linear(6, 300)
    (tmp_path / "link.onnx").symlink_to("model.onnx")
    torchshear.export_onnx(small, tmp_path / "link.onnx", (torch.randn(2, 6),))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.onnx", "model.onnx", "model.onnx.data"]
    ends, publish = [0], _files.publish

    def ending(temporary: Path, target: Path) -> None:
        if target.name == "model.onnx":
            ends[0] += 1
            raise KeyboardInterrupt  # the process ends here
        publish(temporary, target)

    monkeypatch.setattr(_files, "publish", ending)
    with pytest.raises(KeyboardInterrupt):
        torchshear.export_onnx(large, tmp_path / "model.onnx", (torch.randn(2, 6),))
    assert ends == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.onnx", "model.onnx.data"]
