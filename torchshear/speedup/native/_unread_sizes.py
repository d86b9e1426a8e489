"""Integers that no run of a model's forward tells: read by other methods, or numbers of a saved config.

Other methods are those for export or for a new head. Such an integer is changed if its origin is certain: if another
forward of the module, as `forward_split` of ultralytics, agrees with the forward with the new number and not with the
old one; or if it is the size of something that shrinks in every module of its class, with different numbers in at least
two.

If a model of the same class with other numbers in its config, as `save_pretrained` writes it and `from_pretrained`
reads it, has the widths of the pruned model, these numbers are found. They are proved by that model: it has the same
shapes, and computes the same with the same tensors.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.dependency.plans._form import Sizes, Slot
from torchshear.graph import ExampleInputs, parameters_on_meta
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import run_failure, run_model
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._state import in_mode
from torchshear.speedup._relative_error import relative_error, tolerance
from torchshear.speedup.native._attribute_access import is_read, record_reads
from torchshear.speedup.native._builder import is_torch_module
from torchshear.speedup.native._size_attributes import SizeSlot, assign_size, assign_sizes, value_of
from torchshear.speedup.native._size_search import size_combinations

_CONFIG = "config"
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def unread_sizes(
    model: nn.Module,
    native: nn.Module,
    slots: Mapping[str, Sequence[SizeSlot]],
    known: Sizes,
    inputs: ExampleInputs,
) -> dict[Slot, int]:
    """Find integers that no forward reads, and that are the size of something that shrinks.

    Args:
        model: the original.
        native: its native form, which is right; left as it was.
        slots: module -> slots that may hold sizes, from `find_size_slots`.
        known: integers that were changed already.
        inputs: the example.

    Returns:
        Slots with their new values.
    """
    modules = dict(native.named_modules())
    found = {
        name: [one for one in some if one.slot not in known]
        for name, some in slots.items()
        if not is_torch_module(modules[name])
    }
    if not any(found.values()):
        return {}
    with record_reads(native) as reads, torch.random.fork_rng(devices=[]):
        run_failure(native, inputs, "eval")
        run_failure(native, inputs, "train")
        left = {
            name: [one for one in some if not is_read(modules[name], one.slot, reads)] for name, some in found.items()
        }
    left = {name: some for name, some in left.items() if some}
    sizes = _sizes_by_other_forwards(model, native, left, inputs)
    return sizes | _sizes_by_class(model, found, {one.slot for some in left.values() for one in some} - sizes.keys())


def _sizes_by_class(
    model: nn.Module, found: Mapping[str, Sequence[SizeSlot]], unread: Collection[Slot]
) -> dict[Slot, int]:
    """Return sizes that shrink, in one way, in all modules of a class, and are not the same number in all of them."""
    of_class: dict[type[nn.Module], dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        of_class[type(module)][name] = module
    one_way = {one.slot: one.values[0] for some in found.values() for one in some if len(one.values) == 1}
    sizes: dict[Slot, int] = {}
    for slot in unread:
        twins = of_class[type(model.get_submodule(slot.module))]
        same = [Slot(name, slot.attribute, slot.item) for name in twins]
        if all(other in one_way for other in same) and len({value_of(twins[s.module], s) for s in same}) > 1:
            sizes[slot] = one_way[slot]
    return sizes


def _sizes_by_other_forwards(
    model: nn.Module, native: nn.Module, left: Mapping[str, Sequence[SizeSlot]], inputs: ExampleInputs
) -> dict[Slot, int]:
    """Return sizes with which another forward of a module agrees with its forward, as it does in the original."""
    others = {name: _other_forwards(native.get_submodule(name)) for name in left}
    names = [name for name, some in others.items() if some]
    if not names:
        return {}
    before, after = _last_arguments(model, names, inputs), _last_arguments(native, names, inputs)
    sizes: dict[Slot, int] = {}
    for name in before.keys() & after.keys():
        original, small = (copy_model(whole.get_submodule(name)) for whole in (model, native))
        for method in others[name]:
            if not _agrees_with_forward(original, method, before[name]) or _agrees_with_forward(
                small, method, after[name]
            ):
                continue
            for some in size_combinations(left[name]):
                with assign_sizes({name: small}, some):
                    is_right = _agrees_with_forward(small, method, after[name])
                if is_right:
                    sizes |= some
                    break
    return sizes


def _other_forwards(module: nn.Module) -> list[str]:
    """Return the methods of a module whose names begin with `forward_`."""
    return [name for name in dir(type(module)) if name.startswith("forward_") and callable(getattr(module, name, None))]


def _last_arguments(model: nn.Module, names: Collection[str], inputs: ExampleInputs) -> dict[str, _Arguments]:
    """Return the arguments of the last call of some modules in a run."""
    seen: dict[str, _Arguments] = {}
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


def _agrees_with_forward(module: nn.Module, method: str, given: _Arguments) -> bool:
    """Check that a method runs, and gives what the forward of a module gives."""
    for each in module.modules():
        each.training = False
    try:
        with torch.no_grad():
            expected, found = (_outputs(run, given) for run in (module.forward, getattr(module, method)))
            return relative_error(expected, found) <= tolerance(expected)
    except Exception:  # it may be for other arguments, or raise anything on sizes that it does not expect
        return False


def _outputs(run: Callable[..., Any], given: _Arguments) -> list[Tensor]:
    args, kwargs = copy.deepcopy(given)
    return [leaf for leaf in output_leaves(run(*args, **kwargs)) if isinstance(leaf, Tensor)]


def find_config_sizes(native: nn.Module, slots: Sequence[SizeSlot], inputs: ExampleInputs) -> Sizes | None:
    """Find numbers of a config with which a model of the same class is the pruned one.

    Args:
        native: the pruned model, in its native form; left as it was.
        slots: integers of the model that may be sizes, with the values that they may have.
        inputs: the example.

    Returns:
        Slots of the config with their new values, none for a model without a config; None if no numbers of the config
        give these widths.
    """
    if not hasattr(native, "save_pretrained") or not hasattr(native, _CONFIG):
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in native.state_dict().items()}
    sizes: dict[Slot, int] = {}
    distance = _distance(_build_with(native, sizes), shapes)
    tried = [
        (one.slot, value)
        for one in slots
        if one.slot.attribute == _CONFIG and isinstance(one.slot.item, str)
        for value in one.values
    ]
    while distance:
        ways = [sizes | {slot: value} for slot, value in tried if slot not in sizes]
        best, way = min(
            ((_distance(_build_with(native, way), shapes), number) for number, way in enumerate(ways)),
            default=(math.inf, 0),
        )
        if best >= distance:
            return None
        distance, sizes = best, ways[way]
    return sizes if _computes_same(native, sizes, inputs) else None


def _build_with(native: nn.Module, sizes: Sizes) -> nn.Module | None:
    """Build a model of the same class with other numbers in its config, without values; None if that fails."""
    holder = nn.Module()
    holder.config = copy.deepcopy(native.config)
    try:
        for slot, value in sizes.items():
            assign_size(holder, slot, value)
        with parameters_on_meta():
            return type(native)(holder.config)
    except Exception:  # the class may not be made of a config alone, or refuse these numbers in any way
        return None


def _distance(model: nn.Module | None, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the sum over all dimensions of the logarithms of factors between sizes of a model and other shapes."""
    own = {} if model is None else {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if own.keys() != shapes.keys() or any(len(own[name]) != len(shape) for name, shape in shapes.items()):
        return math.inf
    pairs = [pair for name, shape in shapes.items() for pair in zip(own[name], shape, strict=True)]
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in pairs if a != b)


def _computes_same(native: nn.Module, sizes: Sizes, inputs: ExampleInputs) -> bool:
    """Check that a model built with these numbers, and the pruned one with them, compute what the pruned one does."""
    built = _build_with(native, sizes)
    if built is None:
        return False
    built.load_state_dict(native.state_dict(), assign=True, strict=False)
    expected = _outputs_in_eval(native, inputs)
    with assign_sizes({"": native}, sizes):
        found = [_outputs_in_eval(model, inputs) for model in (native, built)]
    return all(
        expected is not None and one is not None and relative_error(expected, one) <= tolerance(expected)
        for one in found
    )


def _outputs_in_eval(model: nn.Module, inputs: ExampleInputs) -> list[Any] | None:
    if run_failure(model, inputs, "eval") is not None:
        return None
    with in_mode(model, "eval"):
        return output_leaves(run_model(model, inputs))
