"""A family as a picture: measured latency against what is lost, and against scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torchshear._pictures import new_figure

_MEMBER: Final = "#1f4e79"
_DENSE: Final = "#b4552d"
_TRIED: Final = "#9db4cc"
_INK: Final = "#333333"
_FAINT: Final = "#777777"
_LINE: Final = "#d0d7de"


@dataclass(frozen=True, slots=True)
class Mark:
    """One model in the picture.

    Attributes:
        name: its name.
        ms: measured milliseconds.
        interval_ms: interval of their median.
        target_share: latency that was asked for, as a share of the dense model's; 1 for the dense model.
        loss: what its widths lose.
        score: what the user's function gives for it, or None.
    """

    name: str
    ms: float
    interval_ms: tuple[float, float]
    target_share: float
    loss: float
    score: float | None


def draw_family(title: str, marks: Sequence[Mark], tried: Sequence[tuple[float, float]]) -> Any:
    """Draw a family.

    Args:
        title: what stands above.
        marks: the dense model, then the members.
        tried: milliseconds and loss of other widths that were measured.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    has_scores = all(mark.score is not None for mark in marks)
    n_panels = 1 + has_scores
    figure = new_figure(1.2 + 4.6 * n_panels, 4.0)
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    _draw(panels[-1], marks, "loss of what was removed", lambda mark: mark.loss, 5)
    panels[-1].scatter(*zip(*tried, strict=True), s=14, color=_TRIED, zorder=1, label="other widths measured")
    if has_scores:
        _draw(panels[0], marks, "score, higher is better", lambda mark: float(mark.score or 0.0), -12)
    figure.suptitle(title, fontsize=11, color=_INK)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _draw(panel: Any, marks: Sequence[Mark], heading: str, value: Callable[[Mark], float], offset: int) -> None:
    """Draw one panel: milliseconds to the right, `value` upwards; names stand `offset` points above their marks."""
    dense = marks[0]
    by_time = sorted(marks, key=lambda mark: mark.ms)
    panel.plot([mark.ms for mark in by_time], [value(mark) for mark in by_time], color=_LINE, lw=1.5, zorder=1)
    for number, mark in enumerate(marks[1:]):
        label = "target" if number == 0 else None
        panel.axvline(mark.target_share * dense.ms, color=_FAINT, lw=0.7, ls=":", zorder=0, label=label)
    for members, color, shape, label in ((marks[1:], _MEMBER, "o", "members"), (marks[:1], _DENSE, "D", "dense")):
        ms, values = [mark.ms for mark in members], [value(mark) for mark in members]
        below = [max(mark.ms - mark.interval_ms[0], 0.0) for mark in members]
        above = [max(mark.interval_ms[1] - mark.ms, 0.0) for mark in members]
        panel.errorbar(ms, values, xerr=[below, above], fmt="none", ecolor=color, elinewidth=1, zorder=2)
        panel.scatter(ms, values, s=32, color=color, marker=shape, zorder=3, label=label)
    for mark in marks:
        at = (mark.ms, value(mark))
        panel.annotate(mark.name, at, (6, offset), textcoords="offset points", fontsize=8, color=_INK)
    panel.margins(y=0.12)
    panel.set_xlim(0, 1.2 * by_time[-1].ms)  # names stand to the right of marks
    panel.set_xlabel("milliseconds, measured", fontsize=8, color=_INK)
    panel.set_title(heading, fontsize=9, color=_INK)
    panel.tick_params(labelsize=8)
    panel.grid(color="#e6e6e6", lw=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
