"""The cache of measurements, one file for a model on a device; and who may measure or work at a time."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, ReadWriteLock
from platformdirs import user_cache_path

from torchshear.errors import OutputError
from torchshear.speedup.latency._probes import WidthProbe
from torchshear.storage._reading import UnreadableError, read_json
from torchshear.storage._writing import atomic_path

FOLDER_VARIABLE: Final = "TORCHSHEAR_CACHE"
_FORMAT = 3
_LARGEST = 1 << 28  # bytes
_HELD: ContextVar[str | None] = ContextVar("_HELD", default=None)  # what this process may: "works" or "measures"


@dataclass(frozen=True, slots=True)
class ProbeFile:
    """File of the probes of one model on one device.

    Attributes:
        path: the file.
        key: what the times depend on, as plain data; stands in the file.
    """

    path: Path
    key: Mapping[str, Any]

    @classmethod
    def of(cls, key: Mapping[str, Any]) -> "ProbeFile":
        """Name the file of a key."""
        key = {"format": _FORMAT, **key}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return cls(cache_folder() / f"{digest[:32]}.json", key)

    def read(self) -> tuple[list[WidthProbe], str]:
        """Return the probes that are there, and a sentence if the file is damaged, else ""."""
        if not self.path.exists():
            return [], ""
        try:
            document = read_json(self.path, _LARGEST)
            if document["key"] != json.loads(json.dumps(self.key)):
                raise ValueError("it is of something else")
            return [WidthProbe.from_json(entry) for entry in document["probes"]], ""
        except (UnreadableError, LookupError, TypeError, ValueError, AttributeError) as error:
            return [], f"The file of earlier measurements, {str(self.path)!r}, was damaged ({error}); measured again."

    def write(self, probes: Sequence[WidthProbe]) -> None:
        """Write probes over those that are there.

        Raises:
            OutputError: the folder cannot be written to.
        """
        document = {"key": dict(self.key), "probes": [probe.to_json() for probe in probes]}
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps(document), encoding="utf-8")


def cache_folder() -> Path:
    """Return the folder of measurements, created: that of the variable TORCHSHEAR_CACHE, else the user's own.

    Raises:
        OutputError: it cannot be created.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    folder = (Path(given) if given else user_cache_path("torchshear", appauthor=False)) / "latency"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create the folder of measurements {str(folder)!r}: {error.strerror or error}. Name another in the "
            f"environment variable {FOLDER_VARIABLE}."
        ) from error
    return folder


@contextmanager
def only_measurement() -> Iterator[None]:
    """Let one process of this machine measure at a time, and none do other work of the library meanwhile; others wait.

    Within `while_none_measures` that is left for as long as the measurement takes.
    """
    lock, held = _measuring_lock(), _HELD.get()
    if held == "measures":
        yield
        return
    if held == "works":
        lock.release()
    token = _HELD.set("measures")
    try:
        with lock.write_lock():
            yield
    finally:
        _HELD.reset(token)
        if held == "works":
            lock.acquire_read()


@contextmanager
def while_none_measures() -> Iterator[None]:
    """Hold off measurements of other processes of this machine for a block; any number of processes may do so."""
    if _HELD.get() is not None:  # a function of the user that scores a candidate runs a search of its own
        yield
        return
    token = _HELD.set("works")
    try:
        with _measuring_lock().read_lock():
            yield
    finally:
        _HELD.reset(token)


@contextmanager
def only_work_on(gpus: Collection[str]) -> Iterator[None]:
    """Let one process of this machine work on some GPUs at a time; others wait.

    Args:
        gpus: an identifier for each.
    """
    with ExitStack() as stack:
        for gpu in sorted(gpus):
            stack.enter_context(FileLock(cache_folder() / f"{gpu}.lock"))
        yield


def _measuring_lock() -> ReadWriteLock:
    return ReadWriteLock(cache_folder() / "measuring.lock")
