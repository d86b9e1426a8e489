"""NetAdapt: in each round the one group whose cut costs the model least for what it saves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np

from torchshear._arguments import check_count, check_number, check_one_of, quote
from torchshear.errors import ArgumentError, SearchError
from torchshear.searching._method import Outcome, Proposal, Proposals
from torchshear.searching._space import SearchSpace, WidthVector

_SCORE_ROUNDING: Final = 1e-6  # of the released code, in (score lost + 1e-6) / (resource saved + 1e-5)
_LOAD_ROUNDING: Final = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class NetAdapt:
    """Rounds in which every group alone is cut to the round's budget, and the best of these cuts is kept.

    Round i may use the load that is left of the round before, less step * decay^(i - 1) of the dense model's. For each
    group the widest width that meets this is proposed, with the model fine-tuned shortly if `finetune` is given. Kept
    is the one that loses least score for the resource that it saves, or, by rule "score", the best score. If no group
    can meet the round's budget alone, the step is halved, and then the round is tried again. The candidates of a round
    are proposed together, so that several processes give the same result as one.

    NNI counts weights of layers in the order of their registration, books what was asked for and not what was saved,
    and never ends where no layer can meet a round's budget. None of this is so here.

    Attributes:
        step: share of the dense model's budgeted cost that the first round removes.
        decay: factor of the step from round to round.
        rule: "ratio" of score lost to resource saved, as in the released code; or best "score", as in the paper.
        halvings: how often the step may be halved before the search ends.

    Reference: Yang et al., NetAdapt, ECCV 2018, arXiv:1804.03230.
    """

    default_trials: ClassVar[int | None] = None
    cuts_in_rounds: ClassVar[bool] = True
    step: float = 0.05
    decay: float = 0.96
    rule: Literal["ratio", "score"] = "ratio"
    halvings: int = 8

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("step", "decay"):
            check_number(name, getattr(self, name))
        if not (0 < self.step < 1 and 0 < self.decay <= 1):
            raise ArgumentError(
                f"NetAdapt has step={quote(self.step)} and decay={quote(self.decay)}; expected a step between 0 and 1, "
                f"and a decay above 0 and at most 1."
            )
        check_one_of("rule", self.rule, ("ratio", "score"))
        check_count("halvings", self.halvings, least=0)

    def reduction(self, rounds: float) -> float:
        """Return the share of the dense model's cost that is gone after some rounds; inf for all there can be."""
        if self.decay == 1:
            return self.step * rounds
        return self.step * (1 - float(self.decay**rounds)) / (1 - self.decay)

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose the candidates of one round after another.

        Raises:
            ArgumentError: the steps add up to less than the budget asks for; said before the first trial.
            SearchError: no group can be cut any further within a round.
        """
        dense_load = space.budget.load(space.widest)
        needed = 1 - 1 / dense_load
        if needed > self.reduction(math.inf):
            least = needed * (1 - self.decay)
            raise ArgumentError(
                f"NetAdapt with step={self.step} and decay={self.decay} removes at most {self.reduction(math.inf):.1%} "
                f"of the cost, and the budget asks for {needed:.1%}. Use a step above {least:.3g}, or a larger decay."
            )
        widths, factor, number = space.widest, 1.0, 0
        path: tuple[WidthVector, ...] = ()
        (base,) = yield [Proposal(widths, label="dense", is_tuned=False)]
        if base.has_failed:
            raise SearchError("the dense model has no score, and every round is judged by the one before.")
        while not space.budget.holds(widths):
            load = max(1.0, base.load - dense_load * self.step * self.decay**number * factor)
            found = [space.narrowed(widths, one, load) for one in range(len(space.names))]
            able = [one for one in found if one is not None and space.budget.load(one) <= load + 1e-9]
            if not able:
                factor /= 2
                if factor < 0.5**self.halvings:
                    raise SearchError(
                        f"round {number + 1}: no group alone can bring the cost down by {self.step * factor:.2g} of "
                        f"the dense model's; {base.load:.3g} times the budget is used. Use another method, or let "
                        f"groups shrink further."
                    )
                continue
            number += 1
            outcomes = yield [Proposal(one, path, self._label(space, widths, one, number)) for one in able]
            base = self._best(base, outcomes, number)
            widths, path = base.widths, (*path, base.widths)

    def _label(self, space: SearchSpace, before: WidthVector, after: WidthVector, number: int) -> str:
        changed = next(name for name, old, new in zip(space.names, before, after, strict=True) if old != new)
        return f"round {number}: {changed}"

    def _best(self, base: Outcome, outcomes: Sequence[Outcome], number: int) -> Outcome:
        """Choose among the candidates of a round; of equal ones the first."""
        if all(one.has_failed for one in outcomes):
            raise SearchError(f"round {number}: no candidate could be scored.")
        if self.rule == "score":
            return max(outcomes, key=lambda one: one.score)
        return min(outcomes, key=lambda one: netadapt_cost(base, one))


def netadapt_cost(base: Outcome, outcome: Outcome) -> float:
    """Return the score that a candidate loses for the resource that it saves; the least is the best."""
    if outcome.has_failed:
        return math.inf
    return (base.score - outcome.score + _SCORE_ROUNDING) / (base.load - outcome.load + _LOAD_ROUNDING)
