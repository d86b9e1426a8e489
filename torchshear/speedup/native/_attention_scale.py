"""Keeping the scale of attention in a model whose own code derives it from a size that shrank.

Such code divides scores by the square root of the smaller head dimension, where the original divides by that of the
larger one. Scores are linear in queries and in keys, so a factor on either makes up for it: a hook on the output of a
module. Its place is found by the products of queries and keys in the graph.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice, product
from math import sqrt
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import OutputFactors, OutputSlice
from torchshear.graph._location import enclosing_modules
from torchshear.speedup.native._operand_origins import Pair, Run, Sides, find_origins

_MOST_PLACEMENTS = 3  # that are returned
_MOST_TRIED = 256  # choices of operands that are looked at


class OutputFactor:
    """A forward hook that multiplies the output of a module, or some positions of it, by a number.

    `shrink` registers it on the projection (or the norm) that queries or keys come from, where the code of attention
    derives its scale from a size that shrank. It is copied, pickled, exported and compiled with the module, follows it
    to any device and dtype, and adds no entry to its `state_dict`.

    Attributes:
        factor: the number.
        share: name of a buffer of the module, not saved in its `state_dict`, that is 1 where the output is multiplied
            and 0 elsewhere; None if all of the output is.
    """

    def __init__(self, factor: float, share: str | None = None) -> None:
        """Make a hook; `multiply_output` registers it.

        Args:
            factor: the number.
            share: name of the buffer that says where, if not everywhere.
        """
        self.factor = factor
        self.share = share
        self._key = -1

    def register(self, module: nn.Module) -> RemovableHandle:
        """Register the hook on a module."""
        handle = module.register_forward_hook(self)
        self._key = handle.id
        return handle

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Multiply an output."""
        if self.share is None:
            return output * self.factor
        share: Tensor = getattr(module, self.share)
        if share.dtype != output.dtype:  # under autocast
            share = share.to(output.dtype)
        return output * (1 + share * (self.factor - 1))

    def __repr__(self) -> str:
        """Show factor and share."""
        where = "" if self.share is None else f", share={self.share!r}"
        return f"{type(self).__name__}({self.factor!r}{where})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle it, and reserve its key against later hooks of this process, as torch does for handles."""
        vars(self).update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, self._key + 1)


def multiply_output(model: nn.Module, output: OutputSlice, factor: float) -> Callable[[], None]:
    """Multiply a slice of the output of a module; a hook that does so already gets the product of both factors.

    Args:
        model: the model that has the module.
        output: the slice: the module, and the positions of its output.
        factor: the number.

    Returns:
        A function that undoes it.
    """
    module = model.get_submodule(output.module)
    numbers = (p for owner in (module, model) for p in owner.parameters() if p.is_floating_point())
    like = next(numbers, torch.empty(0))
    mask = _mask(output, like)
    for hook in module._forward_hooks.values():
        if isinstance(hook, OutputFactor) and _is_same(
            None if hook.share is None else getattr(module, hook.share), mask
        ):
            return _multiply_factor(hook, factor)
    if mask is None:
        return OutputFactor(factor).register(module).remove
    names = chain(["output_factor"], (f"output_factor_{number}" for number in count(1)))
    name = next(name for name in names if not hasattr(module, name))
    module.register_buffer(name, mask, persistent=False)
    handle = OutputFactor(factor, name).register(module)

    def undo() -> None:
        handle.remove()
        delattr(module, name)

    return undo


def _mask(output: OutputSlice, like: Tensor) -> Tensor | None:
    """Return 1 at the positions and 0 elsewhere, of a shape that broadcasts; None for the whole output.

    It has values also in a model on the meta device: no checkpoint would bring them.
    """
    if output.positions is None:
        return None
    mask = torch.zeros(output.size, dtype=like.dtype, device="cpu" if like.is_meta else like.device)
    mask[list(output.positions)] = 1
    return mask.reshape(output.size, *[1] * (-output.dim - 1))


def _multiply_factor(hook: OutputFactor, factor: float) -> Callable[[], None]:
    before = hook.factor
    hook.factor = before * factor

    def undo() -> None:
        hook.factor = before

    return undo


def _is_same(known: Tensor | None, mask: Tensor | None) -> bool:
    if known is None or mask is None:
        return known is mask
    return torch.equal(known, mask)


@contextmanager
def multiply_outputs(model: nn.Module, factors: OutputFactors) -> Iterator[None]:
    """Multiply slices of the outputs of a model's modules for a while."""
    with ExitStack() as stack:
        for output, factor in factors.items():
            stack.callback(multiply_output(model, output, factor))
        yield


def describe_factors(factors: OutputFactors) -> str:
    """List the outputs that are multiplied, those of one name together."""
    counts: dict[str, int] = {}
    for module in dict.fromkeys(output.module for output in factors):
        words = [word for word in module.split(".") if not word.isdigit()]
        name = ".".join(words[-2:])
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def share_names(model: nn.Module) -> set[str]:
    """Return the qualified names of the buffers that say where outputs are multiplied: they must stay 0 and 1."""
    return {
        f"{name}.{hook.share}".lstrip(".")
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, OutputFactor) and hook.share is not None
    }


@dataclass(frozen=True, slots=True, eq=False)
class AttentionProduct:
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
        self._products: dict[str, list[AttentionProduct]] = defaultdict(list)
        for node in cut.groups.graph:
            module = (enclosing_modules(node) or ("",))[-1]
            for each in cut.groups.facts.contractions.get(node.name, ()):
                changed = [axis for axis in each.contracted if cut.changes(axis)]
                if each.kind == "product" and len(changed) == 1 and node not in each.operands:
                    factor = sqrt(int(cut.keep(changed[0]).sum()) / changed[0].size)
                    found = AttentionProduct(node, each.operands, factor, bool(each.batch), node in implied)
                    self._products[module].append(found)

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

    def _placements(self, by_module: Mapping[str, Sequence[AttentionProduct]]) -> list[OutputFactors]:
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


def _module_placements(products: Sequence[AttentionProduct], origins: Mapping[Pair, Sides]) -> Iterator[OutputFactors]:
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
