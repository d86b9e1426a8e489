"""Shrinking a checkpoint on disk, tensor by tensor, without the model: resumable, and never a broken file."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from torchshear._arguments import check_one_of
from torchshear.calibration import Progress
from torchshear.calibration._progress import Report, check_progress, reporting
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.dependency.plans._tensor_plans import StatePlan, check_consistency
from torchshear.errors import ArgumentError, CheckpointError, OutputError
from torchshear.speedup.checkpoints._manifest import (
    NAME,
    FinishedShard,
    Manifest,
    SourceStamp,
    plan_digest,
    read_manifest,
    source_digest,
)
from torchshear.speedup.checkpoints._matching import CheckpointMatch, UnknownTensors, match_checkpoint
from torchshear.speedup.rewriting._slicing import slice_tensor
from torchshear.storage._checkpoint import Checkpoint, open_checkpoint
from torchshear.storage._reading import as_path
from torchshear.storage._writing import DRAFT, is_draft, publish

PLAN_NAME: Final = "plan.json"
_DRAFT: Final = f"{DRAFT}draft-"
_TEXT_SUFFIXES: Final = frozenset({".json", ".txt", ".model", ".jinja", ".md"})
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class ShrunkCheckpoint:
    """Result of `shrink_checkpoint`.

    Attributes:
        folder: folder of the result.
        shards: names of its files of tensors.
        resumed: those of them that an earlier run had finished.
        n_params: number of elements in all tensors before, and after.
        unknown: names of tensors that the plan does not know, copied or dropped.
        missing: names that the model saves and a checkpoint of a part of it does not have.
    """

    folder: Path
    shards: tuple[str, ...]
    resumed: tuple[str, ...]
    n_params: tuple[int, int]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]


def shrink_checkpoint(
    plan: PruningPlan | str | PathLike[str],
    source: str | PathLike[str],
    destination: str | PathLike[str],
    unknown: UnknownTensors = "refuse",
    progress: Progress = True,
) -> ShrunkCheckpoint:
    """Apply a plan to a checkpoint on disk, without holding the model.

    It reads one tensor at a time and writes shards with the names, types, order of keys and metadata of the source. At
    most one shard of the result and one tensor are in memory. The same call takes up a run that was killed: finished
    shards are checked against their recorded digests and not made again.

    The destination also gets the plan, as plan.json, and copies of the small text files beside the source's weights.
    Among them is config.json, the configuration of the unpruned model, to which the plan is applied: the pruned model
    is `small = shrink(Model(config), plan)`, which may be on the meta device, after its `load_state_dict`.

    Args:
        plan: the plan, or its file.
        source: folder of a checkpoint in safetensors, with one file or with shards and an index.
        destination: a new or empty folder, or one in which the same call was cut short.
        unknown: what to do with tensors that the plan does not know: "refuse", "copy" unchanged, or "drop".
        progress: see `torchshear.collect`; what is done are tensors.

    Returns:
        The shards that were written, and the tensors that were unknown or missing.

    Raises:
        ArgumentError: an argument is of another kind; destination and source are the same folder.
        PlanError: the plan's file cannot be read.
        CheckpointError: the source is damaged or not of the plan's model; the destination holds something else.
        OutputError: the destination cannot be written, or the disk is full; finished shards stay for the next run.

    Example:
        >>> import tempfile, torch, torchshear
        >>> from safetensors.torch import save_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, torch.randn(1, 4))), ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, f"{folder}/model.safetensors")
        ...     torchshear.shrink_checkpoint(plan, folder, f"{folder}/small").n_params
        (58, 30)
    """
    plan = _checked_plan(plan)
    destination = as_path(destination, "the destination")
    check_one_of("unknown", unknown, ("refuse", "copy", "drop"))
    check_progress(progress)
    checkpoint = open_checkpoint(source)
    manifest = Manifest(plan_digest(plan), source_digest(checkpoint), unknown, {})
    with _disk_errors_as_ours(destination), reporting(progress) as report:
        task = _Task(checkpoint, match_checkpoint(plan, checkpoint, unknown), destination, report)
        manifest = _open_destination(task, manifest)
        resumed = tuple(shard for shard in task.shards if _is_finished(task, manifest, shard))
        with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=task.destination) as draft:
            _write_texts(task, plan, Path(draft))
            for shard in task.shards:
                if shard in resumed:
                    task.advance(len(checkpoint.names_in(shard)))
                else:
                    manifest = _make_shard(task, manifest, shard, Path(draft))
            _write_index(task, Path(draft))
    return ShrunkCheckpoint(
        task.destination, task.shards, resumed, task.n_params(), task.match.unknown, task.match.missing
    )


def _checked_plan(plan: PruningPlan | str | PathLike[str]) -> PruningPlan:
    if isinstance(plan, str | PathLike):
        return PruningPlan.load(plan)
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(f"plan is {type(plan).__name__}; expected a PruningPlan or the path of its file.")
    if plan.analysis is not None:
        check_consistency(plan.kept, plan.state, plan.analysis)
    return plan


class _Task:
    """A checkpoint that is being shrunk, its destination, and the progress."""

    def __init__(self, checkpoint: Checkpoint, match: CheckpointMatch, destination: Path, report: Report) -> None:
        self.checkpoint = checkpoint
        self.match = match
        self.destination = destination
        kept = {checkpoint.entries[name].file for name in match.entries}
        self.shards = tuple(shard for shard in checkpoint.shards if shard in kept)
        self._report = report
        self._done = 0

    def advance(self, n_tensors: int = 1) -> None:
        """Report that tensors are done."""
        self._done += n_tensors
        self._report(self._done, sum(len(self.checkpoint.names_in(shard)) for shard in self.shards), "shrinking")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the result."""
        entry = self.match.entries[name]
        return self.checkpoint.entries[name].shape if entry is None else entry.new_shape

    def n_params(self) -> tuple[int, int]:
        """Count the elements of the source and of the result."""
        before = sum(torch.Size(entry.shape).numel() for entry in self.checkpoint.entries.values())
        return before, sum(torch.Size(self.shape(name)).numel() for name in self.match.entries)


