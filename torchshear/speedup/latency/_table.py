"""The latency table: the time of a model on a device as a function of the widths of its groups."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from torchshear._arguments import check_kind, is_whole, quote
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_form import WidthForm
from torchshear.errors import ArgumentError, LatencyError
from torchshear.speedup.latency._device import Device
from torchshear.speedup.latency._fit import KernelFit, fit_times
from torchshear.speedup.latency._probes import NOISY, WidthProbe, blocked_share, shares_of, spread_of
from torchshear.storage._reading import UnreadableError, as_path, read_json
from torchshear.storage._writing import atomic_path

_LARGEST = 1 << 26  # bytes of a file
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class TableGroup:
    """A group of the model.

    Attributes:
        name: its name.
        width: its units in the dense model.
        multiplicity: positions that a unit stands for.
    """

    name: str
    width: int
    multiplicity: int


@dataclass(frozen=True, slots=True)
class TablePoint:
    """Widths at which the model was measured.

    Attributes:
        widths: name of each group that may shrink -> width.
        share: time of the whole model as a share of the dense one's, without the profiler.
        predicted_share: by the formula.
        unseen_share: by a formula that was fitted without this point; as `predicted_share` for the dense one.
    """

    widths: Mapping[str, int]
    share: float
    predicted_share: float
    unseen_share: float


@dataclass(frozen=True, slots=True, eq=False)
class LatencyTable:
    """Time of a model on a device, at any widths that the device runs well.

    Attributes:
        device: how the model runs.
        identity: what times depend on beside: version of the runtime, processor, sizes of the inputs.
        model_type: qualified class name of the model.
        fingerprint: hash of its graph.
        alignment: name of the alignment that the widths keep.
        block: positions that the device computes together.
        groups: the groups of the model.
        form: milliseconds as a polynomial in shares of units, filled up to whole blocks.
        dense_ms: milliseconds of the dense model: as measured, but no less than by the formula.
        known_share: share of the time of the dense model's kernels that follow widths in a known way.
        kernels: the kernels that the formula is made of.
        points: what was measured.
        noise: spread of repeated medians of the dense model: (largest - smallest) / smallest.
        n_disturbed: times of kernels that were left out, since they are far above what the others give.
        remarks: what happened to the file of the cache, if anything.
    """

    device: Device
    identity: Mapping[str, Any]
    model_type: str
    fingerprint: str
    alignment: str
    block: int
    groups: tuple[TableGroup, ...]
    form: WidthForm
    dense_ms: float
    known_share: float
    kernels: tuple[KernelFit, ...]
    points: tuple[TablePoint, ...]
    noise: float
    n_disturbed: int = 0
    remarks: tuple[str, ...] = ()

    def predict_ms(self, widths: Mapping[str, int]) -> float:
        """Return the milliseconds of the model at some widths.

        Args:
            widths: name of a group -> width; groups that are not named are dense.

        Raises:
            ArgumentError: a group is unknown, or its width is not between 1 and that of the dense model.
        """
        check_kind("widths", widths, Mapping, "a mapping from names of groups to widths")
        known = {group.name: group for group in self.groups}
        for name, width in widths.items():
            if name not in known or not is_whole(width) or not 1 <= width <= known[name].width:
                raise ArgumentError(
                    f"width {quote(width)} of group {quote(name)}; expected one of the {len(known)} groups of the "
                    f"table, with a width of at least 1 and at most that of the dense model."
                )
        return float(
            self.form.at(
                np.array([share_at(self, group, widths.get(group.name, group.width)) for group in self.groups])
            )
        )

    @property
    def errors(self) -> tuple[float, float]:
        """Median and largest error of the formula at widths that it was not fitted to, as shares of the times."""
        unseen = [abs(point.unseen_share / point.share - 1) for point in self.points[1:]]
        return (float(np.median(unseen)), max(unseen)) if unseen else (0.0, 0.0)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks, one sentence each."""
        notes = list(self.remarks)
        if self.noise > NOISY:
            notes.append(
                f"The machine is noisy: the dense model took up to {1 + self.noise:.2f} times its least median. Shares "
                f"are of the same rounds, and suffer less than milliseconds. "
                f"Close other programs, and give a table measured anew: device=measure_table(..., use_cache=False)."
            )
        if self.n_disturbed:
            notes.append(f"{self.n_disturbed} times of kernels were disturbed, and left out.")
        if not self.kernels:
            notes.append(
                "There are no times of single kernels whose sizes could be followed. The formula is a constant, and so "
                "much for each operation and each parameter, fitted to whole runs."
            )
        elif self.known_share < 0.9:
            notes.append(
                f"Kernels with {1 - self.known_share:.0%} of the time do not follow widths in a known way; they count "
                f"in proportion to the others."
            )
        return tuple(notes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON.

        Raises:
            OutputError: the file cannot be written; what was there before is unchanged.
        """
        terms = [[list(groups), value] for groups, value in self.form.terms.items()]
        document = {
            "format": _FORMAT,
            "device": asdict(self.device),
            "identity": dict(self.identity),
            "model": {"type": self.model_type, "fingerprint": self.fingerprint},
            "alignment": {"name": self.alignment, "block": self.block},
            "groups": [[group.name, group.width, group.multiplicity] for group in self.groups],
            "terms": terms,
            "dense_ms": self.dense_ms,
            "known_share": self.known_share,
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "points": [asdict(point) | {"widths": dict(point.widths)} for point in self.points],
            "noise": self.noise,
            "n_disturbed": self.n_disturbed,
            "remarks": list(self.remarks),
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a table.

        Raises:
            ArgumentError: its device cannot be measured here.
            LatencyError: the file is missing, damaged, or of another format.
        """
        path = as_path(path, "the path of a latency table")
        try:
            return cls._of_document(read_json(path, _LARGEST))
        except ArgumentError:
            raise
        except (UnreadableError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise LatencyError(
                f"{str(path)!r} is no latency table of this version, or is damaged: {error}. Measure it again."
            ) from error

    @classmethod
    def _of_document(cls, document: Mapping[str, Any]) -> Self:
        if document["format"] != _FORMAT:
            raise ValueError(f"its format is {document['format']!r}, not {_FORMAT}")
        groups = tuple(TableGroup(str(name), int(width), int(each)) for name, width, each in document["groups"])
        terms = {tuple(map(int, numbers)): float(value) for numbers, value in document["terms"]}
        if not all(0 <= number < len(groups) for numbers in terms for number in numbers):
            raise ValueError("a term of an unknown group")
        dense_ms = float(document["dense_ms"])
        if not all(math.isfinite(value) and value >= 0 for value in (*terms.values(), dense_ms)) or not dense_ms:
            raise ValueError("a term that is no time")
        return cls(
            device=Device(**document["device"]),
            identity=dict(document["identity"]),
            model_type=str(document["model"]["type"]),
            fingerprint=str(document["model"]["fingerprint"]),
            alignment=str(document["alignment"]["name"]),
            block=int(document["alignment"]["block"]),
            groups=groups,
            form=WidthForm(terms),
            dense_ms=dense_ms,
            known_share=float(document["known_share"]),
            kernels=tuple(KernelFit(**entry) for entry in document["kernels"]),
            points=tuple(TablePoint(**entry) for entry in document["points"]),
            noise=float(document["noise"]),
            n_disturbed=int(document["n_disturbed"]),
            remarks=tuple(map(str, document["remarks"])),
        )

    def __str__(self) -> str:
        median, worst = self.errors
        lines = [
            f"latency table of {self.model_type.rpartition('.')[2]}: {self.dense_ms:.3f} ms dense, {len(self.kernels)} "
            f"kernels ({self.known_share:.0%} of the time), measured at {len(self.points)} vectors of widths",
            f"{self.identity.get('runtime')}, {self.identity.get('cpu')}, {self.device.threads} threads, batch "
            f"{self.device.batch}",
            f"error at widths that were not fitted: median {median:.1%}, largest {worst:.1%}",
            *self.notes,
        ]
        return "\n".join(lines)


def make_table(
    groups: ChannelGroups,
    probes: Sequence[WidthProbe],
    device: Device,
    identity: Mapping[str, Any],
    alignment: tuple[str, int],
    remarks: tuple[str, ...] = (),
) -> LatencyTable:
    """Fit a table to probes, of which the first is the dense model; each other is left out once to see the error."""
    name, block = alignment
    fit = fit_times(groups, probes, block)
    shares = shares_of(groups, [probe.widths for probe in probes], block)
    predicted = fit.form.at(shares) / fit.dense_ms
    points = []
    for number, probe in enumerate(probes):
        share = float(predicted[number])
        unseen = share
        if number and len(probes) > 3:
            without = fit_times(groups, [*probes[:number], *probes[number + 1 :]], block)
            unseen = float(without.form.at(shares[:, number]) / without.dense_ms)
        points.append(TablePoint(dict(probe.widths), probe.share, share, unseen))
    return LatencyTable(
        device=device,
        identity=dict(identity),
        model_type=groups.graph.model_type,
        fingerprint=groups.graph.fingerprint,
        alignment=name,
        block=block,
        groups=tuple(TableGroup(group.name, group.width, group.multiplicity) for group in groups),
        form=fit.form,
        dense_ms=fit.dense_ms,
        known_share=fit.known_share,
        kernels=fit.kernels,
        points=tuple(points),
        noise=spread_of(probes),
        n_disturbed=fit.n_disturbed,
        remarks=remarks,
    )


def share_at(table: LatencyTable, group: TableGroup, width: int) -> float:
    """Return the share of a group's units that enters the formula of a table, at a width."""
    return blocked_share(group.width, group.multiplicity, width, table.block)


def check_table(table: LatencyTable, groups: ChannelGroups, inputs: Mapping[str, Any]) -> None:
    """Refuse a table of another network, other inputs, or another machine.

    Args:
        table: the table.
        groups: the analysed network.
        inputs: types and sizes of the inputs, as `input_identity` gives them.

    Raises:
        ArgumentError: the table is of something else.
    """
    names = [group.name for group in groups]
    if table.fingerprint != groups.graph.fingerprint or [group.name for group in table.groups] != names:
        raise ArgumentError(
            f"the table is of {table.model_type} with graph {table.fingerprint[:12]}, the model is "
            f"{groups.graph.model_type} with {groups.graph.fingerprint[:12]}. Measure a table of this model."
        )
    here = dict(table.device.identity()) | dict(inputs)
    other = {name: value for name, value in here.items() if table.identity.get(name) != value}
    if other:
        told = ", ".join(f"{name} {quote(table.identity.get(name))} (here {value!r})" for name, value in other.items())
        raise ArgumentError(f"the table is of another device or other inputs: {told}. Measure one here.")
