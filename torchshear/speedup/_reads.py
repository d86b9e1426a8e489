"""Which attributes a model reads while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchshear.speedup._sizes import Slot, is_record

Reads = set[tuple[int, str]]  # id of the object, name of the attribute


@contextmanager
def recorded(model: nn.Module) -> Iterator[Reads]:
    """Record what is read of the modules of a model and of the objects of settings that they hold."""
    reads: Reads = set()
    owners: dict[int, Any] = {}
    for module in model.modules():
        owners[id(module)] = module
        owners.update((id(value), value) for value in vars(module).values() if is_record(value))
    changed: list[tuple[Any, type]] = []
    try:
        for owner in owners.values():
            own_class = type(owner)
            try:
                owner.__class__ = _watching(own_class, reads)
            except TypeError:  # a class that does not let its instances change theirs is not watched
                reads |= {(id(owner), name) for name in vars(owner)}
                continue
            changed.append((owner, own_class))
        yield reads
    finally:
        for owner, own_class in changed:
            owner.__class__ = own_class


def _watching(cls: type, reads: Reads) -> type:
    """A class like another that notes which attributes are read."""
    read: Any = cls.__getattribute__

    def note(self: Any, name: str) -> Any:
        reads.add((id(self), name))
        return read(self, name)

    return type(cls.__name__, (cls,), {"__getattribute__": note, "__module__": cls.__module__, "__slots__": ()})


def is_read(module: nn.Module, slot: Slot, reads: Reads) -> bool:
    """Whether a slot of a module was read; settings may be read under other names than they are stored under."""
    if (id(module), slot.attribute) not in reads:
        return False
    if not isinstance(slot.item, str):
        return True
    record = getattr(module, slot.attribute)
    names = {name for owner, name in reads if owner == id(record)}
    aliases = names - vars(record).keys() - set(dir(type(record)))
    value = vars(record)[slot.item]
    return slot.item in names or any(getattr(record, name, None) == value for name in aliases)
