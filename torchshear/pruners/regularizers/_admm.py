"""ADMM: weights are pulled towards the nearest ones that lack what is to go."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchshear._arguments import check_count, check_one_of
from torchshear.dependency import Member
from torchshear.errors import ArgumentError
from torchshear.pruners.masks._members import by_position
from torchshear.pruners.regularizers._regularizer import (
    Nearest,
    Penalty,
    Regularized,
    Regularizer,
    Weights,
    check_coefficient,
)
from torchshear.pruners.schedules import Residuals

_NOT_PRESSED = frozenset({"statistic", "factor"})


@dataclass(frozen=True, slots=True)
class ADMM(Regularizer):
    """Squared distance of the weights to the nearest ones that lack what is to go (ADMM).

    rho / 2 * sum over parts of ||W - Z + U||_2^2,    at first Z = W, U = 0; then, every `every` steps or epochs,

        Z <- the nearest of W + U at the final ratio,    U <- U + W - Z

    With a pattern a part is a weight (with the bias that goes with it), and Z has zeros where the units of least sum of
    squares are. For channels a part is a dimension of a parameter in which units of a group lie, with a Z of its own:
    Z has zeros at the units that weigh least in all parts of the group together. So each projection is exact, for one
    group or pattern. A group has the width that the session's request gives it by these sums.

    The schedule takes at the end what is nearly zero by then, as `OneShot(at=...)` or `OneShot(at=..., by="epoch")`.
    `history.residuals` says how nearly: ||W - Z|| over ||W|| (primal), and rho ||Z - Z_before|| (dual).

    Attributes:
        rho: weight of the penalty, above 0.
        every: steps or epochs from one projection to the next.
        by: what `every` counts, "step" (steps of the optimizer) or "epoch".
        growth: what rho is multiplied by at each projection, at least 1; U is divided by it.
        most: the largest rho that it grows to.

    Raises:
        ArgumentError: an attribute is none of those above; when bound: nothing may go.

    Reference: Boyd et al., 2011 (scaled form, 3.1.1); Zhang et al., ECCV 2018, arXiv:1804.03294. As NNI's ADMM pruner
    defines it, but that its penalty is the square root of a norm in 2.x, and its first Z is W itself in 2.0, which
    changes with it.
    """

    rho: float = 1e-3
    every: int = 100
    by: Literal["step", "epoch"] = "step"
    growth: float = 1.0
    most: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        for name in ("rho", "growth", "most"):
            check_coefficient(name, getattr(self, name))
        check_count("every", self.every)
        check_one_of("by", self.by, ("step", "epoch"))
        if not self.rho or self.growth < 1 or self.most < self.rho:
            raise ArgumentError(
                f"rho={self.rho}, growth={self.growth}, most={self.most}; expected 0 < rho <= most and growth >= 1."
            )

    def bind(self, network: Regularized) -> Penalty:
        """Return the penalty on what may go of a network."""
        if network.nearest is None or not (network.groups or network.singles):
            raise ArgumentError("ADMM: nothing of the network may go; ask for more.")
        pairs = [(group, member) for group in network.groups for member in group.members]
        parts: list[_Part] = [
            *(_Lines(group.name, member, group.width) for group, member in pairs if not member.purposes & _NOT_PRESSED),
            *(_Whole(name) for name in network.singles),
        ]
        return _Splitting(self, tuple(parts), network.nearest)


class _Part(ABC):
    """Part of the weights that is held apart as a Z; each of them belongs to one unit.

    Attributes:
        name: canonical name of the parameter.
        key: name of the part among all.
        of: name of what is chosen, a group or the parameter.
    """

    name: str
    key: str
    of: str

    @abstractmethod
    def take(self, weight: Tensor) -> Tensor:
        """Take the part's weights from the parameter."""

    @abstractmethod
    def squares(self, values: Tensor) -> Tensor:
        """Sum of squares of each unit; of single weights each square."""

    @abstractmethod
    def without(self, values: Tensor, kept: Tensor) -> Tensor:
        """The values with zeros where they belong to what is not kept."""


class _Whole(_Part):
    """A parameter of single weights."""

    def __init__(self, name: str) -> None:
        self.name = self.key = self.of = name

    def take(self, weight: Tensor) -> Tensor:
        """All of it."""
        return weight

    def squares(self, values: Tensor) -> Tensor:
        """Each square."""
        return values.square()

    def without(self, values: Tensor, kept: Tensor) -> Tensor:
        """Zeros where the mask is False."""
        return torch.where(kept.to(values.device), values, 0.0)


