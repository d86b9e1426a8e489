"""Attributes of a model's modules that may hold a size which the cut changes."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

from torch import Tensor, fx, nn

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import Form, Sizes, Slot
from torchshear.errors import PlanError
from torchshear.graph import Graph
from torchshear.graph._location import canonical_module_names, enclosing_modules
from torchshear.speedup.rewriting._rewrite import changed_integers

_NO_RECORDS = (nn.Module, Tensor, ModuleType, Enum)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class SizeSlot:
    """A slot that may hold a size.

    Attributes:
        slot: the slot.
        values: values that it may have after the cut.
        is_named: whether its name stands on a line of source that made the size.
    """

    slot: Slot
    values: tuple[int, ...]
    is_named: bool


def assign_size(module: nn.Module, slot: Slot, value: int) -> None:
    """Set the value of a slot. A list or object that holds it, which other modules may share, is replaced by a copy."""
    if slot.item is None:
        setattr(module, slot.attribute, value)
        return
    holder = copy.copy(getattr(module, slot.attribute))
    if isinstance(slot.item, str):
        setattr(holder, slot.item, value)
    else:
        items = list(holder)
        items[slot.item] = value
        holder = type(holder)(items)
    setattr(module, slot.attribute, holder)


def value_of(module: nn.Module, slot: Slot) -> int:
    """Return the value of a slot."""
    return next(value for known, value in _integers(slot.module, module) if known == slot)


def check_slots(model: nn.Module, form: Form) -> None:
    """See that a model has all attributes and modules that a recorded form changes, since a file may name anything.

    Raises:
        PlanError: a module is not there, or an attribute that holds an integer.
    """
    modules = dict(model.named_modules())
    for name in (*(slot.module for slot in form.sizes), *(part.module for part in form.factors)):
        if name not in modules:
            raise PlanError(f"the form that the plan records changes module {name!r}, which the model has not.")
    known = {slot for name in {slot.module for slot in form.sizes} for slot, _ in _integers(name, modules[name])}
    for slot in form.sizes:
        if slot not in known:
            raise PlanError(
                f"the form that the plan records changes {str(slot)!r}, which holds no integer in the model. Expected "
                f"the same class, configuration and library versions as when the plan was made."
            )


@contextmanager
def assign_sizes(modules: Mapping[str, nn.Module], sizes: Sizes) -> Iterator[None]:
    """Assign sizes for a while."""
    before = [(modules[slot.module], slot.attribute, getattr(modules[slot.module], slot.attribute)) for slot in sizes]
    try:
        for slot, value in sizes.items():
            assign_size(modules[slot.module], slot, value)
        yield
    finally:
        for module, attribute, value in reversed(before):
            setattr(module, attribute, value)


def find_size_slots(model: nn.Module, graph: Graph, cut: Cut) -> dict[str, list[SizeSlot]]:
    """Return for each module the slots that may hold a size which the cut changes, the likelier ones first.

    Their number is a size, before the cut, of a value that a call of the module, or of a module inside it, reads or
    gives.

    Args:
        model: the original.
        graph: the captured model.
        cut: the units that are removed.
    """
    # By module: sizes that change, before -> after, and names on the lines of source that made its calls.
    sizes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    words: dict[str, set[str]] = defaultdict(set)
    changed: dict[fx.Node, set[tuple[int, int]]] = defaultdict(set)
    for change in changed_integers(graph.fx_graph, cut.groups.facts, cut):
        changed[change.node].add((change.old, change.new))
    first = canonical_module_names(model)
    for node in graph:
        if node.op == "call_function":
            here = _sizes_at(node, graph, cut) | changed[node]
            named = set(_WORD.findall(node.meta.get("stack_trace") or ""))
            for module_name in dict.fromkeys(first.get(name, name) for name in enclosing_modules(node)):
                words[module_name] |= named
                for old, new in here:
                    sizes[module_name][old].add(new)
    # Integers of each module that are such a size before the cut.
    found: dict[str, list[SizeSlot]] = {}
    for name, module in model.named_modules():
        changes = sizes.get(name, {})
        likely = [
            SizeSlot(slot, tuple(sorted(changes[value])), slot.name in words[name])
            for slot, value in _integers(name, module)
            if value in changes
        ]
        if likely:
            found[name] = sorted(likely, key=lambda c: (not c.is_named, isinstance(c.slot.item, str)))
    return found


def _sizes_at(node: fx.Node, graph: Graph, cut: Cut) -> set[tuple[int, int]]:
    """Return sizes of a call's operands and results, before and after the cut.

    Of an axis that is merged with the batch the share of one sample is a size, too.
    """
    found: set[tuple[int, int]] = set()
    for value in (node, *node.all_input_nodes):
        axes = cut.groups.facts.axes.get(value.name)
        for item, part in enumerate(axes) if isinstance(axes, list) else [(None, axes or ())]:
            for dim, axis in enumerate(part):
                if cut.changes(axis):
                    old, new = axis.size, int(cut.keep(axis).sum())
                    follows = graph.batch_formula(value, dim if item is None else (item, dim))
                    found.add((old, new))
                    if follows is not None and not follows.plus and new % (old // follows.times) == 0:
                        found.add((follows.times, new * follows.times // old))
    return found


def _integers(name: str, module: nn.Module) -> Iterator[tuple[Slot, int]]:
    """Yield all integers of a module with their slots."""
    for attribute, value in vars(module).items():
        if attribute in _OF_EVERY_MODULE:
            continue
        if _is_integer(value):
            yield Slot(name, attribute), value
        elif isinstance(value, tuple | list):
            yield from ((Slot(name, attribute, i), item) for i, item in enumerate(value) if _is_integer(item))
        elif is_record(value):
            yield from ((Slot(name, attribute, key), item) for key, item in vars(value).items() if _is_integer(item))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_record(value: Any) -> bool:
    """Check that a value is an object of settings, such as a configuration: no module, tensor, class or enum."""
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, _NO_RECORDS)


def explain_sizes(sizes: Sizes) -> str:
    """List the attributes that were changed, those of one name together."""
    counts: dict[str, int] = defaultdict(int)
    for slot in sizes:
        counts[slot.name] += 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def find_twin_sizes(modules: Sequence[str], sizes: Sizes, found: Mapping[str, Sequence[SizeSlot]]) -> dict[Slot, int]:
    """Return the sizes that other modules of a class would have, by those of one.

    Args:
        modules: names of the others.
        sizes: slots of the one module with their new values.
        found: all slots that may hold sizes.
    """
    result: dict[Slot, int] = {}
    for name in modules:
        own = {(one.slot.attribute, one.slot.item): one for one in found.get(name, ())}
        for slot, value in sizes.items():
            twin = own.get((slot.attribute, slot.item))
            if twin is not None and (value in twin.values or len(twin.values) == 1):
                result[twin.slot] = value if value in twin.values else twin.values[0]
    return result
