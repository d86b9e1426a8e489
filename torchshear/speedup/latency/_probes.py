"""Probes: a model measured whole and kernel by kernel at some widths of its groups."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from torchshear.dependency import Alignment, ChannelGroups
from torchshear.dependency.groups._aligned_widths import aligned_widths
from torchshear.dependency.groups._width_form import WidthForm
from torchshear.errors import LatencyError
from torchshear.speedup.latency._kernels import KernelTime, Profile

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_NARROWEST, _WIDEST = 0.15, 1.0  # mean shares of the probes
_SPREAD = 0.35  # of the shares of the groups of one probe, around its mean
_TRIES = 200
NOISY: Final = 0.1  # spread of the dense model's times, above which a machine is called noisy


@dataclass(frozen=True, slots=True)
class WidthProbe:
    """One measurement.

    Attributes:
        widths: name of each group that may shrink -> its width.
        share: time of the whole model as a share of the dense one's, taken in the same rounds.
        dense_ms: time of the dense model in these rounds.
        profile: times of the kernels, taken right after.
        reference_ms: least time of the dense model by its own profile, taken right before.
    """

    widths: Mapping[str, int]
    share: float
    dense_ms: float
    profile: Profile
    reference_ms: float

    def at_speed(self, reference_ms: float) -> "WidthProbe":
        """Return the probe as in a spell in which the dense model's kernels take another time."""
        scale = reference_ms / self.reference_ms
        kernels = tuple(replace(kernel, ms=kernel.ms * scale) for kernel in self.profile.kernels)
        whole_ms = None if self.profile.whole_ms is None else self.profile.whole_ms * scale
        profile = Profile(kernels, self.profile.overhead_ms * scale, whole_ms)
        return replace(self, profile=profile, reference_ms=reference_ms)

    def to_json(self) -> dict[str, Any]:
        """Return the probe as plain data."""
        kernels = [[k.name, k.operator, _plain(k.inputs), _plain(k.outputs), k.ms] for k in self.profile.kernels]
        return {
            "widths": dict(self.widths),
            "share": self.share,
            "dense_ms": self.dense_ms,
            "reference_ms": self.reference_ms,
            "overhead_ms": self.profile.overhead_ms,
            "whole_ms": self.profile.whole_ms,
            "kernels": kernels,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "WidthProbe":
        """Read a probe.

        Raises:
            ValueError: the entry does not hold one; LookupError and TypeError likewise.
        """
        kernels = tuple(
            KernelTime(str(name), str(operator), _shapes(inputs), _shapes(outputs), float(ms))
            for name, operator, inputs, outputs, ms in entry["kernels"]
        )
        whole_ms = entry.get("whole_ms")
        probe = cls(
            {str(name): int(width) for name, width in entry["widths"].items()},
            float(entry["share"]),
            float(entry["dense_ms"]),
            Profile(kernels, float(entry["overhead_ms"]), None if whole_ms is None else float(whole_ms)),
            float(entry["reference_ms"]),
        )
        times = [probe.share, probe.reference_ms, probe.dense_ms, probe.profile.total_ms, 1 + probe.profile.overhead_ms]
        if min([*times, *(1 + kernel.ms for kernel in kernels)]) <= 0:
            raise ValueError("a probe without times")
        return probe


def _plain(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> list[list[Any]]:
    return [[kind, list(shape)] for kind, shape in shapes]


def _shapes(entry: Sequence[Sequence[Any]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((str(kind), tuple(int(size) for size in shape)) for kind, shape in entry)


def spread_of(probes: Sequence[WidthProbe]) -> float:
    """Return how far the times of the dense model's whole runs are apart: (largest - smallest) / smallest."""
    dense = [probe.dense_ms for probe in probes]
    return (max(dense) - min(dense)) / min(dense)


def choose_probes(
    groups: ChannelGroups, alignment: Alignment, forms: Sequence[WidthForm], count: int, seed: int = 0
) -> list[dict[str, int]]:
    """Choose widths to measure at: the dense ones, and random ones, narrower from probe to probe.

    Sizes that depend on widths in different ways must differ in some probe, since kernels are told apart by them.
    Groups that the device runs well at one width alone do not count.

    Args:
        groups: the analysed network.
        alignment: which widths the device runs well.
        forms: sizes of all axes that widths change.
        count: number of probes.
        seed: of the widths.

    Returns:
        Name of each group that may shrink -> width, for each probe.

    Raises:
        LatencyError: no group has several widths, or none were found that tell all sizes apart.
    """
    rng = np.random.default_rng(seed)
    allowed = {group.name: aligned_widths(group, alignment) for group in groups.prunable}
    dense = {group.name: group.width for group in groups.prunable}
    free = {number for number, group in enumerate(groups) if len(allowed.get(group.name, ())) > 1}
    if not free:
        raise LatencyError(
            f"no group of {groups.graph.model_type} has more than one width with this alignment; expected at least "
            f"one. Measure with another, as align=1."
        )
    n_distinct = len({tuple(sorted(scaled(form, free).items())) for form in forms})
    means = np.linspace(_WIDEST, _NARROWEST, count)[1:]
    for extra in range(_TRIES):
        if extra % 20 == 19:
            means = np.append(means, rng.choice(means))
        probes = [dense]
        for mean in means:
            shares = np.clip(rng.uniform(mean - _SPREAD, mean + _SPREAD, len(allowed)), 0.0, 1.0)
            chosen = (
                int(widths[np.abs(widths - share * widths[-1]).argmin()])
                for widths, share in zip(allowed.values(), shares, strict=True)
            )
            probes.append(dict(zip(allowed, chosen, strict=True)))
        keys = {tuple(np.round(normalised(form.at(shares_of(groups, probes))), 9)) for form in forms}
        if len(keys) == n_distinct:
            return probes
    raise LatencyError(
        f"no {count} vectors of widths tell the {len(forms)} sizes of {groups.graph.model_type} apart. Measure with "
        f"more probes, or with an alignment that leaves groups more widths."
    )


def scaled(form: WidthForm, free: Collection[int]) -> dict[tuple[int, ...], float]:
    """Return the terms of a form divided by its value at dense widths, in the groups that have several widths alone."""
    total, found = sum(form.terms.values()), defaultdict[tuple[int, ...], float](float)
    for groups, value in form.terms.items():
        found[tuple(number for number in groups if number in free)] += value / total
    return {groups: round(value, 12) for groups, value in found.items()}


def normalised(values: Floats) -> Floats:
    """Divide values at the probes by that at the first, the dense one."""
    return np.asarray(values / values[0], np.float64)


def shares_of(groups: ChannelGroups, probes: Sequence[Mapping[str, int]], block: int = 1) -> Floats:
    """Return the shares of units that groups keep, shape (n_groups, n_probes).

    Args:
        groups: the analysed network.
        probes: name of a group -> width, for each probe; groups that are not named are dense.
        block: positions that the device computes together: widths count as if they filled whole blocks.
    """
    rows = [[blocked_share(g.width, g.multiplicity, w.get(g.name, g.width), block) for w in probes] for g in groups]
    return np.array(rows, np.float64).reshape(len(groups), len(probes))


def blocked_share(dense: int, multiplicity: int, width: int, block: int) -> float:
    """Return the share of units that a group keeps, as if its positions filled whole blocks."""
    return -(-width * multiplicity // block) * block / (dense * multiplicity)
