"""From probes to a formula: the time of every kernel by its sizes, and the time of the model by its kernels."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.groups._width_form import WidthForm, axis_forms
from torchshear.speedup.latency._kernels import KernelTime, Shape
from torchshear.speedup.latency._matching import match_kernels
from torchshear.speedup.latency._probes import WidthProbe, normalised, shares_of

Floats = npt.NDArray[np.float64]

_PRODUCTS: Final[Mapping[str, int]] = MappingProxyType(  # matrix products -> the place of the first factor
    dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits"), 0)
    | dict.fromkeys(("aten.linear", "aten.matmul", "aten.mm", "aten.bmm"), 0)
    | dict.fromkeys(("aten.addmm", "aten.baddbmm"), 1)
)
_TRANSPOSED: Final = frozenset({"ConvTranspose", *(f"aten.conv_transpose{n}d" for n in (1, 2, 3))})
_CONVOLUTIONS: Final = frozenset({"Conv", "FusedConv", *(f"aten.conv{n}d" for n in (1, 2, 3)), *_TRANSPOSED})
_FAR_ABOVE: Final = 0.25  # share of the formula, by which a time is above it if it was disturbed
_DISTURBED: Final = 0.01  # share of the whole model's least time, likewise
_REFITS, _LEAST_POINTS = 4, 4
_ONE: Final = WidthForm({(): 1.0})


@dataclass(frozen=True, slots=True)
class KernelFit:
    """One kernel of the model, as the table has it.

    Attributes:
        name: name of its node.
        operator: type of the node.
        dense_ms: its time in the dense model.
        error: largest distance of the formula from a measured time, as a share of the latter.
    """

    name: str
    operator: str
    dense_ms: float
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Formula for the time of a model.

    Attributes:
        form: milliseconds, as a polynomial in shares of units as if these filled whole blocks.
        dense_ms: milliseconds of the dense model: as measured, but no less than by the formula. What it takes more is a
            step that no polynomial follows, as where weights begin to fit into a cache.
        kernels: the kernels that the formula is made of.
        known_share: their share of the time of all kernels of the dense model.
        n_disturbed: how many times of kernels were disturbed by other programs.
    """

    form: WidthForm
    dense_ms: float
    kernels: tuple[KernelFit, ...]
    known_share: float
    n_disturbed: int


@dataclass(frozen=True, slots=True, eq=False)
class _Kernel:
    """A kernel that all probes have.

    Attributes:
        name: its name.
        operator: its type.
        kind: what kernels have in common whose times follow one formula: the operator, types, and sizes that no width
            changes.
        features: what its time is a sum of: a constant, sizes of what it reads and writes, and products.
        times: milliseconds at each probe.
    """

    name: str
    operator: str
    kind: tuple[object, ...]
    features: tuple[WidthForm, ...]
    times: Floats


