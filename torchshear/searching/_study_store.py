"""Scores of proposals in a study of Optuna, to which any number of processes contribute.

Every process runs the same method with the same seed and sees the same outcomes, so that all agree on what number
stands for which proposal. A process that needs a score nobody works at writes a running trial with that number. Two
processes may do so at once: the storage puts their trials in an order, the earlier one counts, and the later is dropped
before any work is done. Optuna's queue of waiting trials would not do: of SQLite two processes may take the same one.
Who works at a trial says so every few seconds; a trial whose worker has fallen silent or is gone is given up, and
written down anew.
"""

import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from torchshear.searching._candidate import Score
from torchshear.searching._engine import MakeScore, Numbered
from torchshear.searching._method import Proposal
from torchshear.searching._storage import damage_error, import_optuna, quiet_optuna

BEAT_SECONDS: Final = 5.0  # between two signs of life
GRACE_SECONDS: Final = 60.0  # without one, after which a trial is given up
_POLL_SECONDS: Final = (0.05, 1.0)  # at first, and at most, while others work
_MOST_TRACE: Final = 4000  # characters of a traceback that are kept


@dataclass(slots=True)
class StudyStore:
    """Scores in a study.

    Attributes:
        study: the study.
        shown: the storage as the user named it, for messages.
        n_scored: how many trials this process has scored.
    """

    study: Any
    shown: object
    n_scored: int = 0
    _optuna: Any = field(default_factory=import_optuna)
    _worker: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}")
    _seen: dict[int, tuple[Any, float]] = field(default_factory=dict)

    def run(self, batch: Sequence[Numbered], score: MakeScore) -> Iterator[Score]:
        """Yield the score of each proposal in order: of another process, of an earlier run, or made here.

        Raises:
            SearchError: the storage is damaged.
        """
        for number, _ in batch:
            yield self._score_of(number, dict(batch), score)

    def forget_failures(self) -> None:
        """Have trials that failed tried again, if they have stopped the search: three of them in a row."""
        with quiet_optuna(self._optuna), self._damage_is_ours():
            by_step = {
                step: next((one for one in some if self._outcome(one)), None) for step, some in self._of_steps().items()
            }
            failed = {step: one.number for step, one in by_step.items() if one is not None and one.value is None}
            if any({step, step + 1, step + 2} <= failed.keys() for step in failed):
                ignored = {*self.study.user_attrs.get("ignored", ()), *failed.values()}
                self.study.set_user_attr("ignored", sorted(ignored))

    def _score_of(self, number: int, batch: dict[int, Proposal], score: MakeScore) -> Score:
        wait = _POLL_SECONDS[0]
        while True:
            with quiet_optuna(self._optuna), self._damage_is_ours():
                trials = self._of_steps()
                self._give_up_silent(trials)
                known = next(iter(self._known(trials.get(number, ()))), None)
                if known is not None:
                    return known
                taken = self._take(trials, batch)
            if taken is not None:
                self._work_at(*taken, score)
                wait = _POLL_SECONDS[0]
                continue
            time.sleep(wait)
            wait = min(wait * 1.5, _POLL_SECONDS[1])

    def _trials(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False))

    def _of_steps(self) -> dict[int, list[Any]]:
        """Return the trials of each number in the search, in the order in which they were written down."""
        ignored = set(self.study.user_attrs.get("ignored", ()))
        found: dict[int, list[Any]] = {}
        for trial in self._trials():
            if "step" in trial.user_attrs and trial.number not in ignored:
                found.setdefault(trial.user_attrs["step"], []).append(trial)
        return found

    def _outcome(self, trial: Any) -> dict[str, Any] | None:
        """Return what was written of a finished trial; None for one that was given up or dropped.

        What is written before the state changes counts only with it: one that failed has an error.
        """
        found: dict[str, Any] | None = trial.user_attrs.get("outcome")
        is_told = trial.state.is_finished() and found is not None and (trial.value is not None or found["error"])
        return found if is_told else None

    def _known(self, trials: Sequence[Any]) -> Iterator[Score]:
        for trial in trials:
            outcome = self._outcome(trial)
            if outcome is not None:
                is_stopped = outcome.get("is_stopped", False)
                yield Score(
                    trial.value, outcome["seconds"], outcome["error"], trace=outcome["trace"], is_stopped=is_stopped
                )

    def _is_live(self, trial: Any) -> bool:
        return not trial.state.is_finished() or self._outcome(trial) is not None

    def _give_up_silent(self, trials: dict[int, list[Any]]) -> None:
        """Give up trials whose worker is gone, or has given no sign of life for too long by this process's clock."""
        running = self._optuna.trial.TrialState.RUNNING
        now = time.monotonic()
        for trial in (one for some in trials.values() for one in some if one.state == running):
            beat = (trial.user_attrs.get("worker"), trial.user_attrs.get("beat"))
            if self._seen.get(trial.number, (None, 0.0))[0] != beat:
                self._seen[trial.number] = (beat, now)
            is_silent = now - self._seen[trial.number][1] > GRACE_SECONDS
            if is_silent or _is_gone(trial.user_attrs.get("worker")):
                self._finish(trial.number)

    def _take(self, trials: dict[int, list[Any]], batch: dict[int, Proposal]) -> tuple[Any, Proposal] | None:
        """Write down a running trial for something of the batch that nobody works at; None if there is nothing.

        Also None if another process was earlier.
        """
        free = [number for number in batch if not any(map(self._is_live, trials.get(number, ())))]
        if not free:
            return None
        number, proposal, claim = free[0], batch[free[0]], uuid.uuid4().hex
        said = {
            "step": number,
            "widths": list(proposal.widths),
            "path": [list(widths) for widths in proposal.path],
            "label": proposal.label,
            "is_tuned": proposal.is_tuned,
            "worker": self._worker,
            "claim": claim,
        }
        trials_of_optuna = self._optuna.trial
        self.study.add_trial(trials_of_optuna.create_trial(state=trials_of_optuna.TrialState.RUNNING, user_attrs=said))
        rivals = self._of_steps()[number]
        own = next(one for one in rivals if one.user_attrs["claim"] == claim)
        if any(self._is_live(one) for one in rivals if one.number < own.number):
            self._finish(own.number)
            return None
        return trials_of_optuna.Trial(self.study, own._trial_id), proposal

    def _work_at(self, trial: Any, proposal: Proposal, score: MakeScore) -> None:
        """Score a proposal and write down what it was found to be; give it up if this process is to stop."""

        def is_hopeless(number: int, value: float) -> bool:
            finished = self._optuna.exceptions.UpdateFinishedTrialError  # others gave it up in the meantime
            with quiet_optuna(self._optuna), self._damage_is_ours(), suppress(finished):
                trial.report(value, number)
                return bool(trial.should_prune())
            return False

        try:
            with self._signs_of_life(trial):
                found = score(proposal, is_hopeless)
        except BaseException:
            with quiet_optuna(self._optuna):
                self._finish(trial.number)
            raise
        trace = "" if found.cause is None else "".join(traceback.format_exception(found.cause))[-_MOST_TRACE:]
        with quiet_optuna(self._optuna), self._damage_is_ours():
            outcome = {"seconds": found.seconds, "error": found.error, "trace": trace, "worker": self._worker}
            outcome |= {"is_stopped": found.is_stopped}
            with suppress(self._optuna.exceptions.UpdateFinishedTrialError):  # others gave it up in the meantime
                trial.set_user_attr("outcome", outcome)
                self.n_scored += self._finish(trial.number, found.value, found.is_stopped)

    def _finish(self, number: int, value: float | None = None, is_stopped: bool = False) -> bool:
        """Finish a trial unless another process has; return whether it was this one."""
        states = self._optuna.trial.TrialState
        state = states.PRUNED if is_stopped else states.FAIL if value is None else states.COMPLETE
        try:
            self.study.tell(number, None if is_stopped else value, state=state)
        except (ValueError, self._optuna.exceptions.UpdateFinishedTrialError):
            return False
        return True

    @contextmanager
    def _signs_of_life(self, trial: Any) -> Iterator[None]:
        """Count up an attribute of a trial every few seconds."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(BEAT_SECONDS):
                count += 1
                with suppress(Exception):  # the trial was given up, or the storage is away for a moment
                    trial.set_user_attr("beat", count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def _damage_is_ours(self) -> Iterator[None]:
        """Turn errors of a storage that cannot be read into ours."""
        try:
            yield
        except (KeyError, AssertionError) as error:
            raise damage_error(self.shown, error) from error
        except ValueError as error:  # of JSON, too
            raise damage_error(self.shown, error) from error


def _is_gone(worker: object) -> bool:
    """Return True for a worker of this machine whose process has ended."""
    host, _, rest = str(worker).rpartition(":")[0].rpartition(":")
    if host != socket.gethostname() or not rest.isdigit():
        return False
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
