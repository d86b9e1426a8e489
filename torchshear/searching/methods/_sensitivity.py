"""Sensitivity of groups, and the pruner that takes most from where the model is least sensitive."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from torchshear._arguments import check_number, quote
from torchshear.errors import ArgumentError, SearchError
from torchshear.searching._method import Outcome, Proposal, Proposals
from torchshear.searching._space import Floats, SearchSpace, WidthVector

SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of what is left of a group that are tried."""

_MOST: Final = 0.95  # of what is left of a group that may go in one round
_HALVINGS: Final = 40
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Rounds of an analysis of sensitivity and a cut in proportion to it.

    The analysis cuts each group alone by more and more of what is left of it, until the score has fallen by more than
    `threshold`. The largest share that it has not, the safe one, is how much the group gives in this round relative to
    the others; one factor makes that `step` of the dense model's budgeted cost. The last round is cut to the budget and
    not beyond. All groups are analysed side by side, so that several processes give the same result as one.

    NNI takes the first share that violates the threshold, and so at least a tenth of every group; analyses layers that
    are not configured; and cuts the last round whole, up to a step beyond the target. None of this is so here.

    Attributes:
        threshold: fall of the score that is still safe.
        step: share of the dense model's cost that one round removes.

    Reference: NNI `SensitivityPruner`; Han et al., NIPS 2015, arXiv:1506.02626, for the analysis.
    """

    default_trials: ClassVar[int | None] = None
    cuts_in_rounds: ClassVar[bool] = True
    threshold: float = 0.05
    step: float = 0.1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("threshold", "step"):
            check_number(name, getattr(self, name))
        if not (self.threshold > 0 and 0 < self.step <= 1):
            raise ArgumentError(
                f"Sensitivity has threshold={quote(self.threshold)} and step={quote(self.step)}; expected a fall of "
                f"the score above 0, and a share in (0, 1]."
            )

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose cuts of single groups, then of all, round after round.

        Raises:
            SearchError: no group can lose a tenth within the threshold.
        """
        widths = space.widest
        path: tuple[WidthVector, ...] = ()
        dense_load = space.budget.load(space.widest)
        (base,) = yield [Proposal(widths, label="dense", is_tuned=False)]
        number = 0
        while not space.budget.holds(widths):
            number += 1
            if base.has_failed:
                what = "the dense model" if number == 1 else f"the model of round {number - 1}"
                raise SearchError(f"{what} has no score, and every round is judged by the one before.")
            safe = yield from self._safe_shares(space, base, path, f"round {number}")
            load = max(1.0, space.budget.load(widths) - self.step * dense_load)
            cut = cut_in_proportion(space, widths, safe, load)
            if cut is None or cut == widths:
                raise SearchError(
                    f"round {number}: no group can lose a tenth of what is left of it without the score of "
                    f"{base.score:.6g} falling by more than threshold={self.threshold}, and the budget is not met. "
                    f"Raise the threshold."
                )
            (base,) = yield [Proposal(cut, path, f"round {number}: all")]
            widths, path = cut, (*path, cut)

    def _safe_shares(
        self, space: SearchSpace, base: Outcome, path: tuple[WidthVector, ...], label: str
    ) -> Generator[Sequence[Proposal], Sequence[Outcome], Floats]:
        """Return the largest safe share of each group, shape (n_groups,)."""
        safe = np.zeros(len(space.names))
        is_open = [len(allowed) > 1 for allowed in space.allowed]
        gone = space.shares_of(base.widths)
        for share in SHARES:
            tried = [number for number, one in enumerate(is_open) if one]
            proposals = []
            for number in tried:
                shares = gone.copy()
                shares[number] += (1 - shares[number]) * share
                widths = (*base.widths[:number], space.at(shares)[number], *base.widths[number + 1 :])
                said = f"{label}: {space.names[number]} by {share:.0%}"
                proposals.append(Proposal(widths, path, said, is_tuned=False))
            outcomes = (yield proposals) if proposals else []
            for number, outcome in zip(tried, outcomes, strict=True):
                is_open[number] = outcome.score >= base.score - self.threshold
                if is_open[number]:
                    safe[number] = share
        return safe


def cut_in_proportion(space: SearchSpace, widths: WidthVector, relative: Floats, load: float) -> WidthVector | None:
    """Cut all groups in proportion to relative shares of what is left of them, until a load is reached.

    Args:
        space: the widths that are searched.
        widths: the widths before.
        relative: relative share of what is left of each group, shape (n_groups,).
        load: by what factor the budget may be used.

    Returns:
        The widths, wider than the load asks where some group would lose more than 95 % of what is left of it; None if
        no share is above 0.
    """
    largest = float(relative.max(initial=0.0))
    if largest <= 0:
        return None
    gone = space.shares_of(widths)

    def at(factor: float) -> WidthVector:
        found = space.at(gone + (1 - gone) * relative * factor)
        return tuple(min(one, before) for one, before in zip(found, widths, strict=True))

    low, high = 0.0, _MOST / largest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_within = space.budget.load(at(middle)) <= load + _ROUNDING
        low, high = (low, middle) if is_within else (middle, high)
    return at(high)
