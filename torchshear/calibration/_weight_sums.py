"""Running sums for each number of a model's parameters, short ones together, each in pieces that stay in the cache."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from torchshear.calibration._statistics import MOMENTUM, SUMS_OF_WEIGHTS, Sum, WeightSums
from torchshear.calibration._sums import PIECE, nothing, pieces_of, sum_but, wide, wide_dtype

_Lines = Mapping[int, int]


class WeightAccumulators:
    """Sums over batches for each number of parameters, and for their rows or columns; in float32 at least.

    Biases and scales of norms are many and short, so that they are worked on as one vector.

    Args:
        weights: the parameters by name.
        wanted: which sums to take.
        lines: for each parameter, dimensions along which to add up weight times gradient at each position, with their
            numbers of blocks; see `torchshear.dependency.Member`.
        n_processes: how many run a batch each in a step, this one among them.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        wanted: Collection[Sum],
        lines: Mapping[str, _Lines],
        n_processes: int = 1,
    ) -> None:
        parts: dict[tuple[torch.dtype, torch.device], list[dict[str, Tensor]]] = {}
        for name, weight in weights.items():
            shorts, *_ = alike = parts.setdefault((weight.dtype, weight.device), [{}])
            if weight.ndim == 1 and len(weight) <= PIECE:
                shorts[name] = weight
            else:
                alike.append({name: weight})
        words = sorted(SUMS_OF_WEIGHTS & set(wanted))
        self._has_saliency = {"saliency", "gradient"} <= set(words)  # of the sizes of gradients: weights stay the same
        if self._has_saliency:
            words.remove("saliency")
        decay = MOMENTUM**n_processes  # of a step, in which each process adds one batch of a common sequence
        self.has_gradient = False  # whether any number of any gradient was not zero
        self._parts: list[_Part] = []
        for alike in parts.values():
            filled = [part for part in alike if part]
            sizes = [sum(weight.numel() for weight in part.values()) for part in filled]
            sums = {word: _zeros(sum(sizes), next(iter(filled[0].values()))).split_with_sizes(sizes) for word in words}
            for number, part in enumerate(filled):
                self._parts.append(_Part(part, {word: sums[word][number] for word in words}, lines, decay))

    def add(self, gradients: Mapping[str, Tensor | None]) -> tuple[dict[tuple[str, int], Tensor], set[str]]:
        """Count the gradients of a batch in; None where the loss does not depend on a parameter, which is zero.

        Returns:
            For each parameter and dimension that is asked for, the sum of weight times gradient at each position,
            float64 on the CPU; and names of parameters whose gradient is not finite.
        """
        lines: dict[tuple[str, int], Tensor] = {}
        bad: set[str] = set()
        self.has_gradient = self.has_gradient or any(g is not None and bool(g.any()) for g in gradients.values())
        for part in self._parts:
            found, is_finite = part.add([gradients[name] for name in part.names])
            lines |= found
            if not is_finite:
                bad |= {name for name in part.names if not _is_finite(gradients[name])}
        return lines, bad

    def result(self) -> dict[str, WeightSums]:
        """Return the sums, by parameter."""
        each = (part.result(self._has_saliency) for part in self._parts)
        return {name: sums for found in each for name, sums in found.items()}


