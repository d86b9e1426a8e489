"""Scores of several criteria as a picture."""

import os
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from torchshear._pictures import new_figure, picture_path, save_picture
from torchshear.comparison._row import Row, of_other_size

_CUT: Final = "#9db4cc"
_FINAL: Final = "#1f4e79"
_CONTROL: Final = "#b4552d"
_INK: Final = "#333333"
_FAINT: Final = "#777777"
_LINK: Final = "#d0d7de"


def draw_panels(
    title: str, before: float, panels: Mapping[str, Sequence[Row]], path: str | os.PathLike[str], compensation: str
) -> None:
    """Draw scores; `Comparison.draw` says how.

    Args:
        title: what stands above.
        before: score of the dense model.
        panels: budget -> its rows; lines stand in the order of the first.
        path: the file to write.
        compensation: the compensation after which models were scored once more, or "none".

    Raises:
        ArgumentError: matplotlib is not installed, or `path` is no path or ends otherwise than it may.
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    place = picture_path(path)
    save_picture(_figure(title, before, panels, compensation), place)


def _figure(title: str, before: float, panels: Mapping[str, Sequence[Row]], compensation: str) -> Any:
    first = next(iter(panels.values()))
    names = [row.criterion for row in first]
    width, height = max(2.6 + 3.2 * len(panels), 6.4), 1.7 + 0.27 * len(names)
    figure = new_figure(width, height)
    axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
    for ax, (budget, rows) in zip(axes, panels.items(), strict=True):
        by_name = {row.criterion: row for row in rows}
        _draw(ax, budget, before, [by_name[name] for name in names], f"after {compensation}")
    axes[0].set_yticks(
        range(len(names)), [f"{row.criterion} (control)" if row.is_control else row.criterion for row in first]
    )
    axes[0].invert_yaxis()
    for label, row in zip(axes[0].get_yticklabels(), first, strict=True):
        label.set_color(_CONTROL if row.is_control else _INK)
    figure.suptitle(title, fontsize=11, color=_INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _draw(panel: Any, budget: str, before: float, rows: Sequence[Row], last: str) -> None:
    """One budget; `last` names the scores after the compensation."""
    random = next((row.final for row in rows if row.criterion == "random"), ())
    if random:
        panel.axvspan(min(random), max(random), color=_CONTROL, alpha=0.15, lw=0, label="range of random")
    panel.axvline(before, color=_INK, lw=1, ls="--", label="before the cut")
    small: dict[str, Any] = {"va": "center", "fontsize": 7, "color": _FAINT}
    for place, row in enumerate(rows):
        if row.reason:
            panel.annotate("not scored", (0.02, place), xycoords=("axes fraction", "data"), **small)
        elif row.compensated:
            panel.plot([fmean(row.scores), fmean(row.compensated)], [place] * 2, color=_LINK, lw=1.5, zorder=1)
    is_compensated = any(row.compensated for row in rows)
    _marks(panel, [row.scores for row in rows], rows, _CUT if is_compensated else _FINAL, "after the cut")
    if is_compensated:
        _marks(panel, [row.compensated for row in rows], rows, _FINAL, last)
    for row in of_other_size(rows):
        text, mark = f"{row.macs_share:.0%} of the MACs", (row.score, rows.index(row))
        panel.annotate(text, mark, (-6, 0), textcoords="offset points", ha="right", **small)
    panel.set_title(budget, fontsize=9, color=_INK)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(labelsize=8)
    panel.grid(axis="x", color="#e6e6e6", lw=0.6)
    panel.set_axisbelow(True)
    panel.set_ylim(-0.7, len(rows) - 0.3)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _marks(panel: Any, found: Sequence[tuple[float, ...]], rows: Sequence[Row], color: str, label: str) -> None:
    """Scores of one step; those of several seeds as their mean with whiskers over all."""
    scores = {place: one for place, one in enumerate(found) if one}
    means = [fmean(one) for one in scores.values()]
    edges = [_CONTROL if rows[place].is_control else color for place in scores]
    low = [mean - min(one) for mean, one in zip(means, scores.values(), strict=True)]
    high = [max(one) - mean for mean, one in zip(means, scores.values(), strict=True)]
    panel.errorbar(means, list(scores), xerr=[low, high], fmt="none", ecolor=_CONTROL, elinewidth=1.2, zorder=2)
    panel.scatter(means, list(scores), s=30, color=color, edgecolors=edges, linewidths=1.2, zorder=3, label=label)