class _Lines(_Part):
    """Dimension of a parameter in which units of a group lie; a line for each pair of a position and a unit."""

    def __init__(self, group: str, member: Member, width: int) -> None:
        self.name, self.of, self._member, self._width = member.name, group, member, width
        self.key = f"{group}|{member.name}|{member.dim}|{member.n_blocks}"
        self._units = torch.from_numpy(np.array(member.units))
        positions = np.array(member.positions)
        self._positions: Tensor | None = torch.from_numpy(positions)
        if np.array_equal(positions, np.arange(member.size)):
            self._positions = None

    def take(self, weight: Tensor) -> Tensor:
        """Lines, shape (pairs, weights of a position)."""
        lines = by_position(self._member, weight)
        return lines if self._positions is None else lines[self._positions.to(lines.device)]

    def squares(self, values: Tensor) -> Tensor:
        """Sums of squares, shape (width,), in float64 on the CPU."""
        found = values.double().square().sum(1).cpu()
        return torch.zeros(self._width, dtype=torch.float64).index_add_(0, self._units, found)

    def without(self, values: Tensor, kept: Tensor) -> Tensor:
        """Zeros in the lines of units that are not kept."""
        return torch.where(kept[self._units].to(values.device)[:, None], values, 0.0)


class _Splitting(Penalty):
    """The penalty; Z and U by part."""

    def __init__(self, settings: ADMM, parts: tuple[_Part, ...], nearest: Nearest) -> None:
        self._settings, self._parts, self._nearest = settings, parts, nearest
        self._rho, self._n_epochs = settings.rho, 0
        self._z: dict[str, Tensor] = {}
        self._u: dict[str, Tensor] = {}

    def _take(self, weights: Weights) -> dict[str, Tensor]:
        """The weights by part; puts Z = W and U = 0 where there are none yet."""
        read = {name: weights[name] for name in {part.name for part in self._parts} if name in weights}
        found = {part.key: part.take(read[part.name]) for part in self._parts if part.name in read}
        for key, values in found.items():
            if key not in self._z:
                self._z[key] = values.detach().clone()
                self._u[key] = torch.zeros_like(self._z[key])
            elif self._z[key].device != values.device:
                self._z[key], self._u[key] = self._z[key].to(values.device), self._u[key].to(values.device)
        return found

    def value(self, weights: Weights, step: int) -> Tensor:
        """Return rho / 2 * the sum over parts of ||W - Z + U||^2."""
        found = self._take(weights)
        return (
            0.5
            * self._rho
            * torch.stack([(w - (self._z[k] - self._u[k])).square().sum() for k, w in found.items()]).sum()
        )

    @torch.no_grad()
    def update(self, weights: Weights, step: int, at: Literal["step", "epoch"]) -> Residuals | None:
        """Project, and move U, if it is time."""
        if at == "epoch":
            self._n_epochs += 1
        if at != self._settings.by or (step if at == "step" else self._n_epochs) % self._settings.every:
            return None
        found = self._take(weights)
        kept = self._choose(found)
        gaps, moves = {}, 0.0
        for part in self._parts:
            if part.key not in found:
                continue
            values, u = found[part.key].detach(), self._u[part.key]
            projected = part.without(values + u, kept[part.of])
            gap = values - projected
            moves += float((projected - self._z[part.key]).double().square().sum())
            gaps[part.key] = (part.of, float(gap.double().square().sum()), float(values.double().square().sum()))
            self._z[part.key], self._u[part.key] = projected, u + gap
        residuals = _residuals(step, gaps, self._rho * math.sqrt(moves))
        self._grow()
        return residuals

    def _choose(self, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Choose what stays in the nearest weights that lack what is to go."""
        squares: dict[str, Tensor] = {}
        for part in self._parts:
            if part.key in found:
                own = part.squares(found[part.key].detach() + self._u[part.key])
                squares[part.of] = squares[part.of] + own if part.of in squares else own
        return self._nearest(squares)

    def _grow(self) -> None:
        grown = min(self._settings.most, self._rho * self._settings.growth)
        if grown != self._rho:
            self._u = {key: u * (self._rho / grown) for key, u in self._u.items()}
            self._rho = grown

    def state_dict(self) -> dict[str, Any]:
        """Return Z, U, rho and the epochs."""
        z, u = ({key: one.cpu() for key, one in held.items()} for held in (self._z, self._u))
        return {"z": z, "u": u, "rho": self._rho, "n_epochs": self._n_epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._z, self._u = dict(state["z"]), dict(state["u"])
        self._rho, self._n_epochs = float(state["rho"]), int(state["n_epochs"])


def _residuals(step: int, gaps: Mapping[str, tuple[str, float, float]], dual: float) -> Residuals:
    """Residuals over all parts, and over those of each group or parameter."""
    names = dict.fromkeys(of for of, _, _ in gaps.values())
    by_name = {name: _relative([(gap, own) for of, gap, own in gaps.values() if of == name]) for name in names}
    return Residuals(step, _relative([(gap, own) for _, gap, own in gaps.values()]), dual, by_name)


def _relative(squares: list[tuple[float, float]]) -> float:
    gap, own = sum(one for one, _ in squares), sum(one for _, one in squares)
    return math.sqrt(gap / own) if own else 0.0
