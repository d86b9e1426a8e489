"""The first batches of a loader."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

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
    except TypeError as error:
        raise DataError(f"the loader is {type(loader).__name__}; expected something that gives batches.") from error
    for number, batch in enumerate(given):
        yield number, batch
        done = number + 1
    if done < count:
        raise DataError(
            f"the loader ended after {done} of {count} batches; give a longer one, or ask for batches={done}."
            if done
            else "the loader gave no batch; expected at least one. An iterator that was used before is empty."
        )
