"""Recording the attributes that a model reads while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchshear.dependency.plans._form import Slot
from torchshear.graph.model._process import run_exclusively
from torchshear.speedup.native._size_attributes import is_record

AttributeReads = set[tuple[int, str]]  # id of the object, name of the attribute


@contextmanager
def record_reads(model: nn.Module) -> Iterator[AttributeReads]:
    """Record the attributes read of a model's modules, and of the objects of settings that they hold, for a while.

    Their classes get a `__getattribute__` that notes each read. Subclasses would leave the classes alone, but some
    classes act on being subclassed.
    """
    reads: AttributeReads = set()
    owners: dict[int, Any] = {}
    for module in model.modules():
        owners[id(module)] = module
        owners.update((id(value), value) for value in vars(module).values() if is_record(value))
    watched: list[tuple[type, Any]] = []
    with run_exclusively():
        try:
            for cls in dict.fromkeys(type(owner) for owner in owners.values()):
                own = vars(cls).get("__getattribute__")
                try:
                    type.__setattr__(cls, "__getattribute__", _recording_getattribute(cls, reads))
                except TypeError:  # a class written in C is not watched: all that its instances hold may be read
                    same = [owner for owner in owners.values() if type(owner) is cls]
                    reads |= {(id(owner), name) for owner in same for name in vars(owner)}
                    continue
                watched.append((cls, own))
            yield reads
        finally:
            for cls, own in reversed(watched):
                if own is None:
                    type.__delattr__(cls, "__getattribute__")
                else:
                    type.__setattr__(cls, "__getattribute__", own)


def _recording_getattribute(cls: type, reads: AttributeReads) -> Any:
    """Return a `__getattribute__` that reads as that of a class, and notes each read."""
    read: Any = cls.__getattribute__

    def note(self: Any, name: str) -> Any:
        reads.add((id(self), name))
        return read(self, name)

    return note


def is_read(module: nn.Module, slot: Slot, reads: AttributeReads) -> bool:
    """Check that a slot of a module was read; settings may be read under another name than they are stored under."""
    if (id(module), slot.attribute) not in reads:
        return False
    if not isinstance(slot.item, str):
        return True
    record = getattr(module, slot.attribute)
    names = {name for owner, name in reads if owner == id(record)}
    aliases = names - vars(record).keys() - set(dir(type(record)))
    value = vars(record)[slot.item]
    return slot.item in names or any(getattr(record, name, None) == value for name in aliases)
