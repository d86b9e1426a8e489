"""Numbers in attributes that switch something off: zeros that a user may change after the cut, as in a warm-up."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from torchshear.speedup.rewriting._traced import TracedModule

Switch = tuple[str, str]  # name of a module, and of its attribute
_ON = 0.37


def find_switches(original: nn.Module, candidate: nn.Module) -> tuple[Switch, ...]:
    """Attributes of the user's modules that are the number 0.0 in both models.

    Of a traced model there are none: what an attribute was is a number in its graphs, and stays so.
    """
    if any(isinstance(module, TracedModule) for module in candidate.modules()):
        return ()
    others = dict(candidate.named_modules())
    return tuple(
        (name, attribute)
        for name, module in original.named_modules()
        if not type(module).__module__.startswith("torch.")
        for attribute, value in vars(module).items()
        if type(value) is float and value == 0 and vars(others.get(name, module)).get(attribute) == 0
    )


@contextmanager
def switched_on(model: nn.Module, switches: tuple[Switch, ...]) -> Iterator[None]:
    """Have attributes hold another number than zero for a while."""
    modules = dict(model.named_modules())
    try:
        for name, attribute in switches:
            setattr(modules[name], attribute, _ON)
        yield
    finally:
        for name, attribute in switches:
            setattr(modules[name], attribute, 0.0)
