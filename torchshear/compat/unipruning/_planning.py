"""UniPruning: runs of channels are ranked network-wide by how little they weigh beside the best run of their layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchshear._arguments import check_count, check_flag
from torchshear.calibration import Statistics
from torchshear.calibration._weight_source import WeightSource, weights_to_score
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._groups import check_groups
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners._planning import WholeSelection
from torchshear.pruners.criteria._unipruning import importance, makers, unipruning_scores
from torchshear.pruners.selection._budget import Budget
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._unit_selector import removal_order
from torchshear.pruners.selection._widths import Limits, allowed_widths

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_EPSILON = 1e-5  # beside the median of a run, as UniPruning has it


def plan_unipruning(
    groups: ChannelGroups,
    target_params: float,
    run: int = 32,
    min_width: int = 32,
    use_gamma: bool = True,
    weights: WeightSource = None,
) -> PruningPlan:
    """Plan as UniPruning does: remove the run that weighs least beside the best of its layer, until enough is gone.

    Of each layer l that makes the units of a group, importance is

        imp_lc = ||W_l[c]||_2 |gamma_c|

    gamma being the scale of the only batch norm that reads the layer's result, 1 if there is none. Sorted by it, the
    channels of a layer that are left form runs of G. In each round the layer with the largest

        median(last run) / (median(first run) + 1e-5)

    loses its first run, and with it all layers of its group; a run whose median is 0 goes at once. Rounds end as soon
    as no more than the target is left. No group falls below max(min_width, G), and every width that changes ends as a
    multiple of G: where it is none, the first run takes what is over.

    Args:
        groups: the analysed network.
        target_params: parameters that may be left: a share of the dense model's in (0, 1), or a number.
        run: channels that go together, G; `pruning_step` in configurations of UniPruning.
        min_width: channels that a layer keeps at least; `filter_lower_threshold` there.
        use_gamma: whether norms of channels are multiplied by the scales of the batch norms behind them.
        weights: see `torchshear.plan`.

    Returns:
        The plan; its request tells the achieved share beside the one that was asked.

    Raises:
        ArgumentError: a number is outside of what it may be, or the dense model keeps within the target.
        PlanError: the target cannot be reached; the message has the best that can.
        WeightError: weights cannot be scored.

    Reference: UniPruning of MindSpore Golden Stick, as its documentation defines it; its code never reads gamma
    (`use_gamma=False`), means the share that stays by `target_sparsity`, and takes removed runs again where a target is
    out of reach.
    """
    check_flag("use_gamma", use_gamma)
    asked = Request(criterion="unipruning", target_params=target_params, min_width=min_width)
    return NetworkRuns(run=run, min_width=min_width, use_gamma=use_gamma).plan(groups, asked, weights, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRuns(WholeSelection):
    """Criterion that chooses as UniPruning does, see `plan_unipruning`.

    Attributes:
        run: channels that go together.
        min_width: channels that a layer keeps at least.
        use_gamma: whether norms of channels are multiplied by the scales of the batch norms behind them.
    """

    run: int = 32
    min_width: int = 32
    use_gamma: bool = True

    @property
    def __name__(self) -> str:
        """The settings, for plans and states."""
        return f"unipruning(run={self.run}, min_width={self.min_width}, use_gamma={self.use_gamma})"

    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
        """Score single units, as the criterion "unipruning" does."""
        return unipruning_scores(group, weights, statistics)

    def plan(
        self, groups: ChannelGroups, request: Request, weights: WeightSource, gone: Mapping[str, Indices]
    ) -> PruningPlan:
        """Plan until no more parameters are left than the request's target."""
        if request.target_params is None:
            raise ArgumentError("UniPruning removes runs until a target of parameters holds; give target_params=.")
        return _plan_runs(groups, request, self, weights, gone)


