"""Settings that a model is built from again: a config that `save_pretrained` writes and `from_pretrained` reads.

Where the widths of a pruned model are those of a model of its class with other numbers in its config, these numbers are
found, and proved by that model: it has the same shapes, and gives with the same tensors what the pruned model gives.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchshear.dependency import Sizes, Slot
from torchshear.graph import ExampleInputs, output_leaves, parameters_on_meta, run_failure
from torchshear.graph.capture._check import run_model
from torchshear.graph.model._state import in_mode
from torchshear.speedup.comparing._relative_error import relative_error, tolerance
from torchshear.speedup.native._size_attributes import Choice, assign, assigned

_CONFIG = "config"


def is_built_from_settings(model: nn.Module) -> bool:
    """Whether a model is saved with settings that it is built from again."""
    return hasattr(model, "save_pretrained") and hasattr(model, _CONFIG)


def settings_of(native: nn.Module, found: Sequence[Choice], inputs: ExampleInputs) -> Sizes | None:
    """Find numbers of a config with which a model of the same class is the pruned one.

    Args:
        native: the pruned model, in its native form; as it was afterwards.
        found: integers of the model that may be sizes, with the values that they may have.
        inputs: the example.

    Returns:
        Slots of the config with their new values; None where no numbers of it give these widths.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in native.state_dict().items()}
    sizes: dict[Slot, int] = {}
    distance = _distance(_built(native, sizes), shapes)
    tried = [
        (choice.slot, value)
        for choice in found
        if choice.slot.attribute == _CONFIG and isinstance(choice.slot.item, str)
        for value in choice.values
    ]
    while distance:
        ways = [sizes | {slot: value} for slot, value in tried if slot not in sizes]
        best, way = min(
            ((_distance(_built(native, way), shapes), number) for number, way in enumerate(ways)), default=(math.inf, 0)
        )
        if best >= distance:
            return None
        distance, sizes = best, ways[way]
    return sizes if _is_the_same(native, sizes, inputs) else None


def _built(native: nn.Module, sizes: Sizes) -> nn.Module | None:
    """A model of the same class with other numbers in its config, without values; None where there is none."""
    holder = nn.Module()
    holder.config = copy.deepcopy(native.config)
    try:
        for slot, value in sizes.items():
            assign(holder, slot, value)
        with parameters_on_meta():
            return type(native)(holder.config)
    except Exception:  # the class may not be made of a config alone, or refuse these numbers in any way
        return None


def _distance(model: nn.Module | None, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """How far the shapes of a model are from others: factors between sizes, over all dimensions."""
    own = {} if model is None else {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if own.keys() != shapes.keys() or any(len(own[name]) != len(shape) for name, shape in shapes.items()):
        return math.inf
    pairs = [pair for name, shape in shapes.items() for pair in zip(own[name], shape, strict=True)]
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in pairs if a != b)


def _is_the_same(native: nn.Module, sizes: Sizes, inputs: ExampleInputs) -> bool:
    """Whether a model with these settings, and the pruned one with them, give what the pruned one gives."""
    built = _built(native, sizes)
    if built is None:
        return False
    built.load_state_dict(native.state_dict(), assign=True, strict=False)
    expected = _outputs(native, inputs)
    with assigned({"": native}, sizes):
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
