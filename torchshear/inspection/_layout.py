"""Layered drawing of a graph: rows by longest path, few crossings, and rows folded into columns to fill a screen.

After Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System Structures", IEEE
Transactions on Systems, Man and Cybernetics 11(2), 1981: layers, then order in layers by barycentres, then coordinates.
Networks are long and thin, so the rows are folded like the columns of a newspaper. Edges that skip rows get lanes
beside their column instead of dummy nodes: one a source, so that a value that is read a hundred times is one line with
a hundred branches.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torchshear.inspection._routes import CARD_GAP, LANE, ROW_GAP, Frame, Point, assign_lanes, route_edges

_MAX_IN_ROW = 4
_ASPECT = 0.9  # without the lanes, which add to the width
_SHORT = 600
_SWEEPS = 6


@dataclass(frozen=True, slots=True)
class Layout:
    """Places of all cards and edges, in pixels at scale 1.

    Attributes:
        places: x of each card's middle and y of its top.
        routes: corners of the line of each edge, source first.
        width: extent from 0.
        height: extent from 0.
    """

    places: tuple[Point, ...]
    routes: dict[tuple[int, int], tuple[Point, ...]]
    width: float
    height: float


def lay_out(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]], modules: Sequence[str]) -> Layout:
    """Place cards so that every edge runs downwards, or on to the next column.

    Args:
        sizes: width and height of each card.
        edges: (source, target) with source before target.
        modules: qualified name of each card's module; columns break between modules where that is possible.
    """
    rows = _rows(len(sizes), edges)
    rows = [row[i : i + _MAX_IN_ROW] for row in rows for i in range(0, len(row), _MAX_IN_ROW)]
    x = _place_in_rows(rows, edges, [width for width, _ in sizes])
    row_heights = [max(sizes[card][1] for card in row) + ROW_GAP for row in rows]
    extents = [(x[row[0]] - sizes[row[0]][0] / 2, x[row[-1]] + sizes[row[-1]][0] / 2) for row in rows]
    columns = _fold(row_heights, extents, [modules[row[0]] for row in rows])
    return _assemble(rows, columns, row_heights, x, sizes, edges)


def _rows(count: int, edges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Layers by longest path from the source that leads to most; what does not come from it lies as late as it can."""
    after: dict[int, list[int]] = defaultdict(list)
    before: dict[int, list[int]] = defaultdict(list)
    for source, target in edges:
        after[source].append(target)
        before[target].append(source)
    depth = [0] * count
    for card in range(count):  # sources come before targets
        depth[card] = 1 + max((depth[other] for other in before[card]), default=-1)
    reached = [1 << card for card in range(count)]  # bits
    for card in reversed(range(count)):
        for other in after[card]:
            reached[card] |= reached[other]
    main = max((bits for card, bits in enumerate(reached) if not before[card]), key=int.bit_count, default=0)
    for card in reversed(range(count)):
        if after[card] and not main >> card & 1:
            depth[card] = min(depth[other] for other in after[card]) - 1
    rows: dict[int, list[int]] = defaultdict(list)
    for card in range(count):
        rows[depth[card]].append(card)
    return [rows[level] for level in sorted(rows)]


def _place_in_rows(rows: list[list[int]], edges: Sequence[tuple[int, int]], widths: Sequence[float]) -> list[float]:
    """Order cards in rows and give each an x; both by the mean of the neighbours above, then below, in turns."""
    above: dict[int, list[int]] = defaultdict(list)
    below: dict[int, list[int]] = defaultdict(list)
    for source, target in edges:
        above[target].append(source)
        below[source].append(target)
    x = [0.0] * len(widths)
    for row in rows:
        _spread(row, [float(i) for i in range(len(row))], widths, x)
    for sweep in range(_SWEEPS):
        near = (above, below)[sweep % 2]
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {card: _mean([x[other] for other in near[card]], x[card]) for card in row}
            row.sort(key=wanted.__getitem__)
            _spread(row, [wanted[card] for card in row], widths, x)
    return x


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _spread(row: list[int], wanted: list[float], widths: Sequence[float], x: list[float]) -> None:
    """Give the cards of a row an x as near as possible to what is wanted, in their order and without overlap.

    Least squares under minimum distances: pool adjacent violators, on positions less the room that earlier cards take.
    """
    offsets, room = [], 0.0
    for i, card in enumerate(row):
        room += (widths[row[i - 1]] + widths[card]) / 2 + CARD_GAP if i else 0.0
        offsets.append(room)
    pools: list[tuple[float, int]] = []  # mean, number of cards
    for i in range(len(row)):
        mean, count = wanted[i] - offsets[i], 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    for card, mean, offset in zip(row, means, offsets, strict=True):
        x[card] = mean + offset