@contextmanager
def _disk_errors_as_ours(destination: Path) -> Iterator[None]:
    """Raise OutputError for what the system or the serializer raises where a disk is full or read-only."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write into {str(destination)!r}: {getattr(error, 'strerror', None) or error}. Expected a folder "
            f"that can be made or written, with space on its disk; call again to go on from the finished shards."
        ) from error


def _open_destination(task: _Task, manifest: Manifest) -> Manifest:
    """Make the folder, or take an empty one or one in which the same task was cut short; return its record.

    Raises:
        CheckpointError: the folder holds something else.
    """
    folder = task.destination
    if folder.resolve() == task.checkpoint.folder.resolve():
        raise ArgumentError(f"destination {str(folder)!r} is the source's folder; give another, the source is kept.")
    folder.mkdir(parents=True, exist_ok=True)
    known = read_manifest(folder)
    if known is None:
        other = sorted(file.name for file in folder.iterdir() if not is_draft(file))
        if other:
            raise CheckpointError(
                f"destination {str(folder)!r} holds {other[0]!r} and no record of a run. Expected a new or empty "
                f"folder, or one in which the same call was cut short; choose another."
            )
        _remove_drafts(folder)
        manifest.save(folder)
        return manifest
    for what, mine, its in (
        ("another plan", manifest.plan, known.plan),
        ("another source", manifest.source, known.source),
        (f"unknown={known.unknown!r}", manifest.unknown, known.unknown),
    ):
        if mine != its:
            raise CheckpointError(
                f"destination {str(folder)!r} holds what was made with {what}. Expected a new or empty folder, or one "
                f"in which the same call was cut short; delete it or choose another."
            )
    _remove_drafts(folder)
    return known


def _remove_drafts(folder: Path) -> None:
    """Remove what runs that were killed left unfinished."""
    for draft in filter(is_draft, list(folder.iterdir())):
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink()


def _is_finished(task: _Task, manifest: Manifest, shard: str) -> bool:
    """Check that a shard is finished: its digest, and that of its source, are those of the record.

    Raises:
        CheckpointError: it was changed since, or its source was.
    """
    record, path = manifest.shards.get(shard), task.destination / shard
    if record is None or not path.exists():
        return False
    if _file_digest(path) != record.sha256:
        raise CheckpointError(
            f"{str(path)!r} was changed since it was written. Delete it to have it made again, or the whole folder."
        )
    stamp = record.source
    if _stat(task, shard) != (stamp.size, stamp.mtime_ns) and _tensors_digest(task.checkpoint, shard) != stamp.sha256:
        raise CheckpointError(
            f"shard {shard!r} of the source in {str(task.checkpoint.folder)!r} was changed since {str(path)!r} was "
            f"made of it. Delete the destination, or give the source that it was begun with."
        )
    return True


def _make_shard(task: _Task, manifest: Manifest, shard: str, draft: Path) -> Manifest:
    """Slice and write one shard. Its digest is recorded before it gets its name: each finished shard has a record."""
    size, mtime_ns = _stat(task, shard)
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = {}
    for name in task.checkpoint.names_in(shard):
        value = task.checkpoint[name]
        _add_to_digest(digest, name, value)
        if name in task.match.entries:
            tensors[name] = _slice_bits(value, task.match.entries[name])
        task.advance()
    temporary = draft / shard
    save_file(tensors, temporary, metadata=dict(task.checkpoint.metadata[shard]) or None)
    tensors.clear()
    stamp = SourceStamp(size, mtime_ns, digest.hexdigest())
    manifest = manifest.with_shard(shard, FinishedShard(_file_digest(temporary), stamp))
    manifest.save(task.destination)
    publish(temporary, task.destination / shard, like=task.checkpoint.folder / shard)
    return manifest


def _slice_bits(value: Tensor, entry: StatePlan | None) -> Tensor:
    """Slice a tensor as integers of its width, which torch can do with every type and which keeps all bits."""
    if entry is None or entry.numbers is not None:
        return value if entry is None else slice_tensor(value, entry).contiguous()
    return slice_tensor(value.view(_INTEGERS.get(value.itemsize, value.dtype)), entry).view(value.dtype).contiguous()


def _stat(task: _Task, shard: str) -> tuple[int, int]:
    found = os.stat(task.checkpoint.folder / shard)
    return found.st_size, found.st_mtime_ns


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors_digest(checkpoint: Checkpoint, shard: str) -> str:
    digest = hashlib.sha256()
    for name in checkpoint.names_in(shard):
        _add_to_digest(digest, name, checkpoint[name])
    return digest.hexdigest()


def _add_to_digest(digest: "hashlib._Hash", name: str, value: Tensor) -> None:
    digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)


def _write_texts(task: _Task, plan: PruningPlan, draft: Path) -> None:
    """Write the plan, and copy configuration, tokenizer and the like; not weights in other formats."""
    for file in sorted(task.checkpoint.folder.iterdir()):
        is_known = file.name in (NAME, PLAN_NAME) or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _TEXT_SUFFIXES and not is_known:
            shutil.copyfile(file, draft / file.name)
    plan.save(draft / PLAN_NAME)
    for file in sorted(draft.iterdir()):
        source = task.checkpoint.folder / file.name
        publish(file, task.destination / file.name, like=source if source.exists() else None)


def _write_index(task: _Task, draft: Path) -> None:
    """Write the index last: a folder that has it has all shards."""
    checkpoint = task.checkpoint
    if checkpoint.index_file is None:
        return
    metadata = dict(checkpoint.index_metadata)
    metadata["total_size"] = sum(_data_size(task.destination / shard) for shard in task.shards)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = task.n_params()[1]
    where = {name: checkpoint.entries[name].file for name in sorted(task.match.entries)}
    document = {"metadata": metadata, "weight_map": where}
    (draft / checkpoint.index_file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    publish(draft / checkpoint.index_file, task.destination / checkpoint.index_file)


def _data_size(path: Path) -> int:
    """Return the bytes of the tensors of a shard: all behind the header, whose length is in its first eight bytes."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
