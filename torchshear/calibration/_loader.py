"""The first batches of a loader."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from torchshear.errors import DataError


def first_batches(loader: Iterable[Any], count: int) -> Iterator[tuple[int, Any]]:
    """The first batches of a loader, each with its number.

    Args:
        loader: gives batches; an endless one is stopped.
        count: how many to take.

    Raises:
        DataError: the loader is empty or gives fewer batches, or is nothing that gives any.
    """
    done = 0
    try:
        given = islice(loader, count)
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"the loader is {type(loader).__name__}; expected something that gives batches.") from error
    for number, batch in enumerate(given):
        try:
            leaves = pytree.tree_leaves(batch)
        except RecursionError as error:
            raise _too_deep(number) from error
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
            raise DataError(f"batch {number} holds a tensor on the meta device; expected numbers.")
        yield number, batch
        done = number + 1
    if done < count:
        raise DataError(
            f"the loader ended after {done} of {count} batches; give a longer one, or ask for batches={done}."
            if done
            else "the loader gave no batch; expected at least one. An iterator that was used before is empty."
        )


def _too_deep(number: int) -> DataError:
    return DataError(f"batch {number} holds itself, or is nested too deeply to be taken apart.")


class LikeExample:
    """Batches of a loader with floating numbers in the type of a model's example inputs.

    Args:
        loader: gives batches.
        example: inputs; if their floating numbers are of several types, or there are none, batches stay as they are.
    """

    def __init__(self, loader: Iterable[Any], example: Any) -> None:
        self._loader = loader
        tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        self._dtype = types.pop() if len(types) == 1 else None

    def __iter__(self) -> Iterator[Any]:
        if self._dtype is None:
            return iter(self._loader)
        return (self._like_example(number, batch) for number, batch in enumerate(self._loader))

    def _like_example(self, number: int, batch: Any) -> Any:
        try:
            return pytree.tree_map_only(Tensor, self._cast, batch)
        except RecursionError as error:
            raise _too_deep(number) from error

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() and not tensor.is_meta else tensor
