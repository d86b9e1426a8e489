"""Sizes and costs as polynomials in the shares of units that groups keep."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Union

import numpy as np
import numpy.typing as npt

from torchshear.dependency.algebra._axis import Axis
from torchshear.dependency.algebra._units import Ids
from torchshear.dependency.groups._groups import ChannelGroups

Floats = npt.NDArray[np.float64]

NO_GROUP: Final = -1  # the group of a position that no group cuts; its share is always 1


@dataclass(frozen=True, slots=True, eq=False)
class WidthForm:
    """Polynomial in the shares of units that groups keep.

    Attributes:
        terms: numbers of the groups whose shares are multiplied, ascending, each as often as it is a factor -> the
            coefficient; that of no group is the constant part.
    """

    terms: Mapping[tuple[int, ...], float]

    @classmethod
    def of_terms(cls, of: Ids, counts: Ids) -> "WidthForm":
        """Make the polynomial of an axis.

        Args:
            of: the groups that positions of each term depend on, shape (n_terms, k), `NO_GROUP` for none.
            counts: how many positions there are of each, shape (n_terms,).
        """
        terms: dict[tuple[int, ...], float] = defaultdict(float)
        for groups, count in zip(of.tolist(), counts.tolist(), strict=True):
            terms[tuple(sorted(group for group in groups if group != NO_GROUP))] += count
        return cls(dict(terms))

    def __add__(self, other: Union["WidthForm", float]) -> "WidthForm":
        terms = dict(self.terms)
        for groups, value in _terms_of(other).items():
            terms[groups] = terms.get(groups, 0.0) + value
        return WidthForm(terms)

    __radd__ = __add__

    def __mul__(self, other: Union["WidthForm", float]) -> "WidthForm":
        terms: dict[tuple[int, ...], float] = {}
        for groups, value in self.terms.items():
            for others, factor in _terms_of(other).items():
                both = tuple(sorted(groups + others))
                terms[both] = terms.get(both, 0.0) + value * factor
        return WidthForm(terms)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "WidthForm":
        return self * (1 / divisor)

    def at(self, shares: Floats) -> Floats:
        """Return the values at shares of shape (n_groups, ...)."""
        total = np.zeros(shares.shape[1:])
        for groups, value in self.terms.items():
            total = total + value * shares[list(groups)].prod(0)
        return total

    @property
    def is_constant(self) -> bool:
        """True if no width changes it."""
        return not any(self.terms)


def _terms_of(value: WidthForm | float) -> Mapping[tuple[int, ...], float]:
    return value.terms if isinstance(value, WidthForm) else {(): float(value)}


def groups_of_units(groups: ChannelGroups) -> Ids:
    """Return the number of the group of each unit of the algebra, `NO_GROUP` for none."""
    found = np.full(len(groups.algebra.store), NO_GROUP, np.int64)
    for number, group in enumerate(groups):
        found[group.atoms] = number
    return found


def terms_of_axis(groups: ChannelGroups, group_of: Ids, axis: Axis) -> tuple[Ids, Ids]:
    """Return groups that positions of an axis depend on, shape (n_terms, k), and how many positions there are of each.

    Args:
        groups: the analysed network.
        group_of: what `groups_of_units` gives.
        axis: an axis of it.
    """
    rows = groups.algebra.store.resolve(axis.units)
    if rows.shape[1] == 0:
        return np.zeros((1, 0), np.int64), np.array([axis.size])
    of = np.sort(group_of[rows], 1)
    if rows.shape[1] == 1 and (of == of[0]).all():
        return of[:1], np.array([len(of)])
    terms, counts = np.unique(of, axis=0, return_counts=True)
    return terms, counts


def axis_forms(groups: ChannelGroups) -> list[WidthForm]:
    """Return the sizes of all axes of values and parameters that widths change, each form once."""
    group_of = groups_of_units(groups)
    axes: list[Axis] = []
    for found in (*groups.facts.axes.values(), *groups.facts.state_axes.values()):
        for part in found or ():
            axes += [part] if isinstance(part, Axis) else list(part)
    forms: dict[tuple[tuple[tuple[int, ...], float], ...], WidthForm] = {}
    for axis in {id(axis.units): axis for axis in axes}.values():
        form = WidthForm.of_terms(*terms_of_axis(groups, group_of, axis))
        if not form.is_constant:
            forms.setdefault(tuple(sorted(form.terms.items())), form)
    return list(forms.values())
