"""A folder of results that is written as a whole or not at all, and never over what somebody else wrote."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from safetensors import SafetensorError

from torchshear.errors import OutputError
from torchshear.storage._reading import UnreadableError, read_json
from torchshear.storage._writing import DRAFT, atomic_path, is_draft

RECORD: Final = f"{DRAFT}written.json"
_FORMAT: Final = "torchshear.output"
_MAX_BYTES: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class _Written:
    """A file that was written.

    Attributes:
        command: the command that wrote it.
        digests: SHA-256 that it may have; those of before and after where a run was killed in between.
    """

    command: str
    digests: tuple[str, ...]


def folder_name(text: str) -> Path:
    """Check the name of a folder that is given on the command line.

    Raises:
        typer.BadParameter: it is empty.
    """
    if not text.strip():
        raise typer.BadParameter("it is empty; give the name of a folder, or . for the current one.")
    return Path(text)


Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Write into a folder that holds other files: those that have the names of results are replaced."
    ),
]


@contextmanager
def output_folder(output: Path, command: str, force: bool = False, adds: bool = False) -> Iterator[Path]:
    """Give a draft folder whose files move into `output` if the block succeeds; else nothing is left behind.

    The folder must be new or empty, or hold nothing but what earlier runs wrote and nobody changed since, as a record
    of names and digests in it tells. Results of the same command are replaced as a whole: the old files go before the
    new ones come, so that a process that is killed in between leaves no mixture of two runs. Those of others stay.

    Args:
        output: the folder.
        command: the command whose results they are.
        force: take a folder that holds other files. Those that have the names of results are replaced; all others stay.
        adds: leave the results of an earlier run there, except those that are written anew.

    Raises:
        OutputError: the folder holds something else, cannot be made or written, or the disk is full.
    """
    missing = [folder for folder in (output, *output.parents) if not os.path.lexists(folder)]
    draft = None
    try:
        own = _check(output, force)
        output.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{DRAFT}draft-", dir=output))
        yield draft
        replaced = set() if adds else {name for name, written in own.items() if written.command == command}
        _publish(draft, output, own, replaced, command, force)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError) and error.__cause__ is None:
            raise
        cause = error.__cause__ or error
        raise OutputError(
            f"cannot write into {str(output)!r}: {getattr(cause, 'strerror', None) or cause}. Expected a folder that "
            f"can be made or written, with space on its disk; what was there before is unchanged."
        ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # it holds something, so it stays
                folder.rmdir()


def _check(output: Path, force: bool) -> dict[str, _Written]:
    """Files of earlier runs that are as they were written.

    Raises:
        OutputError: there is something else, and it is not to be written over.
    """
    if not output.is_dir():
        return {}  # it will be made, or that will fail
    recorded = _read_record(output)
    own = {
        name: written
        for name, written in recorded.items()
        if (output / name).is_file() and _digest(output / name) in written.digests
    }
    foreign = [entry.name for entry in sorted(output.iterdir()) if not _is_ours(entry, own)]
    if foreign and not force:
        what = "was changed since torchshear wrote it" if foreign[0] in recorded else "torchshear did not write"
        raise OutputError(
            f"cannot write into {str(output)!r}: it holds {foreign[0]!r}, which {what}. Expected a new or empty "
            f"folder, or the results of an earlier run; choose another, or say --force to have files replaced that "
            f"have the names of results (others stay)."
        )
    return own


def _is_ours(entry: Path, own: Mapping[str, _Written]) -> bool:
    return entry.name in own or entry.name == RECORD or is_draft(entry)


def _read_record(output: Path) -> dict[str, _Written]:
    """Read the record of files that earlier runs wrote; empty if there is none."""
    try:
        document = read_json(output / RECORD, _MAX_BYTES)
        files = document["files"] if document["format"] == _FORMAT else {}
        return {name: _Written(str(entry["command"]), tuple(entry["digests"])) for name, entry in files.items()}
    except (UnreadableError, LookupError, TypeError, AttributeError):
        return {}


def _write_record(output: Path, files: Mapping[str, _Written]) -> None:
    document = {"format": _FORMAT, "version": 1, "files": {name: asdict(one) for name, one in files.items()}}
    with atomic_path(output / RECORD) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(
    draft: Path, output: Path, own: Mapping[str, _Written], replaced: Collection[str], command: str, force: bool
) -> None:
    """Put the files of a draft in the place of earlier ones, all or none."""
    made = {file.name: _Written(command, (_digest(file),)) for file in draft.iterdir()}
    for name in made:
        place = output / name
        problem = f"{name!r} came there meanwhile" if os.path.lexists(place) and name not in own and not force else ""
        if place.is_dir() and not place.is_symlink():
            problem = f"{name} is a folder there"
        if problem:
            raise OutputError(f"cannot write into {str(output)!r}: {problem}. Choose another folder.")
    goes = {name for name in made.keys() | set(replaced) if os.path.lexists(output / name)}
    both = {
        name: _Written(one.command, one.digests + own[name].digests) if name in own else one
        for name, one in made.items()
    }
    _write_record(output, {**own, **both})
    _exchange(draft, output, goes, made)
    _write_record(output, {**{name: one for name, one in own.items() if name not in goes}, **made})


def _exchange(draft: Path, output: Path, goes: Iterable[str], comes: Iterable[str]) -> None:
    """Take files out of a folder, then move others in; put all back if that fails."""
    old = Path(tempfile.mkdtemp(prefix=f"{DRAFT}draft-", dir=output))
    try:
        for name in goes:
            (output / name).rename(old / name)
        for name in comes:
            if (old / name).is_file() and not (old / name).is_symlink():
                (draft / name).chmod((old / name).stat().st_mode & 0o777)
            (draft / name).rename(output / name)
    except BaseException:
        for name in comes:
            if not (draft / name).exists():
                (output / name).rename(draft / name)
        for file in old.iterdir():
            file.rename(output / file.name)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
