"""Finding the sizes that a model keeps in attributes: by where they come from, and by running the model with them.

The first module that goes wrong is known from its output, since every value of the rewritten graph is known. Only its
own attributes, and then those of the modules around it, are tried: those that the model has read, with sizes that
things in the module have after the cut, and the fewest that make it right. They are tried in a call of this module
alone, on what it was given; what helps is then tried in the whole model, and at once for the others of its class.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from types import MappingProxyType

from torch import nn

from torchshear.dependency import Slot
from torchshear.speedup.native._attribute_access import Reads, is_read, recorded
from torchshear.speedup.native._reference_run import Call, Fault, Trial, find_fault
from torchshear.speedup.native._size_attributes import Choice, assigned, shared_by

_MOST_TRIED = 200  # ways to change the attributes of one module that are tried
_MOST_SKIPPED = 4  # values that the graph does not have and that are taken for right


@dataclass(frozen=True, slots=True)
class Repair:
    """What a search found.

    Attributes:
        sizes: slots with the values that make the model right.
        fault: what is wrong nevertheless, or None if nothing is.
        n_right: number of trials before that with the fault.
    """

    sizes: dict[Slot, int]
    fault: Fault | None
    n_right: int = 0

    def is_further_than(self, other: "Repair") -> bool:
        """Whether the fault, if any, comes later than another."""
        if self.fault is None or other.fault is None:
            return other.fault is not None
        return (self.n_right, self.fault.progress) > (other.n_right, other.fault.progress)


def repair(
    model: nn.Module,
    found: Mapping[str, Sequence[Choice]],
    trials: Iterable[Trial],
    known: Mapping[Slot, int] = MappingProxyType({}),
) -> Repair:
    """Find sizes with which a model gives what the rewritten graph gives.

    Args:
        model: a copy with smaller parameters in the dtype of the trials; as it was afterwards.
        found: module -> slots that may hold sizes, from `choices`.
        trials: what the model should give.
        known: sizes to begin with.
    """
    return _Search(model, found, trials, known).run()


_Mended = tuple[dict[Slot, int], Fault | None]  # sizes, and what is wrong with them


class _Search:
    """State of one search."""

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, Sequence[Choice]],
        trials: Iterable[Trial],
        known: Mapping[Slot, int],
    ) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.found = found
        self.trials = trials
        self.sizes = dict(known)
        self.skipped: frozenset[str] = frozenset()
        self.of_class: dict[type[nn.Module], list[str]] = defaultdict(list)
        for name, module in self.modules.items():
            self.of_class[type(module)].append(name)

    def run(self) -> Repair:
        """Mend fault after fault until there is none, or one that cannot be mended."""
        for number, trial in enumerate(self.trials):
            if number and self._fault(trial.varied(is_searched=False), self.sizes) is None:
                continue  # what comes out is right, and a look inside takes longer
            fault = self._fault(trial, self.sizes)
            first = fault
            while fault is not None:
                better = self._mend(trial, fault)
                if better is not None:
                    self.sizes, fault = better
                    first = fault
                    continue
                if not fault.check or fault.check in self.skipped or len(self.skipped) == _MOST_SKIPPED:
                    return Repair(self.sizes, first, number)
                # A value that the graph does not have may be right all the same: go on behind it.
                self.skipped |= {fault.check}
                fault = self._fault(trial, self.sizes)
        return Repair(self.sizes, None)

    def _fault(
        self, trial: Trial, sizes: Mapping[Slot, int], trusted: int = 0, inside: Call | None = None
    ) -> Fault | None:
        with assigned(self.modules, sizes):
            return find_fault(self.model, trial, self.skipped, trusted, inside)

    def _mend(self, trial: Trial, fault: Fault) -> _Mended | None:
        """All sizes with those added that let the run get further, and what is wrong then; or None."""
        with recorded(self.model) as reads:
            for call in fault.calls:
                if call.module not in self.found:
                    continue
                inside: Call | None = call
                if not fault.is_like(self._fault(trial, self.sizes, inside=call)):
                    inside = None  # it changes what it is given, or depends on what ran before
                    self._fault(trial, self.sizes)
                better = self._mend_in(call.module, trial, fault, reads, inside)
                if better is not None:
                    return better
        return None

    def _mend_in(self, module: str, trial: Trial, fault: Fault, reads: Reads, inside: Call | None) -> _Mended | None:
        """Sizes of one module that let the run get further. What a run reads after the first is tried as well."""
        tried: list[dict[Slot, int]] = [{}]
        pool: list[Choice] = []
        while len(tried) < _MOST_TRIED:
            owner = self.modules[module]
            known, pool = pool, [c for c in self.found[module] if is_read(owner, c.slot, reads)]
            if len(pool) == len(known):
                return None
            for more in ways(pool):
                if more in tried or self.sizes | more == self.sizes:
                    continue
                tried.append(more)
                # First without a second look at what was right before.
                if _is_mended(fault, self._fault(trial, self.sizes | more, fault.progress, inside)):
                    better = self._confirmed(module, trial, fault, more)
                    if better is not None:
                        return better
                if len(tried) == _MOST_TRIED:
                    break
        return None

    def _confirmed(self, module: str, trial: Trial, fault: Fault, more: dict[Slot, int]) -> _Mended | None:
        """All sizes with those of a module added, and those of its class if that is well, too, in the whole model.

        Modules that were passed keep what they have: in models of several stages it may be another size.
        """
        twins = [name for name in self.of_class[type(self.modules[module])] if name not in fault.passed]
        siblings = shared_by(twins, more, self.found)
        ways = [self.sizes | siblings | more, self.sizes | more]
        for sizes in ways if ways[0] != ways[1] else ways[:1]:
            after = self._fault(trial, sizes)
            if _is_mended(fault, after):
                return sizes, after
        return None


def _is_mended(before: Fault, after: Fault | None) -> bool:
    """Whether the run gets further now, with all values right on its way."""
    return after is None or after.progress > before.progress


def ways(found: Sequence[Choice]) -> Iterator[dict[Slot, int]]:
    """Ways to set some of the slots: few before many, and those whose names stand on the lines before others."""
    named = [choice for choice in found if choice.is_named]
    for pool in (named, found) if len(named) < len(found) else (found,):
        for count in range(1, min(len(pool), 5) + 1):
            for some in combinations(pool, count):
                for values in product(*(choice.values for choice in some)):
                    yield {choice.slot: value for choice, value in zip(some, values, strict=True)}
