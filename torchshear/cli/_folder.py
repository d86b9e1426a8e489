"""A folder of results that is written as a whole or not at all."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from torchshear.errors import OutputError

_INDEX_FILE: Final = re.compile(r"plan-[0-9a-f]{12}\.safetensors")


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """Give a draft folder whose files move into `output` if the block succeeds; else nothing is left behind.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    draft = None
    try:
        output.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=output))
        yield draft
        _publish(draft, output)
    except (OSError, SafetensorError) as error:
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


def _publish(draft: Path, output: Path) -> None:
    """Move the files of a draft to their place, all or none."""
    made = sorted(file.name for file in draft.iterdir())
    for name in made:
        if (output / name).is_dir():
            raise IsADirectoryError(EISDIR, f"{name} is a folder there")
    for name in made:
        (draft / name).replace(output / name)
    for file in output.iterdir():  # the index file of an earlier plan belongs to nothing now
        if "plan.json" in made and _INDEX_FILE.fullmatch(file.name) and file.name not in made:
            file.unlink()
