"""Files of every kind that the library reads, damaged at random; and what may happen when they are read.

A kind of file knows valid ones, ways to damage them, and what a user does with them. The only failures allowed are
those of the library's own error tree, within a limit of time. Choices come from a `Source`: from Hypothesis in the
tests, from plain random numbers where tens of thousands of files are made (`benchmarks/fuzz_inputs.py`).
"""

import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

import torchshear
from tests.blocks import Source
from tests.damaging import damaged_bytes, damaged_document, damaged_tensors
from torchshear import PruningPlan
from torchshear.cli._folder import RECORD, output_folder
from torchshear.compat.unipruning import plan_from_unipruning_mask, read_unipruning_config, write_unipruning_mask
from torchshear.configs import load_config, parse_config, resolve
from torchshear.dependency.plans import _plan_file
from torchshear.errors import TorchshearError
from torchshear.pruners import masks
from torchshear.pruners.masks import _masks

Files = dict[str, bytes]
MAX_SECONDS: Final = 10.0  # of the processor, for one file
X: Final = torch.linspace(-1, 1, 12).reshape(2, 6)


class Sample(nn.Module):
    """Two layers with an order of channels between them."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu()[:, self.order])


@functools.cache
def sample() -> Sample:
    """The model whose files are damaged; not to be changed."""
    torch.manual_seed(0)
    return Sample().eval()


@functools.cache
def plans() -> tuple[PruningPlan, ...]:
    """Plans that use all parts of the format: a form, outputs, parts of a model."""
    whole = torchshear.prune(sample(), (X,)).plan
    free = torchshear.plan(torchshear.analyze(torchshear.trace(sample(), (X,)), "*"))
    parts = torchshear.prune(nn.Sequential(sample()), (X,), submodules=["0"]).plan
    return whole, free, parts


def written(write: Callable[[Path], object]) -> Files:
    """The files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        files: valid ones, by name.
        damage: gives damaged ones.
        use: what a user does with those in a folder.
    """

    files: Callable[[Source], Files]
    damage: Callable[[Source, Files], Files]
    use: Callable[[Source, Path], object]


def _one(name: str, damage: Callable[[Source, bytes], bytes]) -> Callable[[Source, Files], Files]:
    return lambda source, files: files | {name: damage(source, files[name])}


def _as_json(damage: Callable[[Source, Any], Any]) -> Callable[[Source, bytes], bytes]:
    return lambda source, data: json.dumps(damage(source, json.loads(data))).encode()


def content_of(value: Any) -> Any:
    """All that a plan says, as plain data."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): content_of(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [content_of(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: content_of(getattr(value, one.name)) for one in fields(value) if one.name != "analysis"}
    return value


@functools.cache
def _plan_files(number: int, longest: int) -> Files:
    before, _plan_file._LONGEST_TEXT = _plan_file._LONGEST_TEXT, longest
    try:
        return written(lambda folder: plans()[number].save(folder / "plan.json"))
    finally:
        _plan_file._LONGEST_TEXT = before


def _signed(source: Source, data: bytes) -> bytes:
    """A plan that was changed by somebody who made the digest anew."""
    document = damaged_document(source, json.loads(data))
    if isinstance(document, dict):
        document["sha256"] = _plan_file.content_digest(document)
    return json.dumps(document).encode()


def _signed_tensors(source: Source, files: Files) -> Files:
    """A plan whose tensor file was changed by somebody who made all digests anew."""
    (name,) = (name for name in files if name != "plan.json")
    tensors = damaged_tensors(source, files[name])
    document = json.loads(files["plan.json"])
    document["indices"]["sha256"] = _plan_file.hashlib.sha256(tensors).hexdigest()
    document["sha256"] = _plan_file.content_digest(document)
    return {"plan.json": json.dumps(document).encode(), name: tensors}


def _load_same(source: Source, folder: Path) -> None:
    """A plan that is read without its digest made anew says what it said."""
    assert content_of(PruningPlan.load(folder / "plan.json")) in [content_of(plan) for plan in plans()]


def _use_plan(source: Source, folder: Path) -> None:
    plan = PruningPlan.load(folder / "plan.json")
    assert plan.n_cut >= 0
    if sum(torch.Size(entry.shape).numel() for entry in plan.state.values()) < 10**6:
        plan.masks()
    plan.save(folder / "again.json")
    assert content_of(PruningPlan.load(folder / "again.json")) == content_of(plan)
    use = source.choice(["checkpoint", "checkpoint", "checkpoint", "model"])
    if use == "checkpoint":
        (folder / "source").mkdir()
        save_file(sample().state_dict(), folder / "source" / "model.safetensors")
        torchshear.shrink_checkpoint(plan, folder / "source", folder / "small")
    else:
        torchshear.shrink(sample(), plan)