def _fold(heights: Sequence[float], extents: Sequence[Point], modules: Sequence[str]) -> list[range]:
    """Break rows into the fewest columns that make the picture as wide as a screen.

    Args:
        heights: of each row, with the gap below.
        extents: least and greatest x of each row.
        modules: name of the module of each row's first card.
    """
    columns = [range(len(heights))]
    if sum(heights) <= _SHORT:
        return columns
    for count in range(2, len(heights)):
        width = sum(
            max(extents[row][1] for row in c) - min(extents[row][0] for row in c) + 2 * CARD_GAP for c in columns
        )
        tallest = max(sum(heights[row] for row in column) for column in columns)
        if width >= _ASPECT * tallest:
            break
        columns = _columns(heights, count, modules)
    return columns


def _columns(heights: Sequence[float], count: int, modules: Sequence[str]) -> list[range]:
    """Break rows into columns of about equal height, best where one module ends and another begins."""
    columns: list[range] = []
    start, left = 0, sum(heights)
    for remaining in range(count, 1, -1):
        stop, used = _break(heights, start, left / remaining, modules)
        if stop == start:
            break
        columns.append(range(start, stop))
        start, left = stop, left - used
    return [*columns, range(start, len(heights))]


def _break(heights: Sequence[float], start: int, target: float, modules: Sequence[str]) -> tuple[int, float]:
    """First row of the next column, and the height of the rows before it; the start where no row is left for it."""
    best, used, stop = (len(modules), 0.0, start, 0.0), 0.0, start
    while stop < len(heights) - 1 and used < 1.15 * target:
        used += heights[stop]
        stop += 1
        if used > 0.85 * target:
            best = min(best, (_n_shared_levels(modules[stop - 1], modules[stop]), abs(used - target), stop, used))
    return best[2], best[3]


def _n_shared_levels(one: str, other: str) -> int:
    """Count the components that the names of two modules share at their front."""
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b or not a:
            break
        count += 1
    return count


def _assemble(
    rows: list[list[int]],
    columns: list[range],
    heights: list[float],
    x: list[float],
    sizes: Sequence[tuple[float, float]],
    edges: Sequence[tuple[int, int]],
) -> Layout:
    """Put columns beside one another, each as wide as its rows and the lanes of its skipping edges."""
    tops: list[float] = []
    for column in columns:
        y = 2.0 * ROW_GAP
        for row in column:
            tops.append(y)
            y += heights[row]
    frame = Frame(rows, columns, tops, [height - ROW_GAP for height in heights], x, sizes)
    lanes = assign_lanes(frame, edges)
    starts, gutters, at = [], [], 0.0
    for number, column in enumerate(columns):
        left, right = frame.extent(column)
        starts.append(at - left)
        gutters.append(at + right - left + CARD_GAP)
        at = gutters[-1] + CARD_GAP + LANE * (lanes.count.get(number, 0))
    column_of = {card: number for number, column in enumerate(columns) for row in column for card in rows[row]}
    return Layout(
        places=tuple((x[card] + starts[column_of[card]], tops[frame.row_of[card]]) for card in range(len(sizes))),
        routes=route_edges(frame, lanes, edges, starts, gutters),
        width=at,
        height=max((tops[row] + heights[row] for column in columns for row in column), default=0.0),
    )
