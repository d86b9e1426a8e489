"""Keeping the scale of attention in a model whose own code derives it from a size that shrank.

Such code divides scores by the square root of the smaller head dimension, where the original divides by that of the
larger one. Scores are linear in queries and in keys, so a factor on either makes up for it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchshear.dependency.plans._form import OutputFactors, OutputSlice


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