def fit_times(groups: ChannelGroups, probes: Sequence[WidthProbe], block: int) -> Fit:
    """Fit the time of a model to what was measured, the first probe being the dense model.

    The time of a kernel is a constant, and as much for each value that it reads, that it writes, and for each product:
    for a convolution that is a constant plus a term linear in (blocks in) x (blocks out). No coefficient is negative.
    Kernels of the same operator, types and fixed sizes share one formula. Which sizes follow which widths is read off
    the shapes that the runtime reports in each probe. The model takes a factor of what widths change of the sum of its
    kernels, and a constant: of what kernels take at any width, a part is the profiler's own time. Both stand for what
    cannot be followed as well. In torch, where whole runs are measured apart, kernels with products and others have a
    factor each, since a compiled model runs the latter with the former. Without kernels that can be followed there is
    one for operations and one for parameters. All that is fitted to whole runs, each taken in the same rounds as the
    dense model's.

    Args:
        groups: the analysed network.
        probes: what was measured.
        block: positions that the device computes together.
    """
    usual_ms = float(np.median([probe.reference_ms for probe in probes]))
    probes = [probe.at_speed(usual_ms) for probe in probes]
    shares = shares_of(groups, [probe.widths for probe in probes], block)
    known = _find_kernels(groups, probes, block)
    by_kind: dict[tuple[object, ...], list[_Kernel]] = defaultdict(list)
    for kernel in known:
        by_kind[kernel.kind].append(kernel)
    least_ms = min(probe.profile.total_ms for probe in probes)
    has_whole_runs = any(probe.profile.whole_ms is not None for probe in probes)
    parts, fits, n_disturbed = [WidthForm({}), WidthForm({})], list[KernelFit](), 0  # kernels with products, and others
    for alike in by_kind.values():
        coefficients, is_disturbed = _fit_kind(alike, shares, _DISTURBED * least_ms)
        for kernel, excluded in zip(alike, is_disturbed, strict=True):
            form = WidthForm({})
            for value, feature in zip(coefficients, kernel.features, strict=True):
                form = form + feature * float(value)
            has_products = bool(kernel.features[-1].terms)
            varying = WidthForm({numbers: value for numbers, value in form.terms.items() if numbers})
            parts[not has_products] = parts[not has_products] + varying
            gaps = kernel.times - form.at(shares)
            n_disturbed += int(excluded.sum())
            error = np.abs(np.where(excluded, 0.0, gaps) / np.maximum(kernel.times, 1e-3)).max()
            fits.append(KernelFit(kernel.name, kernel.operator, float(kernel.times[0]), float(error)))
    if not fits:
        forms = WidthCost(groups).forms()
        parts = [forms["macs"], forms["n_params"]]
    elif not has_whole_runs:
        parts = [parts[0] + parts[1]]
    dense_ms = float(np.median([probe.dense_ms for probe in probes]))
    form = _fit_sum(parts, shares, dense_ms * np.array([probe.share for probe in probes]))
    all_ms = sum(kernel.ms for kernel in probes[0].profile.kernels)
    known_share = sum(kernel.dense_ms for kernel in fits) / all_ms if all_ms else 0.0
    return Fit(form, max(dense_ms, float(form.at(shares[:, 0]))), tuple(fits), known_share, n_disturbed)


def _fit_sum(parts: Sequence[WidthForm], shares: Floats, times: Floats) -> WidthForm:
    """Fit a constant and so much of each part to the time of the model; errors are relative, no factor is negative."""
    rows = np.stack([*(part.at(shares) for part in parts), np.ones(len(times))], 1)
    scale = rows.max(0)
    scale[scale == 0] = 1.0
    found, _ = nnls(rows / scale / times[:, None], np.ones(len(times)))
    factors = (found / scale).tolist()
    return sum((part * factor for part, factor in zip(parts, factors[:-1], strict=True)), WidthForm({(): factors[-1]}))


