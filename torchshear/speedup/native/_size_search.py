"""Search for the sizes that a model keeps in attributes, by the first module that goes wrong with the old ones.

A module is known to go wrong from its output, since every value of the rewritten graph is known. Only its own
attributes, and then those of the modules around it, are tried: those that the model has read, with sizes that values in
the module have after the cut, and the fewest that make it right. They are tried in a call of this module alone, on the
arguments that it got. A combination that helps is then tried in the whole model, and at once for the others of its
class.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from types import MappingProxyType

from torch import nn

from torchshear.dependency.plans._form import Slot
from torchshear.speedup.native._attribute_access import AttributeReads, is_read, record_reads
from torchshear.speedup.native._divergence import Divergence, ModuleCall, find_divergence
from torchshear.speedup.native._reference_run import ReferenceRun
from torchshear.speedup.native._size_attributes import SizeSlot, assign_sizes, find_twin_sizes

_MOST_TRIED = 200  # combinations of sizes of one module that are tried
_MOST_SKIPPED = 4  # values that the graph does not have and that are taken for right


@dataclass(frozen=True, slots=True)
class SizeSearchResult:
    """Result of a search.

    Attributes:
        sizes: slots with the values that make the model right.
        divergence: what is wrong nevertheless; None if nothing is.
        n_passed: number of runs that agree before the one with the divergence.
    """

    sizes: dict[Slot, int]
    divergence: Divergence | None
    n_passed: int = 0

    def is_further_than(self, other: "SizeSearchResult") -> bool:
        """Check that the divergence, if any, comes later than that of another result."""
        if self.divergence is None or other.divergence is None:
            return other.divergence is not None
        return (self.n_passed, self.divergence.progress) > (other.n_passed, other.divergence.progress)


_Fix = tuple[dict[Slot, int], Divergence | None]  # all sizes, and what is wrong with them


class SizeSearch:
    """A search for sizes with which a model gives what the rewritten graph gives.

    Args:
        model: a copy with smaller parameters in the dtype of the runs; left as it was.
        slots: module -> slots that may hold sizes, from `find_size_slots`.
        known: sizes to begin with.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Mapping[str, Sequence[SizeSlot]],
        known: Mapping[Slot, int] = MappingProxyType({}),
    ) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.slots = slots
        self.sizes = dict(known)
        self.skipped: frozenset[str] = frozenset()
        self.of_class: dict[type[nn.Module], list[str]] = defaultdict(list)
        for name, module in self.modules.items():
            self.of_class[type(module)].append(name)

    def run(self, runs: Iterable[ReferenceRun]) -> SizeSearchResult:
        """Fix one divergence after the other, until there is none or one that cannot be fixed.

        Args:
            runs: what the model has to agree with; they compare inside.
        """
        for number, run in enumerate(runs):
            if number and self._find_divergence(replace(run, compares_inside=False), self.sizes) is None:
                continue  # the outputs are right, and comparing inside takes longer
            divergence = self._find_divergence(run, self.sizes)
            first = divergence
            while divergence is not None:
                fixed = self._fix(run, divergence)
                if fixed is not None:
                    self.sizes, divergence = fixed
                    first = divergence
                    continue
                if not divergence.check or divergence.check in self.skipped or len(self.skipped) == _MOST_SKIPPED:
                    return SizeSearchResult(self.sizes, first, number)
                # A value that the graph does not have may be right all the same: go on behind it.
                self.skipped |= {divergence.check}
                divergence = self._find_divergence(run, self.sizes)
        return SizeSearchResult(self.sizes, None)

    def _find_divergence(
        self, run: ReferenceRun, sizes: Mapping[Slot, int], n_trusted: int = 0, inside: ModuleCall | None = None
    ) -> Divergence | None:
        with assign_sizes(self.modules, sizes):
            return find_divergence(self.model, run, self.skipped, n_trusted, inside)

    def _fix(self, run: ReferenceRun, divergence: Divergence) -> _Fix | None:
        """Find sizes of the module that goes wrong, or of one around it, with which the run gets further; or None."""
        with record_reads(self.model) as reads:
            for call in divergence.calls:
                if call.module not in self.slots:
                    continue
                inside: ModuleCall | None = call
                if not divergence.is_same_as(self._find_divergence(run, self.sizes, inside=call)):
                    inside = None  # it changes its arguments, or depends on what ran before
                    self._find_divergence(run, self.sizes)
                fixed = self._fix_module(call.module, run, divergence, reads, inside)
                if fixed is not None:
                    return fixed
        return None

    def _fix_module(
        self, module: str, run: ReferenceRun, divergence: Divergence, reads: AttributeReads, inside: ModuleCall | None
    ) -> _Fix | None:
        """Find sizes of one module with which the run gets further. Attributes that it reads then are tried as well."""
        tried: list[dict[Slot, int]] = [{}]
        readable: list[SizeSlot] = []
        while len(tried) < _MOST_TRIED:
            owner = self.modules[module]
            known, readable = readable, [s for s in self.slots[module] if is_read(owner, s.slot, reads)]
            if len(readable) == len(known):
                return None
            for added in size_combinations(readable):
                if added in tried or self.sizes | added == self.sizes:
                    continue
                tried.append(added)
                # First without comparing again what was right before.
                after = self._find_divergence(run, self.sizes | added, divergence.progress, inside)
                if _is_fixed(divergence, after):
                    fixed = self._fix_class(module, run, divergence, added)
                    if fixed is not None:
                        return fixed
                if len(tried) == _MOST_TRIED:
                    break
        return None

    def _fix_class(self, module: str, run: ReferenceRun, divergence: Divergence, added: dict[Slot, int]) -> _Fix | None:
        """Try sizes of one module in the whole model: with those of all modules of its class, then alone.

        Modules that were passed keep what they have: in models of several stages it may be another size.
        """
        twins = [name for name in self.of_class[type(self.modules[module])] if name not in divergence.passed]
        with_twins = self.sizes | find_twin_sizes(twins, added, self.slots) | added
        alone = self.sizes | added
        for sizes in (with_twins, alone) if with_twins != alone else (alone,):
            after = self._find_divergence(run, sizes)
            if _is_fixed(divergence, after):
                return sizes, after
        return None


def _is_fixed(before: Divergence, after: Divergence | None) -> bool:
    """Check that a run gets further than before, with all values right on its way."""
    return after is None or after.progress > before.progress


def size_combinations(slots: Sequence[SizeSlot]) -> Iterator[dict[Slot, int]]:
    """Yield combinations of new sizes: few slots before many, slots named on the lines of source before others."""
    named = [slot for slot in slots if slot.is_named]
    for pool in (named, slots) if len(named) < len(slots) else (slots,):
        for count in range(1, min(len(pool), 5) + 1):
            for some in combinations(pool, count):
                for values in product(*(slot.values for slot in some)):
                    yield {slot.slot: value for slot, value in zip(some, values, strict=True)}
