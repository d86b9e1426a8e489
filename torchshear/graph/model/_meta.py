"""Models without weights: parameters on the meta device, buffers with their values."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Have the modules that are made in a block put their parameters on the meta device as they are made.

    Unlike under `torch.device("meta")`, buffers are made with their values. So an analysis can read those that hold
    positions, and those that no checkpoint holds, as frequencies of rotary embeddings, are there when weights are
    loaded. Memory is taken for one parameter at a time. Not for several threads that make modules at once.

    Example:
        >>> with parameters_on_meta():
        ...     model = nn.BatchNorm1d(4)
        >>> model.weight.is_meta, model.running_var.tolist()
        (True, [1.0, 1.0, 1.0, 1.0])
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def is_on_meta(model: nn.Module) -> bool:
    """Return whether any parameter of a model is on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def buffers_on_meta(model: nn.Module) -> Iterator[None]:
    """Replace each buffer of a model by one without values for a block."""
    twins: dict[int, Tensor] = {}
    moved = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None and not b.is_meta]
    try:
        for module, name, buffer in moved:
            module._buffers[name] = twins.setdefault(id(buffer), buffer.to("meta"))
        yield
    finally:
        for module, name, buffer in moved:
            module._buffers[name] = buffer
