"""Shrinking a checkpoint on disk: equal to shrinking the model, resumable, and never half done."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchshear
from tests.networks import randomise
from torchshear import PruningPlan, load_checkpoint, shrink_checkpoint
from torchshear.errors import ArgumentError, CheckpointError, OutputError
from torchshear.graph import parameters_on_meta
from torchshear.speedup.checkpoints import _stream

N_SHARDS = 4


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Body(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, 3 * width) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return x


class Network(nn.Module):
    """A tied table, an order of features that is saved, and a scale that is not."""

    order: Tensor
    scale: Tensor

    def __init__(self, vocabulary: int = 23, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.body = Body(vocabulary, width, depth)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.body.table.weight
        self.register_buffer("order", torch.arange(width).flip(0))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.body(tokens) * self.scale
        return self.head(mixed) + mixed.index_select(-1, self.order).mean()


TOKENS = torch.arange(10).reshape(2, 5)


def network() -> Network:
    """Random parameters; buffers as they are made."""
    model = randomise(Network(), 1).eval()
    model.load_state_dict({name: buffer for name, buffer in Network().named_buffers() if name == "order"}, strict=False)
    model.scale.copy_(Network().scale)
    return model


@cache
def plan_of(ratio: float = 0.5) -> PruningPlan:
    """The plan of the network."""
    return torchshear.plan(torchshear.analyze(torchshear.trace(network(), (TOKENS,))), ratio=ratio)


def saved(model: nn.Module) -> dict[str, Tensor]:
    """What Hugging Face libraries save: tied tensors once."""
    return {name: t.clone() for name, t in model.state_dict().items() if name != "head.weight"}


def write_shards(tensors: dict[str, Tensor], folder: Path) -> Path:
    """Shards with an index, config and tokenizer."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    where = {
        name: f"model-{i * N_SHARDS // len(names) + 1:05}-of-{N_SHARDS:05}.safetensors" for i, name in enumerate(names)
    }
    for file in set(where.values()):
        part = {name: tensors[name].contiguous() for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"note": file})  # of two, the order is random
    metadata = {"total_size": sum(t.nbytes for t in tensors.values()), "total_parameters": 1, "kept": "as it is"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": where}))
    (folder / "config.json").write_text('{"width": 8}')
    (folder / "tokenizer.model").write_bytes(b"\0\1\2")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors, through the index."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in where.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those that are not saved."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


@pytest.fixture
def model() -> Network:
    return network()


@pytest.fixture
def source(model: Network, tmp_path: Path) -> Path:
    return write_shards(saved(model), tmp_path / "source")


def test_the_result_loads_into_the_model_shrunk_on_meta(model: Network, source: Path, tmp_path: Path) -> None:
    plan = plan_of()
    before = files_of(source)
    steps: list[tuple[int, int, str]] = []
    result = shrink_checkpoint(plan, source, tmp_path / "small", progress=lambda *step: steps.append(step))
    n_tensors = len(saved(model))
    assert steps == [(done, n_tensors, "shrinking") for done in range(1, n_tensors + 1)]
    assert files_of(source) == before
    expected = torchshear.shrink(model, plan)
    with parameters_on_meta():
        fresh = Network().eval()
    small = torchshear.shrink(fresh, PruningPlan.load(tmp_path / "small" / "plan.json"))
    assert all(parameter.is_meta for parameter in small.parameters())
    load_checkpoint(small, tmp_path / "small")
    tensors = read_shards(tmp_path / "small")
    loaded, wanted = state_of(small), state_of(expected)
    assert loaded.keys() == wanted.keys() >= {"scale", "order", "body.table.weight"}
    assert all(torch.equal(loaded[name], wanted[name]) and loaded[name].dtype == wanted[name].dtype for name in wanted)
    assert torch.equal(small(TOKENS), torchshear.speedup.shrink_to_form(model, plan, form="traced").model(TOKENS))
    assert sum(t.numel() for t in tensors.values()) == result.n_params[1] < result.n_params[0]
    assert result.resumed == ()
    assert len(result.shards) == N_SHARDS


def test_the_shards_are_of_the_same_kind(model: Network, source: Path, tmp_path: Path) -> None:
    shrink_checkpoint(plan_of(), source, tmp_path / "small")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = read_shards(tmp_path / "small")
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "kept": "as it is",
    }
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "small" / file, "pt") as shard:
            assert shard.metadata() == {"note": file}
    names = {path.name for path in (tmp_path / "small").iterdir()}
    texts = {"config.json", "tokenizer.model", "plan.json", "torchshear-shrink.json", "model.safetensors.index.json"}
    assert names == texts | set(index["weight_map"].values())
    assert (tmp_path / "small" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_types_are_kept_bit_for_bit(model: Network, tmp_path: Path, dtype: torch.dtype) -> None:
    plan = plan_of()
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in saved(model).items()}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    shrink_checkpoint(plan, tmp_path / "source", tmp_path / "small")
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert small.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.float()
        for dim, kept in plan.state[name].kept.items() if name in plan.state and name != "order" else ():
            expected = expected.index_select(dim, torch.from_numpy(kept))
        assert small[name].dtype == tensor.dtype
        assert name == "order" or torch.equal(small[name].float(), expected)
    assert not (tmp_path / "small" / "model.safetensors.index.json").exists()


