"""Writing files so that a failure in the middle leaves what was there before."""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchshear.errors import OutputError
from torchshear.storage._reading import as_path

DRAFT = ".torchshear-"  # what the names of unfinished files and folders begin with
_FILE = re.compile(re.escape(DRAFT) + r"[0-9a-f]{16}(\..*)?")


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `target`, renamed onto it only if the block ends without an exception.

    A link is followed: the file that it leads to is written, and the link stays. A file that is replaced hands on its
    permissions.

    Args:
        target: the file to create or replace.

    Yields:
        A path in the same folder with the same suffix, to be written by the caller.

    Raises:
        ArgumentError: `target` is no path.
        OutputError: the folder is missing or not writable, the target is read-only or no plain file, or the disk is
            full; `target` is unchanged.
    """
    given = as_path(target, "the path of a file to write")
    try:
        place = Path(os.path.realpath(given))
        _check_place(place)
        temporary = place.with_name(f"{DRAFT}{secrets.token_hex(8)}{place.suffix if len(place.suffix) < 20 else ''}")
        os.close(_create(temporary))
    except OSError as error:
        raise OutputError(
            f"cannot write {str(given)!r}: {error.strerror or error}. "
            f"Expected a folder that exists and is writable; create it or choose another."
        ) from error
    try:
        yield temporary
        publish(temporary, place)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {str(given)!r}: {error.strerror or error}. The file that was there before is unchanged."
        ) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def is_draft(path: Path) -> bool:
    """Return whether a file or a folder is what a run that was killed left unfinished."""
    return path.name.startswith(f"{DRAFT}draft-") if path.is_dir() else _FILE.fullmatch(path.name) is not None


@contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a draft folder beside `target`, which takes its place only if the block ends without an exception.

    Args:
        target: the folder to make; it may exist if it is empty.

    Yields:
        An empty folder, to be filled by the caller.

    Raises:
        ArgumentError: `target` is no path.
        OutputError: it holds something or is no folder, its parent is missing or not writable, or the disk is full.
    """
    given = as_path(target, "the path of a folder to write")
    place = Path(os.path.realpath(given))
    draft = place.with_name(f"{DRAFT}draft-{secrets.token_hex(8)}")
    try:
        if place.exists() and not place.is_dir():
            raise OutputError(f"cannot write into {str(given)!r}: it is a file. Expected the name of a folder.")
        held = next(iter(sorted(place.iterdir())), None) if place.exists() else None
        if held is not None:
            raise OutputError(
                f"cannot write into {str(given)!r}: it holds {held.name!r}. Expected a new or empty folder."
            )
        draft.mkdir()
        yield draft
        draft.replace(place)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write into {str(given)!r}: {error.strerror or error}. Expected a folder that can be made, with "
            f"space on its disk; nothing was written."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(temporary: Path, target: Path, like: Path | None = None) -> None:
    """Flush a file to disk and rename it.

    It gets the permissions of the file that it replaces, else those that a plain `open` would give, no wider than those
    of `like`, the file that it was made of.
    """
    _check_place(target)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    if target.exists():
        mode = target.stat().st_mode
    else:
        probe = temporary.with_name(f"{DRAFT}{secrets.token_hex(8)}")
        handle = _create(probe)
        mode = os.fstat(handle).st_mode & (0o777 if like is None else like.stat().st_mode)
        os.close(handle)
        probe.unlink()
    temporary.chmod(stat.S_IMODE(mode))
    temporary.replace(target)


def _create(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)


def _check_place(place: Path) -> None:
    """Raise unless a file can be written there, or a plain one that may be written to can be replaced."""
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a link, a device, a pipe or a socket"
        raise OutputError(f"cannot write {str(place)!r}: it is {kind}. Expected the name of a file.")
    if not os.access(place, os.W_OK):
        raise OutputError(f"cannot write {str(place)!r}: it is read-only. Choose another name, or allow writing to it.")
