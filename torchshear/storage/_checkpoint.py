"""Checkpoints on disk: safetensors shards with their index, of which one tensor is read at a time."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchshear.errors import ArgumentError, CheckpointError, first_line
from torchshear.storage._reading import UnreadableError, as_path, check_tensors, read_json

_INDEX = ".safetensors.index.json"
_MAX_INDEX: Final = 1 << 25  # bytes
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a checkpoint, without its values.

    Attributes:
        file: name of the shard that holds it.
        shape: sizes of the dimensions.
        dtype: its type as safetensors writes it, as in "BF16".
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a checkpoint by name. Looking one up reads it, and nothing of it is kept.

    Attributes:
        folder: where the files are.
        entries: name -> entry, shard after shard, each in the order of its file.
        metadata: shard -> the text that its header carries.
        index_file: name of the index file; None for a single file.
        index_metadata: the "metadata" of the index.
    """

    folder: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, Mapping[str, str]]
    index_file: str | None
    index_metadata: Mapping[str, Any]

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the files that hold tensors."""
        return tuple(self.metadata)

    def names_in(self, shard: str) -> list[str]:
        """Names of the tensors of a shard, in the order of the file."""
        return [name for name, entry in self.entries.items() if entry.file == shard]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, on the CPU.

        Raises:
            KeyError: there is none of that name.
            CheckpointError: the file cannot be read.
        """
        path = self.folder / self.entries[name].file
        # Opened anew each time: what was read from a mapped file stays resident while the file is open.
        tensor: Tensor = _read(path, lambda file: file.get_tensor(name))
        return tensor


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Open a checkpoint as Hugging Face libraries write it; reads headers only.

    Args:
        path: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json` (or one other
            `*.safetensors.index.json` or `*.safetensors`); or such a file itself.

    Raises:
        CheckpointError: there is no checkpoint, a shard is missing or damaged, or index and shards disagree.
    """
    main = _main_file(as_path(path, "the path of a checkpoint"))
    if not main.name.endswith(_INDEX):
        entries, metadata = _header(main)
        return Checkpoint(main.parent, entries, {main.name: metadata}, None, {})
    where, index_metadata = _index(main)
    found: dict[str, TensorEntry] = {}
    metadata_of: dict[str, Mapping[str, str]] = {}
    for shard in sorted(set(where.values())):
        entries, metadata_of[shard] = _header(main.parent / shard)
        listed = {name for name, file in where.items() if file == shard}
        if entries.keys() != listed:
            name = sorted(entries.keys() ^ listed)[0]
            holder, other = ("the index", "the shard") if name in listed else ("the shard", "the index")
            raise CheckpointError(
                f"{str(main)!r} and shard {shard!r} disagree: {name!r} is in {holder} and not in {other}. Expected an "
                f"index of what its shards hold; download or save the checkpoint again."
            )
        found |= entries
    return Checkpoint(main.parent, found, metadata_of, main.name, index_metadata)


def _main_file(path: Path) -> Path:
    """Find the file that names or holds all tensors."""
    if not os.path.isdir(path):
        if os.path.isfile(path) and path.name.endswith((".safetensors", _INDEX)):
            return path
        raise CheckpointError(
            f"{str(path)!r} is {'no safetensors file' if os.path.exists(path) else 'not there'}. Expected a folder "
            f"with model.safetensors or with shards and model.safetensors.index.json."
        )
    for name in ("model.safetensors", f"model{_INDEX}"):
        if (path / name).is_file():
            return path / name
    for pattern in (f"*{_INDEX}", "*.safetensors"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise CheckpointError(
        f"there is no checkpoint in {str(path)!r}. Expected model.safetensors, or shards and "
        f"model.safetensors.index.json; other formats are to be saved as safetensors first."
    )


def _index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Name -> shard, and the metadata of an index file."""
    try:
        document = read_json(path, _MAX_INDEX)
    except UnreadableError as error:
        raise CheckpointError(f"index {str(path)!r} {error}. Expected JSON with a weight_map.") from error
    try:
        where, metadata = document["weight_map"], document.get("metadata") or {}
        plain = all(as_path(file, "shard").name == file for file in where.values())
    except (ArgumentError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"index {str(path)!r} is damaged: {type(error).__name__}: {error}. Expected a weight_map from tensor names "
            f"to files beside the index."
        ) from error
    if not plain or not where or not isinstance(metadata, dict):
        raise CheckpointError(
            f"index {str(path)!r} is damaged. Expected a weight_map from tensor names to files beside the index."
        )
    return dict(where), metadata


def _header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries and metadata of a shard."""

    def read(file: Any) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        entries = {n: TensorEntry(path.name, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}
        return entries, dict(file.metadata() or {})

    return _read(path, read)


def _read(path: Path, read: Callable[[Any], _T]) -> _T:
    try:
        check_tensors(path)
        with safe_open(str(path), framework="pt") as file:
            return read(file)
    except (UnreadableError, OSError, SafetensorError, RuntimeError, ArithmeticError) as error:
        what = str(error) if isinstance(error, UnreadableError) else f"cannot be read: {first_line(error)}"
        raise CheckpointError(
            f"shard {str(path)!r} {what}. Expected a whole safetensors file; download or save the checkpoint again."
        ) from error


@dataclass(frozen=True, slots=True)
class Matching:
    """Tensors of a checkpoint matched with those of a model.

    Attributes:
        names: name in the checkpoint -> name in the model, for those that the model has.
        prefix: what all names of the checkpoint lack in front, "" for nothing; as that of a model without its head.
    """

    names: Mapping[str, str]
    prefix: str = ""


def match_names(checkpoint: Iterable[str], known: Collection[str]) -> Matching:
    """Match names of a checkpoint with those of a model: as they are, or with one prefix added or removed throughout.

    Of all ways, that which matches most names is taken; of two that match equally many, the one that changes less.

    Args:
        checkpoint: names of the tensors of a checkpoint.
        known: names that the model has.
    """
    given = list(checkpoint)
    best = Matching({name: name for name in given if name in known})
    for prefix in _prefixes(known):
        best = _better(best, Matching({name: prefix + name for name in given if prefix + name in known}, prefix))
    for prefix in _prefixes(given):
        bare = {name: name.removeprefix(prefix) for name in given}
        best = _better(best, Matching({name: other for name, other in bare.items() if other in known}))
    return best


def _better(best: Matching, other: Matching) -> Matching:
    return other if len(other.names) > len(best.names) else best


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the first one and the first two parts of dotted names, with the dot."""
    found = {".".join(name.split(".")[:n]) + "." for name in names for n in (1, 2) if name.count(".") >= n}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))