def test_names_may_be_those_of_ties_or_lack_a_prefix(model: Network, tmp_path: Path) -> None:
    plan = plan_of()
    shrink_checkpoint(plan, write_shards(saved(model), tmp_path / "plain"), tmp_path / "small")
    expected = read_shards(tmp_path / "small")
    tied = saved(model)
    tied["head.weight"] = tied.pop("body.table.weight")
    shrink_checkpoint(plan, write_shards(tied, tmp_path / "tied"), tmp_path / "small-tied")
    assert torch.equal(read_shards(tmp_path / "small-tied")["head.weight"], expected["body.table.weight"])
    body = {name.removeprefix("body."): t for name, t in saved(model).items() if name.startswith("body.")}
    result = shrink_checkpoint(plan, write_shards(body, tmp_path / "body"), tmp_path / "small-body")
    assert result.missing == ("order",)
    small = read_shards(tmp_path / "small-body")
    assert small.keys() == body.keys()
    assert all(torch.equal(small[name], expected[f"body.{name}"]) for name in small)


def test_unknown_tensors_are_refused_copied_or_dropped(model: Network, tmp_path: Path) -> None:
    extra = torch.randn(3, 8)
    source = write_shards(saved(model) | {"old.inv_freq": extra}, tmp_path / "source")
    plan = plan_of()
    with pytest.raises(CheckpointError, match=r"'old.inv_freq', .*Network"):
        shrink_checkpoint(plan, source, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    result = shrink_checkpoint(plan, source, tmp_path / "copied", unknown="copy")
    assert result.unknown == ("old.inv_freq",)
    assert torch.equal(read_shards(tmp_path / "copied")["old.inv_freq"], extra)
    shrink_checkpoint(plan, source, tmp_path / "dropped", unknown="drop")
    assert "old.inv_freq" not in read_shards(tmp_path / "dropped")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("body.blocks.1.up.weight"), "lacks 'body.blocks.1.up.weight', which .*Network saves"),
        (
            lambda t: t.update({"order": torch.arange(9)}),
            r"'order' has shape \(9,\) in the checkpoint .* expects \(8,\)",
        ),
    ],
)
def test_another_checkpoint_is_refused(model: Network, tmp_path: Path, edit, message: str) -> None:  # type: ignore[no-untyped-def]
    tensors = saved(model)
    edit(tensors)
    source = write_shards(tensors, tmp_path / "source")
    with pytest.raises(CheckpointError, match=message):
        shrink_checkpoint(plan_of(), source, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def damage_index(source: Path, edit) -> None:  # type: ignore[no-untyped-def]
    path = source / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s / "model-00002-of-00004.safetensors").unlink(), "shard .*00002.* cannot be read.*No such file"),
        (
            lambda s: (s / "model-00002-of-00004.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not a header..."),
            "shard .*00002.* cannot be read",
        ),
        (lambda s: os.truncate(s / "model-00001-of-00004.safetensors", 900), "shard .*00001.* cannot be read"),
        (
            lambda s: damage_index(s, lambda d: d["weight_map"].pop("order")),
            "disagree: 'order' is in the shard and not",
        ),
        (lambda s: damage_index(s, lambda d: d["weight_map"].update(x="../x")), "damaged. Expected a weight_map"),
        (lambda s: (s / "model.safetensors.index.json").write_text("{"), "index .* is not whole JSON"),
        (lambda s: shutil.rmtree(s), "is not there"),
    ],
)
def test_a_damaged_source_is_named(source: Path, tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    plan = plan_of()
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        shrink_checkpoint(plan, source, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def interrupted(plan: PruningPlan, source: Path, destination: Path, after: int) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrink_checkpoint(plan, source, destination, progress=stop)


def test_a_run_cut_short_is_taken_up(model: Network, source: Path, tmp_path: Path) -> None:
    plan = plan_of()
    shrink_checkpoint(plan, source, tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    total = len(saved(model))
    for after in range(1, total + 1, 3):
        small = tmp_path / f"small-{after}"
        interrupted(plan, source, small, after)
        done = {path.name: path.stat().st_mtime_ns for path in small.glob("model-*")}
        assert all(expected[name] == (small / name).read_bytes() for name in done)
        assert not (small / "model.safetensors.index.json").exists()
        result = shrink_checkpoint(plan, source, small)
        assert set(result.resumed) == set(done)
        assert {name: (small / name).stat().st_mtime_ns for name in done} == done, "a finished shard was made again"
        found = files_of(small)
        assert {n: b for n, b in found.items() if n != "torchshear-shrink.json"} == {
            n: b for n, b in expected.items() if n != "torchshear-shrink.json"
        }
    assert shrink_checkpoint(plan, source, small).resumed == result.shards


@pytest.mark.parametrize("has_record", [True, False])
def test_what_killed_runs_left_unfinished_is_removed(source: Path, tmp_path: Path, has_record: bool) -> None:
    plan, destination = plan_of(), tmp_path / "small"
    if has_record:
        interrupted(plan, source, destination, 1)
    (destination / ".torchshear-draft-0a1b2c3d").mkdir(parents=True)
    (destination / ".torchshear-0123456789abcdef.json").write_text("{")  # of a record that was being written
    torchshear.shrink_checkpoint(plan, source, destination)
    torchshear.shrink_checkpoint(plan, source, tmp_path / "at once")
    assert files_of(destination).keys() == files_of(tmp_path / "at once").keys()
    assert not list(destination.glob(".torchshear-*"))


def test_a_destination_of_something_else_is_refused(model: Network, source: Path, tmp_path: Path) -> None:
    plan = plan_of()
    small = tmp_path / "small"
    interrupted(plan, source, small, 8)
    before = files_of(small)
    other = write_shards({**saved(model), "extra": torch.zeros(2)}, tmp_path / "other")
    for message, call in (
        ("holds what was made with another plan", lambda: shrink_checkpoint(plan_of(0.25), source, small)),
        ("holds what was made with another source", lambda: shrink_checkpoint(plan, other, small, "refuse")),
        ("holds what was made with unknown='refuse'", lambda: shrink_checkpoint(plan, source, small, "drop")),
    ):
        with pytest.raises(CheckpointError, match=message if "source" not in message else "extra|another source"):
            call()
    assert files_of(small) == before
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds 'thesis.txt' and no record of a run"):
        shrink_checkpoint(plan, source, tmp_path / "used")
    with pytest.raises(ArgumentError, match="is the source's folder"):
        shrink_checkpoint(plan, source, source)


def test_a_finished_shard_must_be_that_of_this_source(model: Network, source: Path, tmp_path: Path) -> None:
    plan = plan_of()
    shrink_checkpoint(plan, source, tmp_path / "small")
    first = source / "model-00001-of-00004.safetensors"
    os.utime(first, (1, 1))  # written anew with the same content: still the same source
    assert len(shrink_checkpoint(plan, source, tmp_path / "small").resumed) == N_SHARDS
    tensors = load_file(first)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, first, {"note": first.name})
    with pytest.raises(CheckpointError, match="of the source in .* was changed since"):
        shrink_checkpoint(plan, source, tmp_path / "small")


def test_a_finished_shard_that_was_changed_is_not_taken(model: Network, source: Path, tmp_path: Path) -> None:
    plan = plan_of()
    shrink_checkpoint(plan, source, tmp_path / "small")
    shard = tmp_path / "small" / "model-00003-of-00004.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="changed since it was written"):
        shrink_checkpoint(plan, source, tmp_path / "small")
    shard.unlink()
    result = shrink_checkpoint(plan, source, tmp_path / "small")
    assert shard.name not in result.resumed
    assert shard.read_bytes() == good
    (tmp_path / "small" / "torchshear-shrink.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        shrink_checkpoint(plan, source, tmp_path / "small")


def test_a_full_disk_is_said_and_survived(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    calls: list[Path] = []

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(_stream, "save_file", full)
        with pytest.raises(OutputError, match="No space left on device"):
            shrink_checkpoint(plan, source, tmp_path / "small")
    assert not [path for path in (tmp_path / "small").iterdir() if path.name.startswith(".")]
    assert len(shrink_checkpoint(plan, source, tmp_path / "small").resumed) == 2


def test_bad_arguments(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="plan is int"):
        shrink_checkpoint(5, source, tmp_path / "small")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="unknown='ignore'.*'refuse', 'copy', 'drop'"):
        shrink_checkpoint(plan_of(), source, tmp_path / "small", unknown="ignore")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write into"):
        shrink_checkpoint(plan_of(), source, tmp_path / "file")


# A process that shrinks slowly enough to be killed at any point.
SCRIPT = """
import sys, time
import torchshear
def report(done, total, what):
    print(done, flush=True)
    time.sleep(0.02)
torchshear.shrink_checkpoint(*sys.argv[1:4], progress=report)
"""


def running(*arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.zoo) for seed in range(1, 4))])
def test_a_killed_process_leaves_nothing_broken(model: Network, source: Path, tmp_path: Path, seed: int) -> None:
    plan = plan_of()
    shrink_checkpoint(plan, source, tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    plan.save(tmp_path / "plan.json")
    draw = random.Random(seed)
    process = running(tmp_path / "plan.json", source, tmp_path / "small")
    until = draw.randrange(1, len(saved(model)))
    for line in lines_of(process):
        if int(line) >= until:
            break
    time.sleep(draw.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name for path in (tmp_path / "small").glob("model-*.safetensors")}
    assert all((tmp_path / "small" / name).read_bytes() == expected[name] for name in done)
    result = shrink_checkpoint(tmp_path / "plan.json", source, tmp_path / "small")
    assert set(result.resumed) == done
    assert files_of(tmp_path / "small").keys() == expected.keys()
    assert all(expected[name] == content for name, content in files_of(tmp_path / "small").items() if "model" in name)
