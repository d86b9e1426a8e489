"""The folder of a pruning in rounds: what each round left, and a record of all of them, from which it goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, CheckpointError, first_line
from torchshear.storage._reading import UnreadableError, as_path, check_tensors, read_json
from torchshear.storage._writing import atomic_path

_FORMAT: Final = "torchshear.rounds"
_VERSION: Final = 1
_MOST_BYTES: Final = 1 << 24


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous().flatten()
        digest.update(f"{name}|{value.dtype}|{tuple(state[name].shape)}|".encode())
        digest.update(value.view(-1).numpy().tobytes() if value.dtype.itemsize > 2 else repr(value.tolist()).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Round:
    """A round of pruning and fine-tuning.

    Attributes:
        number: from 0.
        asked: share of the original that was asked for.
        reached: share of the channels of all groups that may shrink, which are gone.
        n_params: parameters of the model when it is small.
        macs: its multiply-accumulate operations.
        score: the evaluator's; None without one.
    """

    number: int
    asked: float
    reached: float
    n_params: int
    macs: int
    score: float | None = None


class RoundsFolder:
    """Files of a pruning in rounds; of none where no folder is given.

    Args:
        folder: an existing folder, or None.
        settings: what a call must have in common with the one that wrote the files, as plain data.

    Attributes:
        rounds: the rounds that were written.
        best: number of the best of them; None without any.

    Raises:
        ArgumentError: the folder does not exist, or holds rounds of another call.
        CheckpointError: its record cannot be read.
    """

    def __init__(self, folder: str | PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else as_path(folder, "the path of a folder")
        self._settings = json.loads(json.dumps(settings, default=repr))
        self.rounds: tuple[Round, ...] = ()
        self.best: int | None = None
        if self._folder is None:
            return
        if not self._folder.is_dir():
            raise ArgumentError(f"folder={str(folder)!r} is no folder; create it, or leave folder= away.")
        record = self._folder / "rounds.json"
        if record.exists():
            self._read_record(record)

    def _read_record(self, record: Path) -> None:
        try:
            document = read_json(record, _MOST_BYTES)
            is_ours = document["format"] == _FORMAT and document["version"] == _VERSION
            rounds = tuple(Round(**one) for one in document["rounds"])
            best, settings = int(document["best"]), dict(document["settings"])
        except (UnreadableError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{str(record)!r} cannot be read: {first_line(error)}. Delete it to begin anew."
            ) from error
        if not is_ours or settings != self._settings:
            names = [name for name in self._settings if settings.get(name) != self._settings[name]] if is_ours else []
            raise ArgumentError(
                f"{str(record)!r} is of other rounds ({', '.join(names) or 'another format'} differs); give the model "
                f"and the settings that they began with, choose another folder, or delete it to begin anew."
            )
        self.rounds, self.best = rounds, best

    def write(self, rounds: Sequence[Round], best: int, plan: PruningPlan, state: Mapping[str, Tensor]) -> None:
        """Write what the last round left, and then the record of all of them.

        Raises:
            OutputError: the folder is not writable, or the disk is full; the record is as it was.
        """
        if self._folder is None:
            return
        number = len(rounds) - 1
        with atomic_path(self._folder / f"round-{number}.safetensors") as temporary:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
        plan.save(self._folder / f"round-{number}-plan.json")
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self._settings,
            "best": best,
            "rounds": [asdict(one) for one in rounds],
        }
        with atomic_path(self._folder / "rounds.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1))

    def read(self, number: int) -> tuple[PruningPlan, dict[str, Tensor]]:
        """Return the plan and the weights that a round left.

        Raises:
            CheckpointError: a file is missing or damaged.
            PlanError: the plan is.
        """
        assert self._folder is not None, "there are rounds only in a folder"
        file = self._folder / f"round-{number}.safetensors"
        try:
            check_tensors(file)
            return PruningPlan.load(self._folder / f"round-{number}-plan.json"), load_file(file)
        except (OSError, UnreadableError, SafetensorError) as error:
            raise CheckpointError(
                f"{str(file)!r} cannot be read: {first_line(error)}. Delete rounds.json beside it to begin anew."
            ) from error
