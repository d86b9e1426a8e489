"""The form of a shrunk model as plain data, from which the same form is made again without a search."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from torchshear.dependency.plans._plan_file import IndexReader, IndexWriter
from torchshear.dependency.plans._tensor_plans import are_ascending

FormKind = Literal["native", "traced"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A place that holds an integer.

    Attributes:
        module: qualified name of a module.
        attribute: its attribute: the integer itself, a tuple or list of integers, or an object with integers.
        item: index into the tuple or list, name of the object's attribute, or None.
    """

    module: str
    attribute: str
    item: int | str | None = None

    @property
    def name(self) -> str:
        """The name by which code reads the integer."""
        return self.item if isinstance(self.item, str) else self.attribute

    def __str__(self) -> str:
        """The place as code would write it."""
        end = f".{self.item}" if isinstance(self.item, str) else "" if self.item is None else f"[{self.item}]"
        return f"{self.module}.{self.attribute}{end}".lstrip(".")


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """A slice of the output of a module.

    Attributes:
        module: qualified name of the module.
        dim: the dimension that is divided, counted from the last.
        size: its number of positions.
        positions: positions that belong to the output; None for the whole output.
    """

    module: str
    dim: int = -1
    size: int = 0
    positions: tuple[int, ...] | None = None

    def meets(self, other: "OutputSlice") -> bool:
        """Return True if two slices have a position in common, or may have."""
        if self.module != other.module:
            return False
        if self.positions is None or other.positions is None or self.dim != other.dim:
            return True
        return not set(self.positions).isdisjoint(other.positions)


Sizes = Mapping[Slot, int]
OutputFactors = Mapping[OutputSlice, float]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """The form of a shrunk model: the changes that made it.

    Attributes:
        kind: "native" or "traced", see `torchshear.speedup.Shrunk`.
        reason: why it has this form.
        sizes: of a native form: integers in attributes of modules that were changed -> their new values.
        factors: of a native form: parts of what modules give -> the factor that keeps the scale of attention.
        parts: where only parts of the model are shrunk: name of each -> its own kind.
    """

    kind: FormKind
    reason: str
    sizes: Sizes = field(default_factory=dict)
    factors: OutputFactors = field(default_factory=dict)
    parts: Mapping[str, FormKind] = field(default_factory=dict)


def write_form(form: Form, writer: IndexWriter) -> dict[str, Any]:
    """Return the entry of a plan's document."""
    return {
        "kind": form.kind,
        "reason": form.reason,
        "sizes": [
            {
                "module": slot.module,
                "attribute": slot.attribute,
                **({} if slot.item is None else {"item": slot.item}),
                "value": value,
            }
            for slot, value in form.sizes.items()
        ],
        "factors": [_write_factor(output, factor, writer) for output, factor in form.factors.items()],
        **({"parts": dict(form.parts)} if form.parts else {}),
    }


def _write_factor(output: OutputSlice, factor: float, writer: IndexWriter) -> dict[str, Any]:
    entry: dict[str, Any] = {"module": output.module, "factor": factor}
    if output.positions is not None:
        positions = np.array(output.positions, np.int64)
        entry |= {"dim": output.dim, "size": output.size, "positions": writer.write(positions)}
    return entry


def read_form(entry: Mapping[str, Any], reader: IndexReader) -> Form:
    """Read what `write_form` wrote.

    Raises:
        PlanError: an index list is damaged.
        KeyError, TypeError, ValueError: the entry is.
    """
    kinds = [entry["kind"], *entry.get("parts", {}).values()]
    if not all(kind in get_args(FormKind) for kind in kinds):
        raise ValueError(f"{kinds!r} in 'form'")
    return Form(
        kind=entry["kind"],
        reason=_text(entry["reason"]),
        sizes=dict(_read_size(one) for one in entry["sizes"]),
        factors=dict(_read_factor(one, reader) for one in entry["factors"]),
        parts={_text(name): kind for name, kind in entry.get("parts", {}).items()},
    )


def _read_size(entry: Mapping[str, Any]) -> tuple[Slot, int]:
    item, value = entry.get("item"), _integer(entry["value"])
    if not isinstance(item, str | None):
        item = _integer(item)
    if value < 1:
        raise ValueError(f"{value} for {entry['attribute']!r} in 'form'")
    return Slot(_text(entry["module"]), _text(entry["attribute"]), item), value


def _read_factor(entry: Mapping[str, Any], reader: IndexReader) -> tuple[OutputSlice, float]:
    factor = entry["factor"]
    if not isinstance(factor, float) or not math.isfinite(factor) or factor <= 0:
        raise ValueError(f"{factor!r} for {entry['module']!r} in 'form'")
    if "positions" not in entry:
        return OutputSlice(_text(entry["module"])), factor
    dim, size, positions = _integer(entry["dim"]), _integer(entry["size"]), reader.read(entry["positions"])
    if dim >= 0 or not are_ascending(positions, size):
        raise ValueError(f"positions of {entry['module']!r} in 'form'")
    return OutputSlice(_text(entry["module"]), dim, size, tuple(positions.tolist())), factor


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} in 'form'")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} in 'form'")
    return value
