"""Integers that a model's forward does not read, and that other methods do, as those for export or for a new head.

Which size such an integer is no run of the forward can tell. It follows where its origin is certain nevertheless: where
another forward of the module, as `forward_split` of ultralytics, gives what the forward gives with the new number and
not with the old one; or where it is the size of something that shrinks in every module of its class, with a number of
its own in at least two.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.dependency import Cut, Sizes, Slot
from torchshear.graph import ExampleInputs, copy_model, output_leaves, run_failure
from torchshear.speedup.comparing._relative_error import relative_error, tolerance
from torchshear.speedup.native._attribute_access import is_read, recorded
from torchshear.speedup.native._builder import is_torch_module
from torchshear.speedup.native._size_attributes import Choice, assigned, choices, value_of
from torchshear.speedup.native._size_search import ways

_Given = tuple[tuple[Any, ...], dict[str, Any]]


def unread_sizes(model: nn.Module, native: nn.Module, cut: Cut, known: Sizes, inputs: ExampleInputs) -> dict[Slot, int]:
    """Find integers that no forward reads and that shrink with what they are the size of.

    Args:
        model: the original.
        native: its native form, which is right; as it was afterwards.
        cut: the units that go.
        known: integers that were changed already.
        inputs: the example.

    Returns:
        Slots with their new values.
    """
    modules = dict(native.named_modules())
    found = {
        name: [choice for choice in some if choice.slot not in known]
        for name, some in choices(model, cut.groups.graph, cut).items()
        if not is_torch_module(modules[name])
    }
    if not any(found.values()):
        return {}
    with recorded(native) as reads, torch.random.fork_rng(devices=[]):
        run_failure(native, inputs, "eval")
        run_failure(native, inputs, "train")
        left = {
            name: [choice for choice in some if not is_read(modules[name], choice.slot, reads)]
            for name, some in found.items()
        }
    left = {name: some for name, some in left.items() if some}
    sizes = _by_other_forwards(model, native, left, inputs)
    return sizes | _by_class(model, found, {slot for name in left for slot in _slots(left[name])} - sizes.keys())


def _slots(some: Sequence[Choice]) -> list[Slot]:
    return [choice.slot for choice in some]


def _by_class(model: nn.Module, found: Mapping[str, Sequence[Choice]], unread: Collection[Slot]) -> dict[Slot, int]:
    """Integers that are a size which shrinks, in one way, in all modules of a class, not always the same number."""
    of_class: dict[type[nn.Module], dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        of_class[type(module)][name] = module
    one_way = {choice.slot: choice.values[0] for some in found.values() for choice in some if len(choice.values) == 1}
    sizes: dict[Slot, int] = {}
    for slot in unread:
        twins = of_class[type(model.get_submodule(slot.module))]
        same = [Slot(name, slot.attribute, slot.item) for name in twins]
        if all(other in one_way for other in same) and len({value_of(twins[s.module], s) for s in same}) > 1:
            sizes[slot] = one_way[slot]
    return sizes


def _by_other_forwards(
    model: nn.Module, native: nn.Module, left: Mapping[str, Sequence[Choice]], inputs: ExampleInputs
) -> dict[Slot, int]:
    """Integers with which another forward of a module gives what its forward gives, as in the original."""
    others = {name: _other_forwards(native.get_submodule(name)) for name in left}
    names = [name for name, some in others.items() if some]
    if not names:
        return {}
    before, after = _calls(model, names, inputs), _calls(native, names, inputs)
    sizes: dict[Slot, int] = {}
    for name in before.keys() & after.keys():
        original, small = (copy_model(whole.get_submodule(name)) for whole in (model, native))
        for method in others[name]:
            if not _gives_the_same(original, method, before[name]) or _gives_the_same(small, method, after[name]):
                continue
            for some in ways(left[name]):
                with assigned({name: small}, some):
                    is_right = _gives_the_same(small, method, after[name])
                if is_right:
                    sizes |= some
                    break
    return sizes


def _other_forwards(module: nn.Module) -> list[str]:
    """Names of methods beside `forward` that say by their name that they are one."""
    return [name for name in dir(type(module)) if name.startswith("forward_") and callable(getattr(module, name, None))]


def _calls(model: nn.Module, names: Collection[str], inputs: ExampleInputs) -> dict[str, _Given]:
    """What some modules are given in the last of their calls in a run."""
    seen: dict[str, _Given] = {}
    handles = []
    for name in names:

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            seen[name] = copy.deepcopy((args, kwargs))

        handles.append(model.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True))
    try:
        run_failure(model, inputs, "eval")
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _gives_the_same(module: nn.Module, method: str, given: _Given) -> bool:
    """Whether a method gives what the forward of a module gives; not if it does not run."""
    for each in module.modules():
        each.training = False
    try:
        with torch.no_grad():
            expected, found = (_outputs(run, given) for run in (module.forward, getattr(module, method)))
            return relative_error(expected, found) <= tolerance(expected)
    except Exception:  # it may be for other arguments, or raise anything on sizes that it does not expect
        return False


def _outputs(run: Callable[..., Any], given: _Given) -> list[Tensor]:
    args, kwargs = copy.deepcopy(given)
    return [leaf for leaf in output_leaves(run(*args, **kwargs)) if isinstance(leaf, Tensor)]
