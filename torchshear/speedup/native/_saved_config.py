"""Numbers of a config, as `save_pretrained` writes it and `from_pretrained` reads it, that describe a pruned model.

If a model of the same class with other numbers in its config has the widths of the pruned model, these numbers are
found. They are proved by that model: it has the same shapes, and computes the same with the same tensors.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchshear.dependency.plans._form import Sizes, Slot
from torchshear.graph import ExampleInputs, parameters_on_meta
from torchshear.graph._outputs import output_leaves
from torchshear.graph.capture._check import run_failure, run_model
from torchshear.graph.model._state import in_mode
from torchshear.speedup.comparing._relative_error import relative_error, tolerance
from torchshear.speedup.native._size_attributes import SizeSlot, assign_size, assign_sizes

_CONFIG = "config"


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
    expected = _outputs(native, inputs)
    with assign_sizes({"": native}, sizes):
        found = [_outputs(model, inputs) for model in (native, built)]
    return all(
        expected is not None and one is not None and relative_error(expected, one) <= tolerance(expected)
        for one in found
    )


def _outputs(model: nn.Module, inputs: ExampleInputs) -> list[Any] | None:
    if run_failure(model, inputs, "eval") is not None:
        return None
    with in_mode(model, "eval"):
        return output_leaves(run_model(model, inputs))