def _plan_runs(
    groups: ChannelGroups, request: Request, settings: NetworkRuns, weights: WeightSource, gone: Mapping[str, Indices]
) -> PruningPlan:
    """Plan by runs; see `plan_unipruning` for what is raised."""
    check_groups(groups)
    run, min_width, use_gamma, target_params = (
        settings.run,
        settings.min_width,
        settings.use_gamma,
        request.target_params,
    )
    alignment = _runs_of(run)
    dense = dense_cost(groups.graph)
    budget = Budget.of(dense, request)
    if budget.holds(dense):
        raise ArgumentError(f"target_params={target_params}: the dense model has {dense.n_params:,}. Ask for less.")
    limits = Limits(max(min_width, run))
    runs = [_Runs(group, allowed_widths(group, alignment, _in_units(group, limits))) for group in groups.prunable]
    runs = [one for one in runs if one.makers and one.can_lose]
    cost = WidthCost(groups)
    smallest = cost(_widths(groups, {one.group.name: int(one.widths[-1]) for one in runs}))
    if not budget.holds(smallest):
        raise PlanError(
            f"target_params={target_params} cannot be reached with run={run} and min_width={min_width}: at least "
            f"{smallest.n_params / dense.n_params:.4f} of {dense.n_params:,} parameters stay, with {len(runs)} of "
            f"{len(groups)} groups at their narrowest. Raise it, or lower the other two."
        )
    for one in runs:
        one.kept = np.setdiff1d(one.kept, gone.get(one.group.name, ()))
    _score(runs, weights_to_score(groups, weights), use_gamma)
    while not budget.holds(cost(_widths(groups, {one.group.name: len(one.kept) for one in runs}))):
        max((one for one in runs if one.can_lose), key=lambda one: one.ratio).lose()
    kept = {one.group.name: one.kept for one in runs if len(one.kept) < one.group.width}
    said = request.to_json() | {"run": run, "use_gamma": use_gamma}
    notes = {group.name: f"stays whole: {_why_whole(group, run, limits)}" for group in groups if group.name not in kept}
    return make_plan(Cut(groups, kept), kept, said, notes)


def _runs_of(run: int) -> Alignment:
    check_count("run", run)
    return Alignment(run, run, f"runs of {run}")


def _in_units(group: ChannelGroup, limits: Limits) -> Limits:
    """Limits in units, of limits in channels: a unit may stand for several of them."""
    return Limits(-(-limits.min_width // group.multiplicity))


def _widths(groups: ChannelGroups, kept: Mapping[str, int]) -> Indices:
    return np.array([kept.get(group.name, group.width) for group in groups], np.int64)


def _why_whole(group: ChannelGroup, run: int, limits: Limits) -> str:
    if group.reason:
        return group.reason
    if not makers(group):
        return "no convolution or linear layer makes its units"
    if len(allowed_widths(group, _runs_of(run), _in_units(group, limits))) == 1:
        return f"of {group.width} units at least {limits.min_width} channels stay, in runs of {run}"
    return "its runs weigh more than those of others"


def _score(runs: Sequence["_Runs"], weights: Mapping[str, Tensor], use_gamma: bool) -> None:
    """Give runs the importances of their channels in each layer."""
    for one in runs:
        for member in one.makers:
            one.add(importance(member, one.group.width, weights, use_gamma).numpy())


class _Runs:
    """The channels of one group that are left, in runs."""

    def __init__(self, group: ChannelGroup, allowed: Indices) -> None:
        self.group = group
        self.makers = makers(group)
        self.widths = allowed[::-1]
        self.kept: Indices = np.arange(group.width)
        self.ratio = -np.inf
        self._importances: list[Floats] = []
        self._first: Indices = self.kept

    @property
    def can_lose(self) -> bool:
        """True if another run may go."""
        return len(self.kept) > int(self.widths[-1])

    def add(self, importance: Floats) -> None:
        """Take importances of the units in another layer."""
        self._importances.append(importance)
        self._weigh()

    def lose(self) -> None:
        """Remove the first run of the layer that decides."""
        self.kept = np.setdiff1d(self.kept, self._first)
        self._weigh()

    def _weigh(self) -> None:
        """Find the layer in which the first run weighs least beside the last."""
        self.ratio = -np.inf
        if not self.can_lose:
            return
        size = len(self.kept) - int(self.widths[self.widths < len(self.kept)].max())
        length = int(np.max(-np.diff(self.widths)))
        for weighed in self._importances:
            order = removal_order(self.group, weighed, self.kept)
            low = float(np.median(weighed[order[:size]]))
            ratio = np.inf if low == 0 else float(np.median(weighed[order[-length:]])) / (low + _EPSILON)
            if ratio > self.ratio:
                self.ratio, self._first = ratio, order[:size]
