"""Result of one criterion in a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

_SAME: Final = 0.05  # shares of MACs that differ by less are the same to whoever compares scores


@dataclass(frozen=True, slots=True)
class Row:
    """One criterion at one budget.

    Attributes:
        criterion: name of the criterion, or of the control: "random" or "uniform".
        budget: what was to be left, in words.
        is_control: whether it is a control.
        before: score of the dense model.
        scores: scores after the cut; one, or for random channels one a seed. Empty where there is a reason.
        compensated: the same after the compensation; empty without one.
        macs_share: MACs left, as a share of the dense model's; the mean over seeds. None where there is a reason.
        params_share: parameters left, likewise.
        seconds: time to score, plan, cut and prove, without that of collecting statistics; the mean over seeds.
        note: a remark for the reader, or "".
        reason: why there are no scores, or "".
    """

    criterion: str
    budget: str
    is_control: bool
    before: float
    scores: tuple[float, ...] = ()
    compensated: tuple[float, ...] = ()
    macs_share: float | None = None
    params_share: float | None = None
    seconds: float | None = None
    note: str = ""
    reason: str = ""

    @property
    def final(self) -> tuple[float, ...]:
        """Scores after the last step: the cut, or the compensation."""
        return self.compensated or self.scores

    @property
    def score(self) -> float | None:
        """Mean of the scores after the last step."""
        return fmean(self.final) if self.final else None


def of_other_size(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows that keep another share of the MACs than the uniform control, where a ratio and no target was asked for."""
    uniform = next((row.macs_share for row in rows if row.criterion == "uniform"), None)
    return tuple(
        row
        for row in rows
        if uniform is not None
        and row.macs_share is not None
        and row.budget.startswith("ratio")
        and abs(row.macs_share - uniform) > _SAME
    )
