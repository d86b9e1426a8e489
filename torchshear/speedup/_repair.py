"""Finding the sizes that a model keeps in attributes: by where they come from, and by running the model with them.

The first module that goes wrong is known from its output, since every value of the rewritten graph is known. Only its
own attributes, and then those of the modules around it, are tried: those that the model has read, with sizes that
things in the module have after the cut, and the fewest that make it right. What is found for one module is tried at
once for the others of its class.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from types import MappingProxyType

from torch import nn

from torchshear.dependency import Slot
from torchshear.speedup._judge import Fault, Trial, find_fault
from torchshear.speedup._reads import Reads, is_read, recorded
from torchshear.speedup._sizes import Choice, assigned, shared_by

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
    n_right: int

    def is_further_than(self, other: "Repair") -> bool:
        """Whether the fault, if any, comes later than another."""
        if self.fault is None or other.fault is None:
            return other.fault is not None
        return (self.n_right, self.fault.progress) > (other.n_right, other.fault.progress)


def repair(
    model: nn.Module,
    found: Mapping[str, Sequence[Choice]],
    trials: Sequence[Trial],
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


class _Search:
    """State of one search."""

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, Sequence[Choice]],
        trials: Sequence[Trial],
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
            fault = self._fault(trial, self.sizes)
            first = fault
            while fault is not None:
                better = self._mend(trial, fault)
                if better is not None:
                    self.sizes = better
                elif not fault.check or fault.check in self.skipped or len(self.skipped) == _MOST_SKIPPED:
                    return Repair(self.sizes, first, number)
                else:  # a value that the graph does not have may be right all the same: go on behind it
                    self.skipped |= {fault.check}
                fault = self._fault(trial, self.sizes)
                first = fault if better is not None else first
        return Repair(self.sizes, None, len(self.trials))

    def _fault(self, trial: Trial, sizes: Mapping[Slot, int], trusted: int = 0) -> Fault | None:
        with assigned(self.modules, sizes):
            return find_fault(self.model, trial, self.skipped, trusted)

    def _mends(self, trial: Trial, fault: Fault, sizes: Mapping[Slot, int]) -> bool:
        """Whether the run gets further with these sizes: first without a second look at what was right before."""
        return all(_is_mended(fault, self._fault(trial, sizes, trusted)) for trusted in (fault.progress, 0))

    def _mend(self, trial: Trial, fault: Fault) -> dict[Slot, int] | None:
        """All sizes with those added that let the run get further, or None."""
        with recorded(self.model) as reads:
            self._fault(trial, self.sizes)
            for module in fault.modules:
                more = self._mend_in(module, trial, fault, reads)
                if more is not None:
                    siblings = shared_by(self.of_class[type(self.modules[module])], more, self.found)
                    both = self.sizes | siblings | more
                    is_well = _is_mended(fault, self._fault(trial, both))
                    return both if is_well else self.sizes | more
        return None

    def _mend_in(self, module: str, trial: Trial, fault: Fault, reads: Reads) -> dict[Slot, int] | None:
        """Sizes of one module that let the run get further. What a run reads after the first is tried as well."""
        tried: list[dict[Slot, int]] = [{}]
        pool: list[Choice] = []
        while len(tried) < _MOST_TRIED:
            owner = self.modules[module]
            known, pool = pool, [c for c in self.found.get(module, ()) if is_read(owner, c.slot, reads)]
            if len(pool) == len(known):
                return None
            for more in _ways(pool):
                if more in tried or self.sizes | more == self.sizes:
                    continue
                tried.append(more)
                if self._mends(trial, fault, self.sizes | more):
                    return more
                if len(tried) == _MOST_TRIED:
                    break
        return None


def _is_mended(before: Fault, after: Fault | None) -> bool:
    """Whether the run gets further now, with all values right on its way."""
    return after is None or after.progress > before.progress


def _ways(found: Sequence[Choice]) -> Iterator[dict[Slot, int]]:
    """Ways to set some of the slots: few before many, and those whose names stand on the lines before others."""
    named = [choice for choice in found if choice.is_named]
    for pool in (named, found) if len(named) < len(found) else (found,):
        for count in range(1, min(len(pool), 5) + 1):
            for some in combinations(pool, count):
                for values in product(*(choice.values for choice in some)):
                    yield {choice.slot: value for choice, value in zip(some, values, strict=True)}