def _fit_kind(alike: Sequence[_Kernel], shares: Floats, tolerance: float) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Fit kernels of one kind; errors count by the root of the time, between absolute and relative.

    A time far above the formula was disturbed, since nothing makes a kernel faster than it is: it is left out, and the
    rest is fitted again.

    Args:
        alike: the kernels.
        shares: shares of units at the probes.
        tolerance: milliseconds by which a time may be above the formula in any case.

    Returns:
        The coefficients of the features, and which times were left out, shape (kernels, probes).
    """
    rows = np.concatenate([np.stack([form.at(shares) for form in kernel.features], 1) for kernel in alike])
    times = np.concatenate([kernel.times for kernel in alike])
    scale, weight = rows.max(0), 1 / np.sqrt(np.maximum(times, 1e-3))
    scale[scale == 0] = 1.0
    is_out = np.zeros(len(times), bool)
    for _ in range(_REFITS):
        found, _ = nnls((rows / scale * weight[:, None])[~is_out], (times * weight)[~is_out])
        above = times - rows / scale @ found
        now = (above > tolerance) & (above > _FAR_ABOVE * (times - above))
        if (now == is_out).all() or (~now).sum() < _LEAST_POINTS:
            break
        is_out = now
    return np.asarray(found / scale, np.float64), is_out.reshape(len(alike), -1)


def _find_kernels(groups: ChannelGroups, probes: Sequence[WidthProbe], block: int) -> list[_Kernel]:
    """Find the kernels that all probes have and whose sizes all follow widths in a known way.

    Kernels are told by the order in which they run: names hold numbers that differ between exports.
    """
    sizes = _Sizes.of(groups, [probe.widths for probe in probes], block)
    dense, *others = (probe.profile.kernels for probe in probes)
    versions = [[kernel] for kernel in dense]
    for own in others:
        for number, here in match_kernels(dense, own):
            versions[number].append(own[here])
    found = (_follow(every, sizes) for every in versions if len(every) == len(probes))
    return [kernel for kernel in found if kernel is not None]


def _follow(versions: Sequence[KernelTime], sizes: "_Sizes") -> _Kernel | None:
    """Return a kernel with its sizes as forms; None if one follows no axis, or the kernel differs between probes."""
    first = versions[0]
    signature = [(one.operator, _layout(one.inputs), _layout(one.outputs)) for one in versions]
    if any(one != signature[0] for one in signature):
        return None
    inputs = [sizes.shape([one.inputs[n][1] for one in versions]) for n in range(len(first.inputs))]
    outputs = [sizes.shape([one.outputs[n][1] for one in versions]) for n in range(len(first.outputs))]
    if any(shape is None for shape in (*inputs, *outputs)):
        return None
    read = [shape for shape in inputs if shape is not None]
    written = [shape for shape in outputs if shape is not None]
    kind = (signature[0], tuple(_fixed(shape) for shape in (*read, *written)))
    features = (_ONE, _elements(read), _elements(written), _products(first.operator, read, written))
    return _Kernel(first.name, first.operator, kind, features, np.array([one.ms for one in versions]))


def _layout(tensors: Sequence[tuple[str, Shape]]) -> tuple[tuple[str, int], ...]:
    return tuple((kind, len(shape)) for kind, shape in tensors)


def _fixed(shape: Sequence[WidthForm]) -> tuple[float | None, ...]:
    """Return sizes that no width changes, None for the others."""
    return tuple(size.terms.get((), 0.0) if size.is_constant else None for size in shape)


def _elements(shapes: Sequence[Sequence[WidthForm]]) -> WidthForm:
    return sum((prod(shape, start=_ONE) for shape in shapes), start=WidthForm({}))


def _products(operator: str, read: Sequence[Sequence[WidthForm]], written: Sequence[Sequence[WidthForm]]) -> WidthForm:
    """Return the number of products that a convolution or a matrix product computes; none for other operators."""
    if operator in _CONVOLUTIONS and len(read) > 1:
        values = read[0] if operator in _TRANSPOSED else written[0]
        return prod(read[1][1:], start=prod(values, start=_ONE))
    place = _PRODUCTS.get(operator)
    if place is not None and len(read) > place and read[place]:
        return prod(written[0], start=_ONE) * read[place][-1]
    return WidthForm({})


@dataclass(frozen=True, slots=True, eq=False)
class _Sizes:
    """Sizes at all probes, by which forms are found.

    Attributes:
        known: sizes at the probes, as shares of the first -> the form with the value 1 at dense widths.
        shares: blocked shares of groups in the dense model, shape (n_groups,).
    """

    known: Mapping[tuple[float, ...], WidthForm] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: ChannelGroups, probes: Sequence[Mapping[str, int]], block: int) -> "_Sizes":
        """Evaluate the sizes of all axes at the probes, as they are and filled up to whole blocks."""
        shares, known = shares_of(groups, probes), {}
        for form in axis_forms(groups):
            sizes = form.at(shares)
            filled = np.ceil(sizes / block) * block
            unit = form / float(sizes[0])
            for one in (filled, sizes):
                known[_key(one)] = unit
        return cls(known)

    def shape(self, shapes: Sequence[Shape]) -> tuple[WidthForm, ...] | None:
        """Return the form of each size of a tensor whose shape at each probe is given; None if one is unknown."""
        found = []
        for sizes in np.array(shapes, np.float64).reshape(len(shapes), -1).T:
            if (sizes == sizes[0]).all():
                found.append(_ONE * float(sizes[0]))
                continue
            unit = self.known.get(_key(sizes)) if sizes[0] else None
            if unit is None:
                return None
            found.append(unit * float(sizes[0]))
        return tuple(found)


def _key(sizes: Floats) -> tuple[float, ...]:
    return tuple(np.round(normalised(sizes), 9).tolist())
