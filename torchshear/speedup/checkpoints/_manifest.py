"""Record of a checkpoint that is being shrunk: its plan, its source, and its finished shards."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import CheckpointError
from torchshear.storage._checkpoint import Checkpoint
from torchshear.storage._reading import read_json
from torchshear.storage._writing import atomic_path

NAME = "torchshear-shrink.json"
_FORMAT = "torchshear.shrink"
_VERSION = 1
_MAX_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class SourceStamp:
    """State of a shard of the source when it was read.

    Attributes:
        size: bytes of the file.
        mtime_ns: time of its last change.
        sha256: digest over its tensors.
    """

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that was written.

    Attributes:
        sha256: digest of the file.
        source: the shard that it was made of.
    """

    sha256: str
    source: SourceStamp


@dataclass(frozen=True, slots=True)
class Manifest:
    """Plan and source of a destination, and its finished shards.

    Attributes:
        plan: digest of all that the plan does to tensors.
        source: digest of names, shapes, types and metadata of the source.
        unknown: the choice for tensors that the plan does not know.
        shards: file name -> finished shard.
    """

    plan: str
    source: str
    unknown: str
    shards: Mapping[str, FinishedShard]

    def with_shard(self, name: str, shard: FinishedShard) -> "Manifest":
        """Return the record with one shard more."""
        return Manifest(self.plan, self.source, self.unknown, {**self.shards, name: shard})

    def save(self, folder: Path) -> None:
        """Write the record; what was there before stays if that fails.

        Raises:
            OutputError: the folder is not writable or the disk is full.
        """
        document = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        with atomic_path(folder / NAME) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the record in a folder, or None if there is none.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    path = folder / NAME
    if not os.path.lexists(path):
        return None
    try:
        document: dict[str, Any] = read_json(path, _MAX_BYTES)
        if (document["format"], document["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {document['format']!r} {document['version']!r}")
        shards = {
            name: FinishedShard(entry["sha256"], SourceStamp(**entry["source"]))
            for name, entry in document["shards"].items()
        }
        return Manifest(document["plan"], document["source"], document["unknown"], shards)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}), so nothing says what the files beside it "
            f"are. Expected the record of an earlier run; delete the folder or choose another."
        ) from error


def plan_digest(plan: PruningPlan) -> str:
    """Return the SHA-256 of all that a plan says of tensors."""
    digest = hashlib.sha256()
    for name, entry in sorted(plan.state.items()):
        digest.update(f"{name}|{entry.shape}|{sorted(entry.blocks.items())}|{entry.is_saved}".encode())
        lists = [(str(dim), kept) for dim, kept in sorted(entry.kept.items())]
        if entry.numbers is not None:
            lists.append((f"numbers {entry.numbers.size}", entry.numbers.kept))
        for label, indices in lists:
            digest.update(f"|{label}|{len(indices)}|".encode() + indices.astype(np.int64).tobytes())
    digest.update(f"{sorted(plan.whole.items())}|{sorted(plan.aliases.items())}".encode())
    return digest.hexdigest()


def source_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of names, shapes, types and metadata of a checkpoint."""
    digest = hashlib.sha256()
    for name, entry in sorted(checkpoint.entries.items()):
        digest.update(f"{name}|{entry.file}|{entry.shape}|{entry.dtype}\n".encode())
    texts = {shard: dict(text) for shard, text in checkpoint.metadata.items()}
    digest.update(json.dumps([texts, checkpoint.index_file, checkpoint.index_metadata], sort_keys=True).encode())
    return digest.hexdigest()
