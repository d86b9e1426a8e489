"""Plan files that are edited."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchshear.dependency.plans import _plan_file


def edit_plan(path: Path, edit: Callable[[dict[str, Any]], object], signed: bool = True) -> None:
    """Change the document of a plan file in place; unless `signed` is false, its digest is made anew."""
    document = json.loads(path.read_text())
    edit(document)
    if signed:
        document["sha256"] = _plan_file.content_digest(document)
    path.write_text(json.dumps(document))
