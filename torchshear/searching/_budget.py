"""Budgets of a search: what may be left in channels, parameters, bytes, operations or latency, at any widths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.plans._cut import dense_cost
from torchshear.graph import Cost
from torchshear.latency_target._budgets import budget_of
from torchshear.pruners.allocation._problem import CostBudget, CostTerm, Levels
from torchshear.speedup.latency import LatencyTable
from torchshear.speedup.latency._table import share_at

Indices = npt.NDArray[np.int64]
Resource = Literal["channels", "macs", "params", "size", "latency"]
_ATTRIBUTES: Final[Mapping[Resource, str]] = {"macs": "macs", "params": "n_params", "size": "size_bytes"}
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class ResourceLimit:
    """Upper bound on one resource.

    Attributes:
        resource: what is bounded.
        share: what may be left, as a share of the dense model's, in (0, 1).
    """

    resource: Resource
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class SearchBudget:
    """All bounds that a result keeps.

    Attributes:
        groups: the analysed network.
        free: numbers of the groups whose widths are searched; "channels" are those of these groups.
        limits: the bounds, at least one.
        table: measured times, for a bound on latency.
        dense: cost of the dense model.
    """

    groups: ChannelGroups
    free: Indices
    limits: tuple[ResourceLimit, ...]
    table: LatencyTable | None
    dense: Cost
    _costs: WidthCost
    _loads: dict[tuple[int, ...], float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, groups: ChannelGroups, free: Indices, limits: Sequence[ResourceLimit], table: LatencyTable | None = None
    ) -> "SearchBudget":
        """Bound the widths of some groups."""
        return cls(groups, free, tuple(limits), table, dense_cost(groups.graph), WidthCost(groups))

    def shares(self, widths: Sequence[int]) -> dict[Resource, float]:
        """Return what is left of each bounded resource, as shares of the dense model's.

        Args:
            widths: width of each searched group.
        """
        every = np.array([group.width for group in self.groups], np.int64)
        dense, every[self.free] = every.copy(), np.asarray(widths, np.int64)
        found: dict[Resource, float] = {}
        needs_cost = any(limit.resource in _ATTRIBUTES for limit in self.limits)
        whole, left = self.dense, self._costs(every) if needs_cost else self.dense
        for limit in self.limits:
            if limit.resource == "channels":
                found["channels"] = float(every[self.free].sum() / dense[self.free].sum())
            elif limit.resource == "latency":
                assert self.table is not None
                named = {group.name: int(width) for group, width in zip(self.groups, every, strict=True)}
                found["latency"] = self.table.predict_ms(named) / self.table.dense_ms
            else:
                name = _ATTRIBUTES[limit.resource]
                found[limit.resource] = getattr(left, name) / max(getattr(whole, name), 1)
        return found

    def load(self, widths: Sequence[int]) -> float:
        """Return by what factor the tightest bound is used: at most 1 within the budget, above 1 beyond it."""
        key = tuple(widths)
        if key not in self._loads:
            found = self.shares(key)
            self._loads[key] = max(found[limit.resource] / limit.share for limit in self.limits)
        return self._loads[key]

    def holds(self, widths: Sequence[int]) -> bool:
        """Return True if every bound holds."""
        return self.load(widths) <= 1 + _ROUNDING

    def cost_budgets(self, levels: Sequence[Levels]) -> list[CostBudget]:
        """Write the bounds for the exact solver over some levels of the searched groups."""
        forms, found = self._costs.forms(), list[CostBudget]()
        for limit in self.limits:
            if limit.resource == "channels":
                whole = float(sum(self.groups[number].width for number in self.free))
                terms = tuple(CostTerm((one.name,), np.array(one.widths, np.float64)) for one in levels)
                missing = whole - sum(max(one.widths) for one in levels)
                found.append(CostBudget("channels", limit.share * whole, terms, missing))
            elif limit.resource == "latency":
                table = self.table
                assert table is not None
                form, most = table.form, limit.share * table.dense_ms

                def at(number: int, width: int, table: LatencyTable = table) -> float:
                    return share_at(table, table.groups[number], width)

                found.append(budget_of("latency_ms", most, form, self.groups, levels, at))
            else:
                name = _ATTRIBUTES[limit.resource]
                most = limit.share * getattr(self.dense, name)
                found.append(budget_of(limit.resource, most, forms[name], self.groups, levels, self._kept))
        return found

    def _kept(self, number: int, width: int) -> float:
        return float(width / self.groups[number].width)
