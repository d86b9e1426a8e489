"""Table and picture of the study of criteria."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.table import Table

mpl.use("Agg")
from matplotlib import pyplot as plt

Rows = Sequence[dict[str, Any]]

STAGES = {"after_cut": "after the cut", "compensated": "new statistics", "tuned": "after one epoch"}
TITLES = {"cnn": "Residual CNN", "vit": "Vision transformer"}
CONTROLS = ("dense", "random", "narrower, trained as long")


def table(model: str, rows: Rows) -> Table:
    """Mean test accuracy and standard deviation over seeds, by method and share of MACs left."""
    n_seeds = len({row["seed"] for row in rows if row["model"] == model})
    shown = Table("method", title=f"\n{TITLES[model]}: % of test digits right, {n_seeds} seeds", title_justify="left")
    headings, lines = cells(model, rows)
    for left, stage in headings:
        shown.add_column(f"{left:.0%} of MACs\n{STAGES[stage]}", justify="right")
    for line in lines:
        shown.add_row(*line)
    return shown


def markdown(model: str, rows: Rows) -> str:
    """The same as a table in Markdown."""
    headings, lines = cells(model, rows)
    names = [f"{left:.0%}: {STAGES[stage]}" for left, stage in headings]
    marks = ["|---" * (len(names) + 1) + "|"]
    return (
        "\n".join([f"| method | {' | '.join(names)} |", *marks, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"
    )


def cells(model: str, rows: Rows) -> tuple[list[tuple[float, str]], list[list[str]]]:
    """Headings (share of MACs left, stage), and for each method its name and a cell for each heading."""
    of = [row for row in rows if row["model"] == model]
    stages = [stage for stage in STAGES if any(row[stage] is not None for row in of if row["method"] != "dense")]
    lefts = sorted({row["left"] for row in of if row["left"] < 1}, reverse=True)
    lines = []
    for method in dict.fromkeys(row["method"] for row in of):
        here = [row for row in of if row["method"] == method]
        if method == "dense":
            found = [spread([row["after_cut"] for row in here])] + [""] * (len(lefts) * len(stages) - 1)
        else:
            found = [spread([row[stage] for row in here if row["left"] == left]) for left in lefts for stage in stages]
        lines.append([method, *found])
    return [(left, stage) for left in lefts for stage in stages], lines


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation in percent; a dash where there is none."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known) if len(known) > 1 else 0:.1f}"


def draw(path: Path, rows: Rows) -> None:
    """Accuracy of every method after the cut and after one epoch, one panel a model and share of MACs."""
    models = [name for name in TITLES if any(row["model"] == name for row in rows)]
    lefts = sorted({row["left"] for row in rows if row["left"] < 1}, reverse=True)
    order = {name: ranked(rows, name, min(lefts)) for name in models}
    heights = [1 + 0.24 * len(order[name]) for name in models]
    figure, panels = plt.subplots(
        len(models), len(lefts), figsize=(4.2 * len(lefts), sum(heights)), sharex=True, squeeze=False,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for line, name in zip(panels, models, strict=True):
        for axes, left in zip(line, lefts, strict=True):
            panel(axes, [row for row in rows if row["model"] == name], left, order[name])
            axes.set_title(f"{TITLES[name]}, {left:.0%} of the MACs left", fontsize=10)
        for axes in line[1:]:
            axes.set_yticklabels([])
    for axes in panels[-1]:
        axes.set_xlabel("% of test digits right")
    handles, labels = panels[0][0].get_legend_handles_labels()
    labels = [f"{label}, mean and standard deviation" if not i else label for i, label in enumerate(labels)]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ranked(rows: Rows, model: str, left: float) -> list[str]:
    """Methods by their mean accuracy after one epoch at a share of MACs, the best first."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["model"] == model and row["left"] == left and row["tuned"] is not None:
            found.setdefault(row["method"], []).append(row["tuned"])
    return sorted(found, key=lambda method: -statistics.mean(found[method]))


def panel(axes: Any, rows: Rows, left: float, order: Sequence[str]) -> None:
    """One panel: a line a method, a mark a stage."""
    marks = {"after_cut": ("o", "#9aa5b1"), "compensated": ("s", "#e8a33d"), "tuned": ("D", "#0b7285")}
    for stage, (mark, colour) in marks.items():
        xs, ys, errors = [], [], []
        for y, method in enumerate(order):
            values = [
                100 * row[stage]
                for row in rows
                if row["method"] == method and row["left"] == left and row[stage] is not None
            ]
            if values:
                xs.append(statistics.mean(values))
                ys.append(y)
                errors.append(statistics.stdev(values) if len(values) > 1 else 0)
        if xs:
            axes.errorbar(xs, ys, xerr=errors, fmt=mark, ms=4, lw=1, color=colour, label=STAGES[stage])
    dense = [100 * row["after_cut"] for row in rows if row["method"] == "dense"]
    axes.axvline(statistics.mean(dense), color="#495057", lw=0.8, ls=":")
    axes.set_yticks(range(len(order)), order, fontsize=8)
    for tick, method in zip(axes.get_yticklabels(), order, strict=True):
        tick.set_fontweight("bold" if method in CONTROLS or method.startswith("Torch-Pruning") else "normal")
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e9ecef")
    axes.spines[["top", "right"]].set_visible(False)
