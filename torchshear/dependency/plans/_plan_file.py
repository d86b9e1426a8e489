"""The file format of plans: a JSON document, with long index lists in a safetensors file beside it.

An index list is written as runs, "0-3,7,9-12", while that is short, else as "@name", a tensor in the other file. The
document holds a digest of all its content, and of the other file. Nothing in either file can run code, and neither can
make a reader take more time or memory than its size and the limits below allow.
"""

import hashlib
import json
import re
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from torchshear.errors import PlanError
from torchshear.storage._reading import UnreadableError, as_path, parse_json, read_bytes, read_text
from torchshear.storage._writing import atomic_path

Indices = npt.NDArray[np.int64]

FORMAT = "torchshear.plan"
VERSION = 4
_DIGEST: Final = "sha256"
_LONGEST_TEXT = 2000  # characters of runs; longer lists go to the tensor file
_MAX_BYTES: Final = 1 << 25  # of the document; with 50,000 parameters it has about a third of that
_MAX_INDICES: Final = 1 << 26  # of all lists that differ
_MAX_TENSOR_BYTES: Final = 4 * _MAX_INDICES + (1 << 24)
_MAX_SIZE: Final = 1 << 40  # of one dimension
_RUN: Final = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?", re.ASCII)


class IndexWriter:
    """Turns index lists into text and gathers those that are too long for it."""

    def __init__(self) -> None:
        self.tensors: dict[str, npt.NDArray[np.int32]] = {}

    def write(self, indices: Indices) -> str:
        """Return the text for an index list; equal lists get equal text."""
        n_runs = 1 + np.count_nonzero(np.diff(indices) != 1)
        text = _runs(indices) if 2 * n_runs - 1 <= _LONGEST_TEXT else None  # a run is a digit and a comma at least
        if text is not None and len(text) <= _LONGEST_TEXT:
            return text
        key = hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest()[:16]
        self.tensors[key] = indices.astype(np.int32)
        return f"@{key}"


class IndexReader:
    """Turns text back into index lists, each text once."""

    def __init__(self, path: Path, tensors: dict[str, npt.NDArray[Any]]) -> None:
        self._path = path
        self._tensors = tensors
        self._known: dict[str, Indices] = {}
        self._n_left = _MAX_INDICES

    def read(self, text: str) -> Indices:
        """Return the index list of a text, not to be written to.

        Raises:
            PlanError: the text is damaged, names a tensor that is not there, or stands for too many indices.
        """
        if not isinstance(text, str):
            raise damage_error(self._path, f"index list {str(text)[:40]!r} cannot be read")
        if text not in self._known:
            found = self._tensor(text[1:]) if text.startswith("@") else self._from_runs(text)
            self._known[text] = found
        return self._known[text]

    def _tensor(self, key: str) -> Indices:
        found = self._tensors.get(key)
        if found is None or found.ndim != 1 or found.dtype.kind != "i":
            raise damage_error(self._path, f"index list {f'@{key}'[:40]!r} cannot be read")
        self._count(f"@{key}", len(found))
        return found.astype(np.int64)

    def _from_runs(self, text: str) -> Indices:
        runs = [_RUN.fullmatch(run) for run in text.split(",")] if text and len(text) <= _LONGEST_TEXT else []
        bounds = np.array([(int(run[1]), int(run[2] or run[1])) for run in runs if run], np.int64).reshape(-1, 2)
        lengths = bounds[:, 1] - bounds[:, 0] + 1
        if len(bounds) != len(runs) or (lengths < 1).any() or (text and not runs):
            raise damage_error(self._path, f"index list {text[:40]!r} cannot be read")
        self._count(text, int(lengths.sum()))
        return np.concatenate([np.arange(low, high + 1) for low, high in bounds] or [np.zeros(0, np.int64)])

    def _count(self, text: str, n_indices: int) -> None:
        self._n_left -= n_indices
        if self._n_left < 0:
            raise damage_error(self._path, f"index list {text[:40]!r} brings it to more than {_MAX_INDICES} indices")