class _Part:
    """Sums of one parameter, or of several vectors one after another; they are counted in where they are given."""

    def __init__(
        self, weights: Mapping[str, Tensor], sums: Mapping[Sum, Tensor], lines: Mapping[str, _Lines], decay: float
    ) -> None:
        self.names = tuple(weights)
        self._weights = [weight.detach() for weight in weights.values()]
        self._weight = self._weights[0] if len(weights) == 1 else torch.cat(self._weights)
        self._decay = decay
        self._lines = {dim: blocks for name in weights for dim, blocks in lines.get(name, {}).items()}
        self._wanted = {(name, dim) for name in weights for dim in lines.get(name, {})}
        self._sums = {word: total.view(self._weight.shape) for word, total in sums.items()}

    def add(self, gradients: Sequence[Tensor | None]) -> tuple[dict[tuple[str, int], Tensor], bool]:
        """Count gradients in: what they add up to by dimension, and whether all of them are finite."""
        if all(gradient is None for gradient in gradients):
            self._skip()
            return {}, True
        gradient = self._as_one(gradients)
        lines: dict[int, list[Tensor]] = {dim: [] for dim in self._lines}
        is_finite = True
        pieces = [pieces_of(tensor, 0) for tensor in (self._weight, gradient, *self._sums.values())]
        for weight, part, *sums in zip(*pieces, strict=True):
            numbers = wide(part)
            if not lines:
                is_finite &= _is_finite(numbers)
            if not lines and not sums:
                continue
            product = wide(weight) * numbers
            for dim, found in lines.items():
                sums_here = sum_but(product, {0, dim} if self._lines[dim] else {dim})
                found.append(sums_here.to("cpu", torch.float64, copy=True))  # the product is written to below
            self._count_in(dict(zip(self._sums, sums, strict=True)), product, numbers)
        joined = {dim: _join_lines(found, dim, self._lines[dim]) for dim, found in lines.items()}
        if joined:  # what is not finite in a gradient is not in any sum over it either
            is_finite = _is_finite(next(iter(joined.values()))) or _is_finite(gradient)
        return self._by_name(joined), is_finite

    def _as_one(self, gradients: Sequence[Tensor | None]) -> Tensor:
        if len(gradients) == 1 and gradients[0] is not None:
            return gradients[0]
        pairs = zip(gradients, self._weights, strict=True)
        return torch.cat([torch.zeros_like(w) if gradient is None else gradient for gradient, w in pairs])

    def _by_name(self, lines: Mapping[int, Tensor]) -> dict[tuple[str, int], Tensor]:
        if len(self.names) == 1:
            return {(self.names[0], dim): line for dim, line in lines.items()}
        each = zip(self.names, self._split(lines[0]), strict=True) if lines else ()
        return {(name, 0): line for name, line in each if (name, 0) in self._wanted}

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        return vector.split_with_sizes([len(weight) for weight in self._weights])

    def _count_in(self, sums: dict[Sum, Tensor], product: Tensor, gradient: Tensor) -> None:
        if "taylor" in sums:
            sums["taylor"].addcmul_(product, product)
        if "saliency" in sums or "momentum" in sums:
            product.abs_()
        if "saliency" in sums:
            sums["saliency"].add_(product)
        if "momentum" in sums:
            torch.add(product, sums["momentum"], alpha=self._decay, out=sums["momentum"])
        if "gradient" in sums:
            sums["gradient"].add_(gradient.abs())

    def _skip(self) -> None:
        """A batch whose loss does not depend on any of the parameters: their gradients are zero."""
        if "momentum" in self._sums:
            self._sums["momentum"] *= self._decay

    def result(self, has_saliency: bool) -> dict[str, WeightSums]:
        """Return the sums by name; with `has_saliency`, those of |weight x gradient| from those of |gradient|."""
        sums = self._sums
        if has_saliency:
            sums = {**sums, "saliency": wide(self._weight).abs().mul_(sums["gradient"])}
        if len(self.names) == 1:
            return {self.names[0]: _weight_sums(sums)}
        each = {word: self._split(total) for word, total in sums.items()}
        return {
            name: _weight_sums({word: parts[number] for word, parts in each.items()})
            for number, name in enumerate(self.names)
        }


def _zeros(size: int, like: Tensor) -> Tensor:
    """Zeros of the device of a parameter, and wide enough for its sums.

    One large block: many small ones would lie among the gradients, whose memory would then go back to the system after
    each batch and be asked for again.
    """
    return torch.zeros(size, dtype=wide_dtype(like), device=like.device)


def _weight_sums(sums: Mapping[Sum, Tensor]) -> WeightSums:
    return WeightSums(**{word: sums.get(word, nothing().float()) for word in SUMS_OF_WEIGHTS})


def _is_finite(value: Tensor | None) -> bool:
    """Return whether all numbers are finite; their sum tells, unless it grows too large."""
    return value is None or math.isfinite(float(value.sum())) or bool(torch.isfinite(value).all())


def _join_lines(lines: Sequence[Tensor], dim: int, n_blocks: int) -> Tensor:
    """Join sums over pieces of a weight along dimension 0 to one number a position, block after block."""
    if n_blocks:
        rows = torch.cat(list(lines))
        return rows.reshape(n_blocks, -1, rows.shape[1]).sum(1).flatten()
    return torch.cat(list(lines)) if dim == 0 else torch.stack(list(lines)).sum(0)
