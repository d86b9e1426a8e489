"""Example inputs that nobody gave: those with which a model is called first."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from torchshear.errors import ArgumentError

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _StoppedError(BaseException):
    """Ends a run at the first call of a model, past all that catches exceptions."""


def first_call(model: nn.Module, run: Callable[[nn.Module], object]) -> Call | None:
    """Run a function of the user up to its first call of a model.

    Args:
        model: the model; it is not run.
        run: called with the model.

    Returns:
        Copies of the arguments of that call; None if there was none.
    """
    calls: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_copied(args, kwargs))
        raise _StoppedError

    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run(model)
    except _StoppedError:
        pass
    finally:
        handle.remove()
    return calls[0] if calls else None


def on_first_call(model: nn.Module, begin: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
    """Have a function called before a model's next call, with copies of its arguments.

    If the function raises, so does that call, and the function is called again before the next one.

    Args:
        model: the model.
        begin: called once; the model may be changed in it.
    """
    own = id(model)
    handles: list[RemovableHandle] = []

    def arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) != own:  # a copy, which has the hook as well
            return
        handles.pop().remove()
        try:
            begin(*_copied(args, kwargs))
        except BaseException:
            handles.append(module.register_forward_pre_hook(arrive, with_kwargs=True, prepend=True))
            raise

    handles.append(model.register_forward_pre_hook(arrive, with_kwargs=True, prepend=True))


class LatestBatch:
    """Batches of a loader that has one: the last with which a model was called in train mode.

    Args:
        model: the model.
        args: positional arguments of a call, in place of one in train mode.
        kwargs: its keyword arguments.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._signature = inspect.signature(model.forward)
        self._call: Call = (args, dict(kwargs))
        own = id(model)

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if id(module) == own and module.training:
                self._call = _copied(args, kwargs)

        model.register_forward_pre_hook(take, with_kwargs=True)

    def __iter__(self) -> Iterator[Any]:
        """Give the batch: a tuple of the arguments, by name where some were given so."""
        args, kwargs = self._call
        yield dict(self._signature.bind(*args, **kwargs).arguments) if kwargs else args


def example_inputs(args: object, kwargs: object, dummy_input: object) -> Call | None:
    """Return example inputs that were given, `dummy_input` being NNI's word for them; None if there are none.

    Raises:
        ArgumentError: they are no tuple and mapping, or both words are used.
    """
    if dummy_input is not None:
        if isinstance(args, Tensor) or args or kwargs:
            raise ArgumentError("dummy_input= and args= are two words for the example inputs; give one of them.")
        args, kwargs = ((), dummy_input) if isinstance(dummy_input, dict) else (dummy_input, None)
    if not isinstance(args, tuple | list | Tensor) or not isinstance(kwargs, Mapping | None):
        raise ArgumentError(
            f"args is {type(args).__name__} and kwargs {type(kwargs).__name__}; expected a tuple of example inputs, "
            f"and a mapping or None."
        )
    found = ((args,) if isinstance(args, Tensor) else tuple(args), dict(kwargs or {}))
    return found if any(found) else None


def _copied(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Arguments whose tensors are copies, which whoever calls cannot change."""

    def copy(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    copied: Call = pytree.tree_map(copy, (args, dict(kwargs)))
    return copied
