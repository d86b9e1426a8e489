"""Storages of a search that outlive a process and are shared by several, held by Optuna."""

import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torchshear._arguments import quote
from torchshear.errors import ArgumentError, SearchError, first_line

STUDY: Final = "torchshear-search"
_JOURNAL: Final = "journal://"
_GRPC: Final = "grpc://"
_LOCKED_SECONDS: Final = 60  # that SQLite waits for another process
_LOCK_SECONDS: Final = 10  # after which the lock of a journal is taken from a process that was ended while it held it
_IDENTITY: Final = "search"  # attribute of the study


def import_optuna(asking: str = "storage") -> Any:
    """Return the package.

    Args:
        asking: the argument that needs it.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ArgumentError(
            f"{asking}= needs Optuna, which cannot be imported ({error}). Install torchshear[search], or leave "
            f"{asking}= away: a search in memory needs nothing."
        ) from error


@contextmanager
def quiet_optuna(optuna: Any) -> Iterator[None]:
    """Keep Optuna from announcing studies for a block."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(storage: object, must_exist: bool = False, early: Any = None) -> Any:
    """Open the study of a storage, or make it.

    Args:
        storage: "journal://FILE" for a file that processes of one machine share; "grpc://HOST:PORT" for Optuna's proxy
            of a storage; the URL of a database, as "sqlite:///search.db" or "postgresql+psycopg://user@host/name"; or a
            storage of Optuna.
        must_exist: whether a storage without a search is refused.
        early: pruner of Optuna that decides which candidates are given up; None: one that gives up none.

    Raises:
        ArgumentError: it is none of these, cannot be reached, holds no search and must, or Optuna is not installed.
        SearchError: it is damaged.
    """
    optuna = import_optuna()
    parts = {"sampler": _sampler(optuna), "pruner": optuna.pruners.NopPruner() if early is None else early}
    with quiet_optuna(optuna):
        try:
            opened = _open(optuna, storage, must_exist)
            names = [one.study_name for one in opened.get_all_studies()]
            if must_exist and STUDY not in names:
                raise ArgumentError(f"storage={quote(storage)} holds no search; start one with it first.")
            if STUDY in names:  # a journal notes every study that is asked for anew
                return optuna.load_study(storage=opened, study_name=STUDY, **parts)
            return optuna.create_study(
                storage=opened, study_name=STUDY, direction="maximize", load_if_exists=True, **parts
            )
        except ArgumentError:
            raise
        except Exception as error:  # of whichever database it is
            is_journal = isinstance(storage, str) and storage.startswith(_JOURNAL)
            if is_journal and not isinstance(error, OSError):
                raise damage_error(storage, error) from error
            raise ArgumentError(
                f"storage={quote(storage)} cannot be opened: {type(error).__name__}: {first_line(error)}. Expected "
                f"'journal://FILE', the URL of a database, as 'sqlite:///search.db', or 'grpc://HOST:PORT'."
            ) from error


def damage_error(storage: object, error: BaseException) -> SearchError:
    """Return the error for a storage that cannot be read."""
    return SearchError(
        f"storage={quote(storage)} is damaged: {type(error).__name__}: {first_line(error)}. Use another one, or remove "
        f"the damaged lines; what stands before them is taken from it."
    )


def claim_study(study: Any, identity: Mapping[str, Any]) -> None:
    """Mark a study as that of one search, or check that it is.

    Raises:
        ArgumentError: it is that of another search; says in what.
    """
    known = study.user_attrs.get(_IDENTITY)
    if known is None:
        study.set_user_attr(_IDENTITY, dict(identity))
        known = study.user_attrs[_IDENTITY]
    differing = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
    if differing:
        said = "; ".join(f"{name} is {quote(known.get(name))}, here {quote(identity.get(name))}" for name in differing)
        raise ArgumentError(
            f"the storage holds another search: {said}. Use another storage, or the same arguments and model."
        )


def _open(optuna: Any, storage: object, must_exist: bool) -> Any:
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    if not isinstance(storage, str) or "://" not in storage or "\0" in storage:
        raise ArgumentError(
            f"storage={quote(storage)}; expected 'journal://FILE', the URL of a database, as 'sqlite:///search.db', "
            f"'grpc://HOST:PORT', or a storage of Optuna."
        )
    if storage.startswith(_JOURNAL):
        return _open_journal(optuna, Path(storage.removeprefix(_JOURNAL)), must_exist)
    if storage.startswith(_GRPC):
        host, colon, port = storage.removeprefix(_GRPC).rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ArgumentError(f"storage={quote(storage)}; expected 'grpc://HOST:PORT'.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    waits = {"connect_args": {"timeout": _LOCKED_SECONDS}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    return optuna.storages.RDBStorage(storage, engine_kwargs=waits)


def _open_journal(optuna: Any, path: Path, must_exist: bool) -> Any:
    """Open a journal; a last line that was cut off, as by a loss of power, is dropped first."""
    if not path.name:
        raise ArgumentError("storage='journal://' names no file; expected 'journal://FILE'.")
    if must_exist and not path.exists():
        raise ArgumentError(f"there is no file {str(path)!r}; start a search with this storage first.")
    journal = importlib.import_module("optuna.storages.journal")
    lock = journal.JournalFileSymlinkLock(str(path), grace_period=_LOCK_SECONDS)
    backend = journal.JournalFileBackend(str(path), lock)
    with path.open("rb+") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(size - 1, 0))
        if size and file.read(1) != b"\n":
            lock.acquire()
            try:
                whole = path.read_bytes()
                file.truncate(whole.rfind(b"\n") + 1)
            finally:
                lock.release()
    return optuna.storages.JournalStorage(backend)


def _sampler(optuna: Any) -> Any:
    """Return a sampler that is never asked: methods propose."""
    return optuna.samplers.RandomSampler(seed=0)