def _runs(indices: Indices) -> str:
    if not len(indices):
        return ""
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts, stops = indices[np.r_[0, breaks + 1]], indices[np.r_[breaks, len(indices) - 1]]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))


def read_size(value: Any) -> int:
    """Read a size from a document.

    Raises:
        TypeError, ValueError: it is no whole number, or none that a dimension can have.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} in place of a size")
    if not 0 <= value < _MAX_SIZE:
        raise ValueError(f"{value} in place of a size")
    return value


def read_name(value: Any) -> str:
    """Read a text from a document.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} in place of a text")
    return value


def read_dimension(text: str) -> int:
    """Read a dimension from a document, where it is a key and so a text.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"0|[1-9][0-9]?", text, re.ASCII):
        raise ValueError(f"{text[:40]!r} in place of a dimension")
    return int(text)


def damage_error(path: Path, what: str) -> PlanError:
    """Return the error for a file that cannot be read."""
    return PlanError(
        f"plan file {str(path)!r} is damaged: {what}. Expected a plan written by PruningPlan.save; save it again."
    )


def content_digest(document: dict[str, Any]) -> str:
    """SHA-256 over the content of a document, however it is laid out; its own digest is left out."""
    content = {key: value for key, value in document.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def write_document(path: str | PathLike[str], document: dict[str, Any], writer: IndexWriter) -> None:
    """Write a plan's document and its long lists.

    The tensor file is named after its content. So an older plan under the same name stays whole until the new document
    replaces it, and its tensor file stays: a copy of the older plan may need it.

    Raises:
        ArgumentError: `path` is no path.
        OutputError: the folder is not writable or the disk is full; the plan that was there is unchanged.
    """
    path = as_path(path, "the path of a plan")
    document = {"format": FORMAT, "version": VERSION, **document}
    if writer.tensors:
        data = save_tensors(dict(sorted(writer.tensors.items())))
        digest = hashlib.sha256(data).hexdigest()
        name = f"{path.stem}-{digest[:12]}.safetensors"
        with atomic_path(path.with_name(name)) as temporary:
            temporary.write_bytes(data)
        document["indices"] = {"file": name, "sha256": digest}
    document = json.loads(json.dumps(document, allow_nan=False))  # as a reader sees it
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps({_DIGEST: content_digest(document), **document}, indent=1) + "\n", encoding="utf-8"
        )


def read_document(path: str | PathLike[str]) -> tuple[dict[str, Any], IndexReader]:
    """Read a plan's document.

    Raises:
        ArgumentError: `path` is no path.
        PlanError: a file is missing, truncated, damaged, changed, or of another version.
    """
    path = as_path(path, "the path of a plan")
    try:
        text = read_text(path, _MAX_BYTES)
    except UnreadableError as error:
        raise PlanError(f"plan file {str(path)!r} {error}. Expected a plan written by PruningPlan.save.") from error
    try:
        document = parse_json(text)
    except UnreadableError as error:
        raise damage_error(path, f"it {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise damage_error(path, f"it does not say format {FORMAT!r}")
    if document.get("version") != VERSION:
        raise PlanError(
            f"plan file {str(path)!r} has format version {document.get('version')!r}; this torchshear reads {VERSION}. "
            f"Install the version that wrote it, or make the plan again."
        )
    if document.get(_DIGEST) != content_digest(document):
        raise damage_error(
            path,
            "its content is not what its digest was made of, so it was changed since it was written. To keep other "
            "units, make a plan with torchshear.pruners.plan_from_kept",
        )
    return document, IndexReader(path, _read_tensors(path, document.get("indices")))


def _read_tensors(path: Path, entry: Any) -> dict[str, npt.NDArray[Any]]:
    if entry is None:
        return {}
    try:
        name = as_path(entry["file"], "the path of its index file").name
        data = read_bytes(path.with_name(name), _MAX_TENSOR_BYTES)
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise damage_error(path, f"its index file {entry['file']!r} was changed or cut short")
        return dict(load_tensors(data))
    except UnreadableError as error:
        raise damage_error(path, f"its index file {entry['file']!r} {error}") from error
    except PlanError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise damage_error(path, "its index file entry is not readable") from error
