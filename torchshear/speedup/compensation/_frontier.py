"""Values of a graph in every batch, held in memory up to a limit and in files beyond it."""

import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, overload

import torch
from torch import Tensor

from torchshear.errors import OutputError, first_line

DEFAULT_MEMORY: Final = 2 * 10**9
"""Bytes that activations may take in memory, unless a call says something else."""
MOST_MEMORY: Final = 2**63 - 1
"""The largest number of bytes that can be asked for."""


class Values(Sequence[Any]):
    """Value of a node in each batch.

    Args:
        values: the values, in the order of the batches.
        can_move: True if tensors of them may lie in files; False for memory that a call writes to.
    """

    def __init__(self, values: Iterable[Any], can_move: bool = False) -> None:
        self._values = list(values)
        self.can_move = can_move

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, number: int) -> Any: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Any]: ...
    def __getitem__(self, number: Any) -> Any:
        value = self._values[number]
        return value.load() if isinstance(value, _StoredTensor) else value

    def add(self, value: Any) -> None:
        """Add the value in the next batch."""
        self._values.append(value)

    def tensors(self) -> Iterator[Tensor]:
        """Give the tensors that are in memory."""
        for value in self._values:
            items = value if isinstance(value, list | tuple) else [value]
            yield from (item for item in items if isinstance(item, Tensor))

    def store(self, folder: Path, fixed: Collection[int]) -> int:
        """Move plain tensors into files of a folder, and return how many bytes they have.

        Args:
            folder: the folder.
            fixed: addresses of memory that stays where it is.
        """
        n_bytes = 0
        for place, value in enumerate(self._values):
            if isinstance(value, Tensor) and _is_storable(value, fixed):
                self._values[place] = _StoredTensor(value, folder)
                n_bytes += value.nbytes
        return n_bytes


class Frontier:
    """Values of nodes that are still to be read, in two networks that run side by side.

    Values whose last reader is furthest away go to files in a temporary folder when those in memory exceed the limit.
    The folder is deleted with the frontier, which is a context manager.

    Args:
        limit: how many bytes may be in memory.
        last_use: node by name -> the place of its last reader, in the order in which nodes run.
        state: tensors of the networks themselves, which do not count.

    Attributes:
        dense: values in the original network by the name of the node.
        small: values in the smaller network; the same object where both agree.
    """

    def __init__(self, limit: int, last_use: Mapping[str, int], state: Iterable[Tensor] = ()) -> None:
        self.limit, self.last_use = limit, last_use
        self._state = {tensor.untyped_storage().data_ptr() for tensor in state}
        self.dense: dict[str, Values] = {}
        self.small: dict[str, Values] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Frontier":
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def collect(self, compute: Callable[[int], Any], n_batches: int, can_move: bool) -> Values:
        """Compute a value in each batch, and make room for it as it grows."""
        found = Values((), can_move)
        held, known = self._count_bytes()
        for number in range(n_batches):
            value = compute(number)
            found.add(value)
            for tensor in Values([value]).tensors():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    held += storage.nbytes()
            if held > self.limit:
                self._make_room(held - self.limit, found)
                held, known = self._count_bytes(found)
        return found

    def drop(self, name: str) -> None:
        """Forget the values of a node."""
        self.dense.pop(name, None)
        self.small.pop(name, None)

    def _count_bytes(self, *more: Values) -> tuple[int, set[int]]:
        """Return the memory of all values, and the addresses of it and of the networks' own tensors."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for values in (*self.dense.values(), *self.small.values(), *more)
            for storage in (tensor.untyped_storage() for tensor in values.tensors())
        }
        return sum(size for address, size in storages.items() if address not in self._state), {*storages, *self._state}

    def _make_room(self, n_bytes: int, growing: Values) -> None:
        """Move values to files: those that are read last first, and the ones that grow now at the very end.

        Raises:
            OutputError: they cannot be written.
        """
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="torchshear-")
        waiting = {
            id(values): (self.last_use.get(name, 0), values)
            for held in (self.dense, self.small)
            for name, values in held.items()
        }
        order = [values for _, values in sorted(waiting.values(), key=lambda entry: -entry[0])]
        fixed = {t.untyped_storage().data_ptr() for values in order if not values.can_move for t in values.tensors()}
        for values in (values for values in (*order, growing) if values.can_move):
            if n_bytes <= 0:
                return
            try:
                n_bytes -= values.store(Path(self._folder.name), fixed | self._state)
            except OSError as error:
                raise OutputError(
                    f"activations beyond memory= cannot be written to {self._folder.name!r}: {first_line(error)}. Free "
                    f"some space there, or give fewer batches or a larger memory=."
                ) from error


class _StoredTensor:
    """A tensor in a file, with the layout that it had in memory.

    Args:
        tensor: a tensor that fills its memory without gaps.
        folder: where the file is made.
    """

    def __init__(self, tensor: Tensor, folder: Path) -> None:
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            self.path = Path(file.name)
            weakref.finalize(self, self.path.unlink, missing_ok=True)
        tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).cpu().numpy().tofile(self.path)

    def load(self) -> Tensor:
        """Return the tensor; its memory is the file, read as far as it is looked at."""
        flat = torch.from_file(str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8)
        return flat.view(self.dtype).as_strided(self.shape, self.stride).to(self.device)


def _is_storable(tensor: Tensor, fixed: Collection[int]) -> bool:
    """Check that a tensor is plain memory without gaps, none of that which stays where it is."""
    is_plain = type(tensor) is Tensor and tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())
    is_dense = is_plain and tensor.numel() > 0 and bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
    return is_dense and tensor.untyped_storage().data_ptr() not in fixed
