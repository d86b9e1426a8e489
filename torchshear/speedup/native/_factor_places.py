"""Placing the factors that keep the scale of attention: outputs of modules, for products of queries and keys."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import sqrt

import torch
from torch import fx

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import OutputFactors, OutputSlice
from torchshear.graph._location import enclosing_modules
from torchshear.speedup.native._operand_origins import Pair, Run, Sides, find_origins

_MOST_PLACEMENTS = 3  # that are returned
_MOST_TRIED = 256  # choices of operands that are looked at


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A product of two values, summed over something that shrinks, as that of queries and keys.

    Attributes:
        node: the call.
        operands: its two operands.
        factor: number that makes up for a scale derived from the smaller size.
        is_attention: whether it may need the factor; other products must stay as they are.
        is_implied: whether it does, since the call itself derives its scale.
    """

    node: fx.Node
    operands: Pair
    factor: float
    is_attention: bool
    is_implied: bool


@dataclass(frozen=True, slots=True, eq=False)
class _TracedProduct:
    """The factor of a product, and the outputs that its operands are made of."""

    factor: float
    sides: Sides


class FactorPlacement:
    """Finds outputs of modules whose multiplication gives products of queries and keys their factor.

    Args:
        cut: the units that are removed.
        implied: calls that derive a scale which changes.
        run: runs the rewritten graph, as in `find_origins`.
        dtypes: dtypes to run it in; the first that all operators take is used.
    """

    def __init__(self, cut: Cut, implied: Sequence[fx.Node], run: Run, dtypes: Sequence[torch.dtype]) -> None:
        self._cut = cut
        self._run = run
        self._dtypes = dtypes
        self._implied = frozenset(implied)
        self._known: dict[Pair, Sides] = {}
        self._products: dict[str, list[Product]] = defaultdict(list)
        for node in cut.groups.graph:
            self._products[(enclosing_modules(node) or ("",))[-1]] += _products_of(node, cut, node in implied)

    def for_implied(self) -> list[OutputFactors]:
        """Return placements for all calls that derive their scale; none if one of them cannot get its factor."""
        concerned = {name: some for name, some in self._products.items() if any(p.is_implied for p in some)}
        known = {p.node for some in concerned.values() for p in some if p.is_implied}
        return self._placements(concerned) if known == self._implied else []

    def for_modules(self, names: Sequence[str]) -> list[OutputFactors]:
        """Return placements for the products in some modules, whether or not their code derives its scale.

        Args:
            names: modules of one class.
        """
        inside = {
            module: some
            for module, some in self._products.items()
            if any(p.is_attention and not set(names).isdisjoint(enclosing_modules(p.node) or ("",)) for p in some)
        }
        return self._placements(inside)

    def _placements(self, by_module: Mapping[str, Sequence[Product]]) -> list[OutputFactors]:
        pairs: dict[fx.Node, list[Pair]] = defaultdict(list)
        for found in by_module.values():
            for each in found:
                pairs[each.node].append(each.operands)
        if not pairs:
            return []
        missing = {node: some for node, some in pairs.items() if not self._known.keys() >= set(some)}
        if missing:
            self._known |= self._origins(missing)
        options = [
            list(islice(_module_placements(found, self._known), _MOST_PLACEMENTS)) for found in by_module.values()
        ]
        if not all(options):
            return []
        return [
            _merge_factors([some[min(i, len(some) - 1)] for some in options]) for i in range(max(map(len, options)))
        ]

    def _origins(self, pairs: Mapping[fx.Node, Sequence[Pair]]) -> dict[Pair, Sides]:
        """Return the origins of operands; none if the graph cannot be run with gradients."""
        for dtype in self._dtypes:
            try:
                return find_origins(pairs, self._cut, self._run, dtype)
            except (RuntimeError, TypeError, NotImplementedError):  # an operator refuses the dtype
                continue
        return {pair: (None, None) for some in pairs.values() for pair in some}


def _products_of(node: fx.Node, cut: Cut, is_implied: bool) -> Iterator[Product]:
    for each in cut.groups.facts.contractions.get(node.name, ()):
        changed = [axis for axis in each.contracted if cut.changes(axis)]
        if each.kind == "product" and len(changed) == 1 and node not in each.operands:
            factor = sqrt(int(cut.keep(changed[0]).sum()) / changed[0].size)
            yield Product(node, each.operands, factor, bool(each.batch), is_implied)


def _module_placements(products: Sequence[Product], origins: Mapping[Pair, Sides]) -> Iterator[OutputFactors]:
    """Yield slices to be multiplied, so that each product gets its factor once: those that surely need it, then all."""
    seen: list[OutputFactors] = []
    implied = [p for p in products if p.is_implied]
    attention = [p for p in products if p.is_attention]
    for needing, others in ((implied, products), (attention, [p for p in products if not p.is_attention])):
        must = [_TracedProduct(p.factor, origins[p.operands]) for p in needing]
        rest = [_TracedProduct(p.factor, origins[p.operands]) for p in others if p not in needing]
        for factors in _exact_choices(must, rest):
            if factors and factors not in seen:
                seen.append(factors)
                yield factors


def _exact_choices(
    must: Sequence[_TracedProduct], rest: Sequence[_TracedProduct]
) -> Iterator[dict[OutputSlice, float]]:
    """Yield choices of one operand of each product, preferably the left one, that have no effect on the rest."""
    distinct = {(each.sides, each.factor): each for each in must}.values()
    untouched = [output for each in rest for slices in each.sides for output in slices or ()]
    for choice in islice(product((0, 1), repeat=len(distinct)), _MOST_TRIED):
        chosen: dict[OutputSlice, float] = {}
        for each, side in zip(distinct, choice, strict=True):
            chosen |= dict.fromkeys(each.sides[side] or (), each.factor)
        is_exact = all(_total_factor(each, chosen) == each.factor for each in distinct)
        if is_exact and not any(output.meets(other) for output in untouched for other in chosen):
            yield chosen


def _total_factor(traced: _TracedProduct, chosen: OutputFactors) -> float:
    """Return the factor that a product gets in all; 0 if an operand is multiplied unevenly."""
    total = 1.0
    for slices in traced.sides:
        factors = {chosen.get(output, 1.0) for output in slices or ()}
        is_even = len(factors) <= 1 and not any(
            output.meets(other) and output != other for output in slices or () for other in chosen
        )
        total *= next(iter(factors), 1.0) if is_even else 0.0
    return total


def _merge_factors(each: Sequence[OutputFactors]) -> OutputFactors:
    """Merge the factors of all modules; where two modules share a projection, one stands for both."""
    return {output: factor for factors in each for output, factor in factors.items()}
