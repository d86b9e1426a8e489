"""The file format of plans: a JSON document, with long index lists in a safetensors file beside it.

An index list is written as runs, "0-3,7,9-12", while that is short, else as "@name", a tensor in the other file.
Nothing in either file can run code.
"""

import hashlib
import json
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from torchshear._files import atomic_path
from torchshear.errors import PlanError

Indices = npt.NDArray[np.int64]

FORMAT = "torchshear.plan"
VERSION = 3
_LONGEST_TEXT = 2000  # characters of runs; longer lists go to the tensor file


class IndexWriter:
    """Turns index lists into text and gathers those that are too long for it."""

    def __init__(self) -> None:
        self.tensors: dict[str, npt.NDArray[np.int32]] = {}

    def write(self, indices: Indices) -> str:
        """Text for an index list; equal lists get equal text."""
        n_runs = 1 + np.count_nonzero(np.diff(indices) != 1)
        text = _runs(indices) if 2 * n_runs - 1 <= _LONGEST_TEXT else None  # a run is a digit and a comma at least
        if text is not None and len(text) <= _LONGEST_TEXT:
            return text
        key = hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest()[:16]
        self.tensors[key] = indices.astype(np.int32)
        return f"@{key}"


class IndexReader:
    """Turns text back into index lists."""

    def __init__(self, path: Path, tensors: dict[str, npt.NDArray[Any]]) -> None:
        self._path = path
        self._tensors = tensors

    def read(self, text: str) -> Indices:
        """Index list of a text.

        Raises:
            PlanError: the text is damaged or names a tensor that is not there.
        """
        try:
            if text.startswith("@"):
                return np.asarray(self._tensors[text[1:]], np.int64)
            if not text:
                return np.zeros(0, np.int64)
            parts = [run.partition("-") for run in text.split(",")]
            return np.concatenate([np.arange(int(low), int(high or low) + 1) for low, _, high in parts])
        except (KeyError, ValueError, AttributeError) as error:
            raise damaged(self._path, f"index list {str(text)[:40]!r} cannot be read") from error


def _runs(indices: Indices) -> str:
    if not len(indices):
        return ""
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts, stops = indices[np.r_[0, breaks + 1]], indices[np.r_[breaks, len(indices) - 1]]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))


def damaged(path: Path, what: str) -> PlanError:
    """The error for a file that cannot be read."""
    return PlanError(
        f"plan file {str(path)!r} is damaged: {what}. Expected a plan written by PruningPlan.save; save it again."
    )


def write_document(path: str | PathLike[str], document: dict[str, Any], writer: IndexWriter) -> None:
    """Write a plan's document and its long lists.

    The tensor file is named after its content, so an older plan under the same name stays whole until the new document
    replaces it.

    Raises:
        OutputError: the folder is not writable or the disk is full; the plan that was there is unchanged.
    """
    path = Path(path)
    before = _tensor_file(path)
    document = {"format": FORMAT, "version": VERSION, **document}
    if writer.tensors:
        data = save_tensors(dict(sorted(writer.tensors.items())))
        digest = hashlib.sha256(data).hexdigest()
        name = f"{path.stem}-{digest[:12]}.safetensors"
        with atomic_path(path.with_name(name)) as temporary:
            temporary.write_bytes(data)
        document["indices"] = {"file": name, "sha256": digest}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if before is not None and before.name != document.get("indices", {}).get("file"):
        with suppress(OSError):  # a left-over tensor file does no harm
            before.unlink()


def _tensor_file(path: Path) -> Path | None:
    """The tensor file that the plan at `path` names, if there is such a plan."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return path.with_name(Path(document["indices"]["file"]).name) if document["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_document(path: str | PathLike[str]) -> tuple[dict[str, Any], IndexReader]:
    """Read a plan's document.

    Raises:
        PlanError: a file is missing, truncated, damaged, or of a newer format.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"cannot read plan file {str(path)!r}: {error.strerror}. Expected a file written by save."
        ) from error
    except ValueError as error:
        raise damaged(path, f"it is not whole JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise damaged(path, f"it does not say format {FORMAT!r}")
    if document.get("version") != VERSION:
        raise PlanError(
            f"plan file {str(path)!r} has format version {document.get('version')!r}; this torchshear reads {VERSION}. "
            f"Install the version that wrote it, or make the plan again."
        )
    return document, IndexReader(path, _read_tensors(path, document.get("indices")))


def _read_tensors(path: Path, entry: Any) -> dict[str, npt.NDArray[Any]]:
    if entry is None:
        return {}
    try:
        data = path.with_name(Path(entry["file"]).name).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise damaged(path, f"its index file {entry['file']!r} was changed or cut short")
        return dict(load_tensors(data))
    except OSError as error:
        raise damaged(path, f"its index file {entry['file']!r} cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, SafetensorError) as error:
        raise damaged(path, "its index file entry is not readable") from error