@functools.cache
def _checkpoint_files() -> Files:
    state = sample().state_dict()
    names = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(sorted(state))}

    def write(folder: Path) -> None:
        for file in set(names.values()):
            save_file({n: t for n, t in state.items() if names[n] == file}, folder / file, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return written(write)


def _use_checkpoint(source: Source, folder: Path) -> None:
    unknown = source.choice(["refuse", "copy", "drop"])
    with suppress(TorchshearError):
        torchshear.shrink_checkpoint(plans()[0], folder, folder / "small", unknown)
    torchshear.load_checkpoint(Sample(), folder)


@functools.cache
def _record_files() -> Files:
    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as other:
            for name, data in _checkpoint_files().items():
                (Path(other) / name).write_bytes(data)
            torchshear.shrink_checkpoint(plans()[0], other, folder)

    return written(write)


def _resume(source: Source, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as other:
        for name, data in _checkpoint_files().items():
            (Path(other) / name).write_bytes(data)
        torchshear.shrink_checkpoint(plans()[0], other, folder)


@functools.cache
def _mask_files() -> Files:
    chosen = masks.choose_masks(sample(), "1x1", 0.5)
    return written(lambda folder: chosen.save(folder / "masks.safetensors"))


def _signed_report(source: Source, files: Files) -> Files:
    """Masks whose report was changed by somebody who made the digest anew."""
    tensors = {source.choice(["one.weight", "one.weight", "x"]): torch.ones(8, 6, dtype=torch.bool)}
    report = {"pattern": "1x1", "layers": [{"name": "one", "kind": "linear", "shape": [8, 6], "pattern": "1x1"}]}
    report["layers"][0] |= {"n_units": 48, "n_masked": 24, "requested": 0.5, "achieved": 0.5, "note": ""}  # type: ignore[index]
    data = json.dumps(damaged_document(source, report)).encode()
    text = (damaged_bytes(source, data) if source.choice([True, False]) else data).decode("utf-8", "replace")
    header = {"format": "torchshear.masks", "version": "2", "document": text, "sha256": _masks._digest(text, tensors)}
    return written(lambda folder: save_file(tensors, folder / "masks.safetensors", header))


def _use_masks(source: Source, folder: Path) -> None:
    found = masks.Masks.load(folder / "masks.safetensors")
    assert 0 <= found.sparsity <= 1
    masks.apply(Sample(), found)


CONFIGS: Final[tuple[Any, ...]] = (
    [{"op_types": ["Linear"], "sparsity": 0.5}, {"exclude": True, "op_names": ["two"]}],
    [{"op_types": ["default"], "sparse_ratio": 0.5, "global_group_id": 1, "granularity": "out_channel"}],
    {"pruning_configs": [{"target_sparsity": 0.5, "pattern": "4x1", "op_names": ["one"], "start_step": 0}]},
    {"target_sparsity": 0.75, "pruning_step": 16, "input_size": [2, 6], "prune_flag": 1},
)


def _config_files(source: Source, suffix: str) -> Files:
    write = json.dumps if suffix == "json" else yaml.safe_dump
    return {f"config.{suffix}": write(source.choice(CONFIGS)).encode()}


def _use_config(source: Source, folder: Path) -> None:
    (file,) = folder.glob("config.*")
    config = load_config(file)
    if source.choice([True, False]):
        read_unipruning_config(config)
    resolve(sample(), parse_config(config), plans()[0].analysis)


@functools.cache
def _unipruning_files() -> Files:
    return written(lambda folder: write_unipruning_mask(plans()[0], folder / "mask.json"))


@functools.cache
def _output_files() -> Files:
    def write(folder: Path) -> None:
        with output_folder(folder, "prune") as draft:
            (draft / "plan.json").write_text("{}")

    return written(write)


def _write_output(source: Source, folder: Path) -> None:
    with output_folder(folder, "prune", source.choice([True, False])) as draft:
        (draft / "plan.json").write_text("2")


_NAMES: Final = (
    *("", ".", "..", "a\0b", "a" * 256, "a" * 5000, "\ud800"),
    *("/dev/zero", "/dev/null/a", "no/no", "a/" * 3000, "~", "%s", "{0}"),
)
_READERS: Final[tuple[Callable[[Any], object], ...]] = (
    PruningPlan.load,
    masks.Masks.load,
    load_config,
    lambda name: load_config(f"{name}.yaml"),
    lambda name: torchshear.load_checkpoint(Sample(), name),
    lambda name: torchshear.shrink_checkpoint(plans()[0], name, name),
    lambda name: torchshear.shrink_checkpoint(name, name, "."),
    lambda name: plan_from_unipruning_mask(plans()[0].analysis, name),  # type: ignore[arg-type]
    lambda name: torchshear.plan(plans()[0].analysis, weights=name),  # type: ignore[arg-type]
    lambda name: torchshear.compare_latency({"a": name}),
    lambda name: plans()[0].save(f"/proc/{name}"),
    lambda name: torchshear.export_onnx(sample(), f"/proc/{name}", (X,)) if "a" in name else PruningPlan.load(name),
)


def _read_by_name(source: Source, folder: Path) -> None:
    source.choice(_READERS)(source.choice(_NAMES))


KINDS: Final[Mapping[str, Kind]] = {
    "plan, bytes": Kind(lambda s: _plan_files(s.integer(0, 2), 2000), _one("plan.json", damaged_bytes), _load_same),
    "plan, entries": Kind(
        lambda s: _plan_files(s.integer(0, 2), 2000), _one("plan.json", _as_json(damaged_document)), _load_same
    ),
    "plan, entries, signed": Kind(lambda s: _plan_files(s.integer(0, 2), 2000), _one("plan.json", _signed), _use_plan),
    "plan with tensors": Kind(
        lambda s: _plan_files(0, 3),
        lambda s, files: (
            files | {name: damaged_tensors(s, data) for name, data in files.items() if name != "plan.json"}
        ),
        _load_same,
    ),
    "plan with tensors, signed": Kind(lambda s: _plan_files(0, 3), _signed_tensors, _use_plan),
    "checkpoint": Kind(
        lambda s: _checkpoint_files(),
        lambda s, files: _one(s.choice(["model-1.safetensors", "model-2.safetensors"]), damaged_tensors)(s, files),
        _use_checkpoint,
    ),
    "checkpoint index, bytes": Kind(
        lambda s: _checkpoint_files(), _one("model.safetensors.index.json", damaged_bytes), _use_checkpoint
    ),
    "checkpoint index, entries": Kind(
        lambda s: _checkpoint_files(), _one("model.safetensors.index.json", _as_json(damaged_document)), _use_checkpoint
    ),
    "record of a shrunk checkpoint": Kind(
        lambda s: _record_files(),
        lambda s, files: _one("torchshear-shrink.json", s.choice([damaged_bytes, _as_json(damaged_document)]))(
            s, files
        ),
        _resume,
    ),
    "record of results": Kind(
        lambda s: _output_files(),
        lambda s, files: _one(RECORD, s.choice([damaged_bytes, _as_json(damaged_document)]))(s, files),
        _write_output,
    ),
    "masks": Kind(lambda s: _mask_files(), _one("masks.safetensors", damaged_tensors), _use_masks),
    "masks, signed": Kind(lambda s: {}, _signed_report, _use_masks),
    "config in YAML": Kind(lambda s: _config_files(s, "yaml"), _one("config.yaml", damaged_bytes), _use_config),
    "config in JSON, bytes": Kind(lambda s: _config_files(s, "json"), _one("config.json", damaged_bytes), _use_config),
    "config in JSON, entries": Kind(
        lambda s: _config_files(s, "json"), _one("config.json", _as_json(damaged_document)), _use_config
    ),
    "mask of UniPruning": Kind(
        lambda s: _unipruning_files(),
        lambda s, files: _one("mask.json", s.choice([damaged_bytes, _as_json(damaged_document)]))(s, files),
        lambda s, folder: plan_from_unipruning_mask(plans()[0].analysis, folder / "mask.json"),  # type: ignore[arg-type]
    ),
    "names": Kind(lambda s: {}, lambda s, files: files, _read_by_name),
}


@dataclass(frozen=True)
class Outcome:
    """What came of one damaged file: whether it was refused, and how long that took."""

    is_refused: bool
    seconds: float


def check_damaged(name: str, source: Source) -> Outcome:
    """Damage files of a kind and use them as a user does; anything but success and an error of ours fails."""
    kind = KINDS[name]
    files = kind.damage(source, dict(kind.files(source)))
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            (Path(folder) / file).write_bytes(data)
        started = time.process_time()
        try:
            kind.use(source, Path(folder))
            message = ""
        except TorchshearError as error:
            message = str(error) or "an error without a word"
        seconds = time.process_time() - started
    assert seconds < MAX_SECONDS, f"{name}: {seconds:.1f} s"
    assert len(message) < 20_000, f"a message that nobody can read: {message[:200]}"
    return Outcome(bool(message), seconds)
