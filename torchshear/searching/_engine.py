"""The engine of a search: asks a method for proposals, has them scored once each, and keeps the record."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from torchshear.calibration._progress import Report
from torchshear.errors import SearchError
from torchshear.searching._candidate import Candidate, CandidateMaker, Score
from torchshear.searching._early_stopping import IsHopeless
from torchshear.searching._method import Outcome, Proposal, SearchMethod
from torchshear.searching._space import WidthVector
from torchshear.searching._trial import SearchTrial

MOST_FAILURES: Final = 3  # in a row
_MOST_REPEATS: Final = 100  # batches in a row without a proposal that is new
Key = tuple[WidthVector, tuple[WidthVector, ...], bool]
Numbered = tuple[int, Proposal]
MakeScore = Callable[[Proposal, IsHopeless | None], Score]


class TrialStore(Protocol):
    """Keeper of the scores of proposals.

    Attributes:
        n_scored: how many of them this process has made.
    """

    n_scored: int

    def run(self, batch: Sequence[Numbered], score: MakeScore) -> Iterator[Score]:
        """Yield the score of each numbered proposal in order, known or scored now, by whichever process."""


class MemoryStore:
    """Scores of one process, which are gone with it."""

    n_scored = 0

    def run(self, batch: Sequence[Numbered], score: MakeScore) -> Iterator[Score]:
        """Score one proposal after another."""
        for _, proposal in batch:
            self.n_scored += 1
            yield score(proposal, None)


@dataclass(slots=True)
class Search:
    """One search while it runs.

    Attributes:
        maker: makes and scores candidates.
        store: keeps scores.
        most_trials: how many candidates may be evaluated; None for as many as the method wants.
        report: told what is done.
        trials: what was evaluated so far.
        best: the best candidate that this process made.
        notes: remarks for the result.
    """

    maker: CandidateMaker
    store: TrialStore
    most_trials: int | None
    report: Report
    trials: list[SearchTrial] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)
    n_reused: int = 0
    best: Candidate | None = None
    notes: list[str] = field(default_factory=list)
    _known: dict[Key, Outcome] = field(default_factory=dict)
    _failed: list[Score] = field(default_factory=list)
    _best_score: float = -math.inf

    def run(self, method: SearchMethod, seed: int) -> None:
        """Evaluate what a method proposes until it ends, or as many trials as there may be; Ctrl-C ends it as well.

        Raises:
            SearchError: three candidates in a row have no score, or the method cannot go on.
            KeyboardInterrupt: it was interrupted before any trial within the budget.
        """
        proposals = method.propose(self.maker.space, np.random.default_rng(seed))
        n_repeats = 0
        try:
            batch = next(proposals)
            while n_repeats < _MOST_REPEATS:
                n_before = len(self.trials)
                outcomes = self._answer(batch)
                if outcomes is None:
                    return
                n_repeats = 0 if len(self.trials) > n_before else n_repeats + 1
                batch = proposals.send(outcomes)
            self.notes.append("The method ended since it only proposed widths that it had proposed before.")
        except StopIteration:
            return
        except SearchError as error:
            if not self._failed or error.__cause__ is not None:
                raise
            raise SearchError(f"{error} The last failure: {self._failed[-1].error}.") from self._failed[-1].cause
        except KeyboardInterrupt:
            if self.best_trial is None:
                raise
            self.notes.append("Interrupted; the best of the trials before that is returned.")

    @property
    def best_trial(self) -> SearchTrial | None:
        """The trial within the budget with the best score; of equal ones the first; None if there is none."""
        within = [one for one in self.trials if one.is_within and one.state == "complete"]
        return max(within, key=lambda one: one.score or 0.0, default=None)

    def _answer(self, batch: Sequence[Proposal]) -> list[Outcome] | None:
        """Return the outcomes of proposals; None if no more trials may be made, and the batch is not complete."""
        new: dict[Key, Proposal] = {}
        for proposal in batch:
            key = self._key(proposal)
            if key in self._known or key in new:
                self.n_reused += 1
            else:
                new[key] = proposal
        first = len(self.trials)
        room = len(new) if self.most_trials is None else max(self.most_trials - first, 0)
        chosen = list(new.values())[:room]
        numbered = list(enumerate(chosen, first))
        for (number, proposal), score in zip(numbered, self.store.run(numbered, self._score), strict=True):
            self._note(number, proposal, score)
        if room < len(new) or (self.most_trials is not None and len(self.trials) >= self.most_trials):
            return None
        return [self._known[self._key(proposal)] for proposal in batch]

    def _key(self, proposal: Proposal) -> Key:
        """Return what tells candidates apart: the widths, and with fine-tuning where they start from."""
        if self.maker.finetune is None:
            return proposal.widths, (), False
        return proposal.widths, proposal.path, proposal.is_tuned

    def _score(self, proposal: Proposal, is_hopeless: IsHopeless | None) -> Score:
        """Score a candidate, and hold on to the best one within the budget."""
        score, candidate = self.maker.score(proposal, is_hopeless)
        is_better = candidate is not None and score.value is not None and score.value > self._best_score
        if is_better and self.maker.space.budget.holds(proposal.widths):
            assert score.value is not None
            self._best_score, self.best = score.value, candidate
        return score

    def _note(self, number: int, proposal: Proposal, score: Score) -> None:
        """Write down a trial.

        Raises:
            SearchError: it is the third in a row without a score.
        """
        space = self.maker.space
        load = space.budget.load(proposal.widths)
        value = -math.inf if score.value is None or score.is_stopped else score.value
        self._known[self._key(proposal)] = Outcome(proposal.widths, value, load)
        self.proposals.append(proposal)
        self.trials.append(
            SearchTrial(
                number=number,
                widths=dict(zip(space.names, proposal.widths, strict=True)),
                score=score.value,
                budget={str(name): share for name, share in space.budget.shares(proposal.widths).items()},
                is_within=space.budget.holds(proposal.widths),
                seconds=score.seconds,
                state="failed" if score.value is None else "stopped" if score.is_stopped else "complete",
                label=proposal.label,
                error=score.error,
            )
        )
        best = self.best_trial
        done = len(self.trials)
        self.report(done, self.most_trials or done, "searching" if best is None else f"best {best.score:.5g}")
        self._failed = [*self._failed, score] if score.value is None else []
        if len(self._failed) >= MOST_FAILURES:
            first = self._failed[0]
            cause = first.cause
            if cause is None:
                cause = ValueError(first.error)
                cause.add_note(f"in another process:\n{first.trace}" if first.trace else "without an exception")
            raise SearchError(
                f"{MOST_FAILURES} candidates in a row have no score, trials {number - MOST_FAILURES + 1} to {number}; "
                f"the first: {first.error}. See its traceback above."
            ) from cause
