"""Writing files so that a failure in the middle leaves what was there before."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchshear.errors import OutputError


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `target`, renamed onto it only if the block ends without an exception.

    Args:
        target: the file to create or replace.

    Yields:
        A path in the same folder with the same suffix, to be written by the caller.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full; `target` is unchanged.
    """
    target = Path(target)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(
            f"cannot write {str(target)!r}: {error.strerror or error}. "
            f"Expected a folder that exists and is writable; create it or choose another."
        ) from error
    temporary = Path(name)
    try:
        yield temporary
        publish(temporary, target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {str(target)!r}: {error.strerror or error}. The file that was there before is unchanged."
        ) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def publish(temporary: Path, target: Path) -> None:
    """Flush a file to disk, give the file the permissions a plain `open` would have given, and rename."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(target)
