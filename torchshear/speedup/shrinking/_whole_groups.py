"""Leaving groups whole if their cut keeps a model from its native form, and if that costs little.

The module whose own code goes wrong on the smaller tensors is known. The groups that run through it form kinds, each
with the groups of the same role and name in other modules of its class. One kind is left whole, the cheapest first. If
that is not enough, all kinds are, and then as many as possible are cut again, those that cost most first. A kind that
the native form cannot do without stays whole, and the search ends when the kinds that stay cost too much.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import TorchshearError
from torchshear.graph import Cost
from torchshear.graph._location import canonical_module_names, enclosing_modules
from torchshear.speedup.native._form import Native
from torchshear.speedup.shrinking._prepared_cut import PreparedCut

MAX_COST = 0.1  # share of what the cut saves that the native form may cost
_MOST_TRIED = 8  # native forms that are made in one search
_MOST_TRIED_AT_ANY_COST = 16  # likewise if the cost does not matter
_MOST_ALONE = 2  # of these, with one kind of group left whole

Kind = tuple[str, str]  # role of some groups, and their name within a module without numbers
Kinds = Mapping[Kind, list[str]]  # kind -> names of its groups
_Tried = tuple[PreparedCut, Native]


@dataclass(frozen=True, slots=True, eq=False)
class NativeTradeoff:
    """Permission to leave groups whole for the sake of the native form.

    Attributes:
        replan: makes the plan again with some groups left whole; raises if that is not possible.
        max_cost: largest share of the saved parameters, and of the saved MACs, that this may cost.
    """

    replan: Callable[[Collection[str]], PruningPlan]
    max_cost: float = MAX_COST


def leave_groups_whole(job: PreparedCut, failed: Native, tradeoff: NativeTradeoff) -> tuple[PreparedCut, Native]:
    """Find a native form with some groups left whole; return the given cut and failure if it costs too much.

    Args:
        job: the cut.
        failed: the reason why it has no native form, and the module in which it fails.
        tradeoff: how much it may cost.
    """
    search = _WholeGroupSearch(job, tradeoff)
    found = search.run(failed)
    if found is None:
        limit = "anything short of all" if tradeoff.max_cost >= 1 else f"at most {tradeoff.max_cost:.0%}"
        tried = f"; nor is it where groups stay whole, as far as that costs {limit} of what the cut saves"
        return job, replace(failed, form=replace(failed.form, reason=f"{failed.form.reason}{tried}"))
    whole, made, native = found
    count = "1 group" if len(whole) == 1 else f"{len(whole)} groups"
    names = ", ".join(repr(name) for name in whole[:3]) + (", ..." if len(whole) > 3 else "")
    said = (
        f"{count} left whole for that ({names}), which costs {search.cost_share(whole):.1%} of what the cut saves; "
        f'form="traced" cuts everything'
    )
    return made, replace(native, form=replace(native.form, reason=f"{native.form.reason}; {said}"))


class _WholeGroupSearch:
    """A search for the cheapest kinds of groups that have to stay whole."""

    def __init__(self, job: PreparedCut, tradeoff: NativeTradeoff) -> None:
        self.job = job
        self.tradeoff = tradeoff
        self.groups: ChannelGroups = job.cut.groups
        self.dense, self.cut = dense_cost(self.groups.graph), job.cut.cost()
        self.modules = dict(job.original.model.named_modules())
        self.shrinking = {of.name for of in job.plan.groups if len(of.kept) < of.width}
        self.left = _MOST_TRIED if tradeoff.max_cost < 1 else _MOST_TRIED_AT_ANY_COST
        self.failed: set[frozenset[str]] = set()  # names of groups that were not enough

    def run(self, failed: Native) -> tuple[list[str], PreparedCut, Native] | None:
        """Return the groups to leave whole, the cut and the native form; None if there is none."""
        kinds, found = self._kinds_in(failed.fails_in), None
        for kind, names in islice(kinds.items(), _MOST_ALONE):
            found = self._try({kind: names})
            if found is not None and found[1].model is not None:
                return self._accept({kind: names}, found)
        if len(kinds) > 1:
            found = self._try(kinds)
        while found is not None and found[1].model is None:
            more = self._kinds_in(found[1].fails_in, known=_group_names(kinds))
            if not more:
                return None
            kinds = _merge_kinds(kinds, more)
            found = self._try(kinds)
        return None if found is None else self._cut_unneeded(kinds, found)

    def _cut_unneeded(self, kinds: Kinds, found: _Tried) -> tuple[list[str], PreparedCut, Native] | None:
        """Cut again those kinds without which there is a native form as well."""
        needed: list[str] = []
        for kind in sorted(kinds, key=lambda kind: -self.cost_share(kinds[kind])):
            fewer = {other: names for other, names in kinds.items() if other != kind}
            again = self._try(fewer)
            if again is not None and again[1].model is not None:
                kinds, found = fewer, again
                continue
            needed += kinds[kind]
            if not self._is_affordable(self.cost_share(needed)):
                return None
        return self._accept(kinds, found)

    def _accept(self, kinds: Kinds, found: _Tried) -> tuple[list[str], PreparedCut, Native] | None:
        """Return a result if it costs no more than it may, else None."""
        whole = _group_names(kinds)
        return (whole, *found) if self._is_affordable(self.cost_share(whole)) else None

    def _is_affordable(self, cost_share: float) -> bool:
        return cost_share <= self.tradeoff.max_cost and cost_share < 1

    def _try(self, kinds: Kinds) -> _Tried | None:
        """Find the native form with kinds of groups left whole, or why there is none; None if no more is tried."""
        whole = frozenset(_group_names(kinds))
        if not self.left or not whole or whole in self.failed:
            return None
        self.left -= 1
        try:
            job = self.job.with_plan(self.tradeoff.replan(_group_names(kinds)))
        except TorchshearError:  # nothing would be left to cut, or too little for a target
            return None
        native = job.find_native()
        if native.model is None:
            self.failed.add(whole)
        return job, native

    def cost_share(self, whole: Collection[str]) -> float:
        """Return the share of the saved parameters, or MACs if it is larger, that is lost if groups stay whole."""
        kept = {name: units for name, units in self.job.plan.kept.items() if name not in whole}
        cost = Cut(self.groups, kept).cost()
        return max(_lost_share(self.dense, self.cut, cost, of) for of in ("n_params", "macs"))

    def _kinds_in(self, module: str | None, known: Collection[str] = ()) -> Kinds:
        """Return the kinds of groups, but the known, that shrink in a module and others of its class, cheapest first.

        Of the model itself, whose modules are all inside it, only the calls of its own code count.
        """
        if module is None:
            return {}
        twins = [name for name, other in self.modules.items() if type(other) is type(self.modules[module])]
        first: Mapping[str, str] = canonical_module_names(self.job.original.model)
        around = {node.name: enclosing_modules(node) or ("",) for node in self.groups.graph}
        numbers: set[int] = set()
        for value in self.groups.describe():
            names = around[value.name] if module else around[value.name][-1:]
            if value.kind == "operator" and any(first.get(name, name) in twins for name in names):
                numbers |= set(value.groups)
        found: dict[Kind, list[str]] = {}
        for group in (self.groups[number] for number in sorted(numbers)):
            if group.name in self.shrinking and group.name not in known:
                inside = next((name for name in twins if name and group.name.startswith(f"{name}.")), "")
                part = re.sub(r"\d+", "", group.name.removeprefix(inside).partition("#")[0])
                found.setdefault((group.role, part), []).append(group.name)
        cost_shares = {kind: self.cost_share(names) for kind, names in found.items()}
        return {
            kind: found[kind]
            for kind in sorted(found, key=cost_shares.__getitem__)
            if self._is_affordable(cost_shares[kind])
        }


def _merge_kinds(kinds: Kinds, more: Kinds) -> Kinds:
    """Merge kinds of groups; modules of two classes may have kinds of the same name."""
    return {kind: [*kinds.get(kind, ()), *more.get(kind, ())] for kind in (*kinds, *(more.keys() - kinds.keys()))}


def _group_names(kinds: Kinds) -> list[str]:
    return [name for names in kinds.values() for name in names]


def _lost_share(dense: Cost, cut: Cost, other: Cost, of: str) -> float:
    saved = getattr(dense, of) - getattr(cut, of)
    return (getattr(other, of) - getattr(cut, of)) / saved if saved > 0 else 0.0
