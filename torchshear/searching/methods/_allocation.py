"""The exact allocation of widths by scores of units: the baseline of all searches, in one trial."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from torchshear.pruners.allocation._solve import allocate
from torchshear.searching._method import Proposal, Proposals
from torchshear.searching._space import SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Milp:
    """Widths that lose least by the scores of the criterion, solved exactly as a mixed integer program: one trial.

    It evaluates nothing on the way. What a search finds with many evaluations has to beat it.
    """

    default_trials: ClassVar[int | None] = None

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose the widths that the solver gives."""
        levels = space.levels()
        found = allocate(levels, space.budget.cost_budgets(levels))
        yield [Proposal(tuple(found.widths[name] for name in space.names), label="solved by scores")]
