"""Masks as a value: what is kept of each weight, layer by layer how that came about, and a file of both."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchshear._arguments import check_kind
from torchshear.errors import MaskError, first_line
from torchshear.storage._reading import UnreadableError, as_path, check_tensors, parse_json
from torchshear.storage._writing import atomic_path

_FORMAT = "torchshear.masks"
_VERSION = 2
_MAX_REPORT = 1 << 24  # characters


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Record of the masks of one layer, or of the heads of one attention layer.

    Attributes:
        name: name of the layer; of heads, of their channel group.
        kind: "linear", "transposed linear", "projection", "convolution", "transposed convolution", "embedding", or
            "heads".
        shape: shape of the weight, empty for heads.
        pattern: the pattern that units are of.
        n_units: number of units that could be masked: weights, blocks, groups of M, channels or heads.
        n_masked: number of units that are masked; of an N:M pattern, in which N of M are.
        requested: fraction of the weights that was to go.
        achieved: fraction of the weights that is masked.
        note: why the layer was skipped or lost another share than asked, or "".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    n_units: int
    n_masked: int
    requested: float
    achieved: float
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Masks of a model's parameters.

    Attributes:
        tensors: name of a parameter -> bool tensor of its shape on the CPU, True = kept; not to be written to.
        layers: what was done to each layer that was considered, in the order of the model.
        pattern: the pattern of the units, "" if the masks were read off a model.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    layers: tuple[LayerReport, ...] = ()
    pattern: str = ""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: tuple[LayerReport, ...] = (), pattern: str = "") -> "Masks":
        """Check and wrap masks.

        Raises:
            ArgumentError: the masks are no mapping from names, `layers` is no tuple of reports, or `pattern` no text.
            MaskError: a mask is no bool tensor.
        """
        check_kind("tensors", tensors, Mapping, "a mapping from names of parameters to masks")
        check_kind("layers", layers, tuple, "reports of layers")
        for report in layers:
            check_kind("an entry of layers", report, LayerReport, "the report of a layer")
        check_kind("pattern", pattern, str, "the name of a pattern, or ''")
        for name in tensors:
            check_kind("a name of a mask", name, str, "the name of a parameter")
        for name, mask in tensors.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                what = f"of type {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
                raise MaskError(f"the mask of {name!r} is {what}; expected a tensor of torch.bool, True = kept.")
        return cls(MappingProxyType(dict(tensors)), layers, pattern)

    @property
    def sparsity(self) -> float:
        """Fraction of the masked tensors' elements that is masked; 0 if there are none."""
        total = sum(mask.numel() for mask in self.tensors.values())
        return sum(int((~mask).sum()) for mask in self.tensors.values()) / total if total else 0.0

    def save(self, path: str | PathLike[str]) -> None:
        """Write masks and report into one safetensors file.

        Raises:
            OutputError: the folder is missing or not writable, or the disk is full; what was there is unchanged.
        """
        path = as_path(path, "the path of masks")
        document = json.dumps({"pattern": self.pattern, "layers": [asdict(layer) for layer in self.layers]})
        # copies, since tied parameters have one tensor under several names, which a file cannot hold
        tensors = {name: mask.clone(memory_format=torch.contiguous_format) for name, mask in self.tensors.items()}
        header = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "document": document,
            "sha256": _digest(document, tensors),
        }
        with atomic_path(path) as temporary:
            save_file(tensors, str(temporary), header)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Masks":
        """Read masks. No code in the file is run. Whether they fit a model is checked when they are laid on it.

        Raises:
            ArgumentError: `path` is no path.
            MaskError: the file is missing, damaged, of a newer version, or holds something else.
        """
        path = as_path(path, "the path of masks")
        header, tensors = _read(path)
        if header.get("format") != _FORMAT:
            raise _unreadable(path, f"its format is {header.get('format')!r}, not {_FORMAT!r}")
        if header.get("version") != str(_VERSION):
            raise _unreadable(path, f"its version is {header.get('version')!r}, and {_VERSION} is known")
        text = header.get("document", "")
        if header.get("sha256") != _digest(text, tensors):
            raise _unreadable(path, "its content is not what its digest was made of, so it was changed")
        try:
            if len(text) > _MAX_REPORT:
                raise UnreadableError(f"has {len(text)} characters")
            document = parse_json(text)
            return cls.of(tensors, tuple(_layer(entry) for entry in document["layers"]), str(document["pattern"]))
        except MaskError as error:
            raise _unreadable(path, str(error)) from error
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise _unreadable(path, f"its report is damaged ({first_line(error)})") from error


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header of a file and its tensors, if all of them are masks."""
    try:
        check_tensors(path)
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                kind = file.get_slice(name).get_dtype()
                if kind != "BOOL":
                    raise _unreadable(path, f"the mask of {name!r} is of type {kind}, not of BOOL")
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UnreadableError as error:
        raise _unreadable(path, f"it {error}") from error
    except (SafetensorError, OSError, RuntimeError, ArithmeticError) as error:
        raise _unreadable(path, first_line(error)) from error


def _digest(document: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the report and the bytes of all masks."""
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass"))
    for name, mask in sorted(tensors.items()):
        digest.update(f"|{name!r}|{tuple(mask.shape)}|".encode())
        digest.update(mask.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _layer(entry: Any) -> LayerReport:
    return LayerReport(
        name=str(entry["name"]),
        kind=str(entry["kind"]),
        shape=tuple(int(size) for size in entry["shape"]),
        pattern=str(entry["pattern"]),
        n_units=int(entry["n_units"]),
        n_masked=int(entry["n_masked"]),
        requested=float(entry["requested"]),
        achieved=float(entry["achieved"]),
        note=str(entry["note"]),
    )


def _unreadable(path: str | PathLike[str], why: str) -> MaskError:
    return MaskError(
        f"cannot read masks from {str(Path(path))!r}: {why}. Expected a file that Masks.save wrote; write it again."
    )
