"""Leaving groups whole where their cut keeps a model from its native form, if that costs little.

The module whose own code goes wrong on the smaller tensors is known. Of the groups that run through it, with those that
play the same part in other modules of its class, one kind is left whole, the cheapest first. Where that is not enough,
all are, and then as many as can be are cut again, those that cost most first. A kind that it does not do without stays,
and the search ends where those that stay cost too much.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from torchshear.dependency import ChannelGroups, Cut, PruningPlan, dense_cost
from torchshear.errors import TorchshearError
from torchshear.graph import Cost, canonical_module_names, enclosing_modules
from torchshear.speedup.native._form import Native
from torchshear.speedup.shrinking._prepared_plan import Job

LITTLE = 0.1  # share of what the cut saves that the native form may cost
_MOST_TRIED = 8  # native forms that are made in one search
_MOST_TRIED_IF_ASKED = 16  # likewise where the native form is asked for at any price
_MOST_ALONE = 2  # of these, with one kind of group left whole

Kind = tuple[str, str]  # role of some groups, and their names in a module without numbers
Kinds = Mapping[Kind, list[str]]  # with the names of the groups
_Tried = tuple[Job, Native]


@dataclass(frozen=True, slots=True, eq=False)
class Leave:
    """Which groups may stay whole for the sake of the native form.

    Attributes:
        replan: makes the plan anew, with some groups left whole; raises where that cannot be.
        most: share of what the cut saves that this may cost, of the parameters and of the MACs.
    """

    replan: Callable[[Collection[str]], PruningPlan]
    most: float = LITTLE


def leave_whole(job: Job, failed: Native, leave: Leave) -> tuple[Job, Native]:
    """The native form with some groups left whole; what was given where that is not worth it.

    Args:
        job: the cut.
        failed: why it has no native form, and in which module.
        leave: which groups may stay whole.
    """
    search = _Search(job, leave)
    found = search.run(failed)
    if found is None:
        tried = f"; nor is it where groups stay whole, as far as that costs {_share(leave.most)} of what the cut saves"
        return job, replace(failed, form=replace(failed.form, reason=f"{failed.form.reason}{tried}"))
    whole, made, native = found
    count = "1 group" if len(whole) == 1 else f"{len(whole)} groups"
    names = ", ".join(repr(name) for name in whole[:3]) + (", ..." if len(whole) > 3 else "")
    said = (
        f"{count} left whole for that ({names}), which costs {search.price(whole):.1%} of what the cut saves; "
        f'form="traced" cuts everything'
    )
    return made, replace(native, form=replace(native.form, reason=f"{native.form.reason}; {said}"))


def _share(most: float) -> str:
    return "anything short of all" if most >= 1 else f"at most {most:.0%}"


class _Search:
    """State of one search."""

    def __init__(self, job: Job, leave: Leave) -> None:
        self.job = job
        self.leave = leave
        self.groups: ChannelGroups = job.cut.groups
        self.dense, self.cut = dense_cost(self.groups.graph), job.cut.cost()
        self.modules = dict(job.run.named_modules())
        self.shrinking = {of.name for of in job.plan.groups if len(of.kept) < of.width}
        self.left = _MOST_TRIED if leave.most < 1 else _MOST_TRIED_IF_ASKED
        self.failed: set[frozenset[str]] = set()  # names of groups that were not enough

    def run(self, failed: Native) -> tuple[list[str], Job, Native] | None:
        """Groups to leave whole, and the native form that the model has then."""
        kinds, found = self._kinds_in(failed.fails_in), None
        for kind, names in islice(kinds.items(), _MOST_ALONE):
            found = self._try({kind: names})
            if found is not None and found[1].model is not None:
                return self._worthwhile({kind: names}, found)
        if len(kinds) > 1:
            found = self._try(kinds)
        while found is not None and found[1].model is None:
            more = self._kinds_in(found[1].fails_in, known=_names(kinds))
            if not more:
                return None
            kinds = _joined(kinds, more)
            found = self._try(kinds)
        return None if found is None else self._narrowed(kinds, found)

    def _narrowed(self, kinds: Kinds, found: _Tried) -> tuple[list[str], Job, Native] | None:
        """What is left of kinds that are enough where those that it does without are cut again."""
        needed: list[str] = []
        for kind in sorted(kinds, key=lambda kind: -self.price(kinds[kind])):
            fewer = {other: names for other, names in kinds.items() if other != kind}
            again = self._try(fewer)
            if again is not None and again[1].model is not None:
                kinds, found = fewer, again
                continue
            needed += kinds[kind]
            if not self._may_cost(self.price(needed)):
                return None
        return self._worthwhile(kinds, found)

    def _worthwhile(self, kinds: Kinds, found: _Tried) -> tuple[list[str], Job, Native] | None:
        """What was found, if it costs no more than it may."""
        whole = _names(kinds)
        return (whole, *found) if self._may_cost(self.price(whole)) else None

    def _may_cost(self, price: float) -> bool:
        return price <= self.leave.most and price < 1

    def _try(self, kinds: Kinds) -> _Tried | None:
        """The native form with groups left whole, or why there is none; None where no more can or need be tried."""
        whole = frozenset(_names(kinds))
        if not self.left or not whole or whole in self.failed:
            return None
        self.left -= 1
        try:
            job = self.job.with_plan(self.leave.replan(_names(kinds)))
        except TorchshearError:  # nothing would be left to cut, or too little for a target
            return None
        native = job.native()
        if native.model is None:
            self.failed.add(whole)
        return job, native

    def price(self, whole: Collection[str]) -> float:
        """Share of what the cut saves that is lost where groups stay whole: of parameters or MACs, the larger."""
        kept = {name: units for name, units in self.job.plan.kept.items() if name not in whole}
        cost = Cut(self.groups, kept).cost()
        return max(_lost(self.dense, self.cut, cost, of) for of in ("n_params", "macs"))

    def _kinds_in(self, module: str | None, known: Collection[str] = ()) -> Kinds:
        """Groups that shrink in a module and in others of its class and are not known, the cheapest to leave first.

        Of the model itself, whose modules are all inside it, only the calls of its own code count.
        """
        if module is None:
            return {}
        twins = [name for name, other in self.modules.items() if type(other) is type(self.modules[module])]
        first: Mapping[str, str] = canonical_module_names(self.job.run)
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
        prices = {kind: self.price(names) for kind, names in found.items()}
        return {kind: found[kind] for kind in sorted(found, key=prices.__getitem__) if self._may_cost(prices[kind])}


def _joined(kinds: Kinds, more: Kinds) -> Kinds:
    """All groups of both; modules of two classes may have kinds that read the same."""
    return {kind: [*kinds.get(kind, ()), *more.get(kind, ())] for kind in (*kinds, *(more.keys() - kinds.keys()))}


def _names(kinds: Kinds) -> list[str]:
    return [name for names in kinds.values() for name in names]


def _lost(dense: Cost, cut: Cost, other: Cost, of: str) -> float:
    saved = getattr(dense, of) - getattr(cut, of)
    return (getattr(other, of) - getattr(cut, of)) / saved if saved > 0 else 0.0
