"""Random numbers that are the same in two models, whatever the shapes for which they are drawn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchshear.graph.numerics._dispatch import LeanDispatchMode

_MEANS = {"rand": 0.5, "rand_like": 0.5, "randn": 0.1, "randn_like": 0.1, "normal_functional": 0.1}
_IN_PLACE = {"uniform_": 0.5, "normal_": 0.1, "exponential_": 0.5}
_NAMES = frozenset({"native_dropout", "bernoulli", "bernoulli_", *_MEANS, *_IN_PLACE})
_DRAWS: dict[Any, str] = {}  # operator -> its name if it draws numbers, else ""


class EqualRandomness(LeanDispatchMode):  # type: ignore[no-untyped-call]
    """Gives every draw one fixed value, the mean where there is one: dropout then drops nothing.

    A small model draws fewer numbers than the large one, so that equal seeds do not make them equal.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _DRAWS.get(func)
        if name is None:
            name = str(func).split(".")[1]
            name = _DRAWS[func] = name if name in _NAMES else ""
        if not name:
            return func(*args, **kwargs)
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "bernoulli_":
            return args[0].copy_(_share(args[1] if len(args) > 1 else kwargs.get("p", 0.5), args[0]))
        if name == "bernoulli":
            return torch.ones_like(args[0]) if len(args) == 1 else torch.full_like(args[0], float(args[1] > 0))
        if name in _IN_PLACE:
            return args[0].fill_(_IN_PLACE[name])
        result = func(*args, **kwargs)
        return result.fill_(_MEANS[name]) if isinstance(result, Tensor) else result


def _share(p: Any, like: Tensor) -> Tensor:
    """What stands for a mask that keeps a share p of its elements: p itself, so that dividing by p gives one."""
    return p.to(like.dtype).expand(like.shape) if isinstance(p, Tensor) else torch.full_like(like, p)
