"""Lines of edges around the cards: through the gaps between rows, and along lanes in the gutters between columns."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

ROW_GAP = 26.0
CARD_GAP = 18.0
LANE = 5.0
_MAX_LANES = 16
_CLEARANCE = 5.0

Point = tuple[float, float]
Edge = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Frame:
    """Cards in rows, rows in columns; x counts from an origin of each column.

    Attributes:
        rows: cards of each row.
        columns: rows of each column.
        tops: y of each row.
        heights: height of the tallest card of each row.
        x: middle of each card.
        sizes: width and height of each card.
        row_of: row of each card.
        column_of: column of each row.
    """

    rows: Sequence[Sequence[int]]
    columns: Sequence[range]
    tops: Sequence[float]
    heights: Sequence[float]
    x: Sequence[float]
    sizes: Sequence[tuple[float, float]]
    row_of: dict[int, int] = field(init=False)
    column_of: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        rows = {card: number for number, row in enumerate(self.rows) for card in row}
        columns = {row: number for number, column in enumerate(self.columns) for row in column}
        object.__setattr__(self, "row_of", rows)
        object.__setattr__(self, "column_of", columns)

    def extent(self, column: range) -> Point:
        """Least and greatest x that the cards of a column reach."""
        cards = [card for row in column for card in self.rows[row]]
        lefts = (self.x[card] - self.sizes[card][0] / 2 for card in cards)
        rights = (self.x[card] + self.sizes[card][0] / 2 for card in cards)
        return min(lefts, default=0.0), max(rights, default=0.0)

    def column(self, card: int) -> int:
        """Return the column in which a card lies."""
        return self.column_of[self.row_of[card]]

    def is_clear(self, x: float, first: int, last: int) -> bool:
        """Return True if a vertical line at x meets no card of the rows first..last."""
        return all(
            abs(self.x[card] - x) > self.sizes[card][0] / 2 + _CLEARANCE
            for row in range(first, last + 1)
            for card in self.rows[row]
        )


@dataclass(frozen=True, slots=True)
class Lanes:
    """Lanes of the edges that run beside the cards.

    Attributes:
        beside: for edges that run within a column, the source's x, the target's x, or None for a lane in the gutter.
        number: (gutter, source card) -> lane; gutter g is to the right of column g.
        count: lanes of each gutter.
    """

    beside: Mapping[Edge, float | None]
    number: Mapping[tuple[int, int], int]
    count: Mapping[int, int]


def assign_lanes(frame: Frame, edges: Sequence[Edge]) -> Lanes:
    """Find a way for each edge; one lane serves all edges of a source, and lanes are used again further down."""
    beside: dict[Edge, float | None] = {}
    spans: dict[tuple[int, int], list[float]] = defaultdict(list)
    for source, target in edges:
        first, last = frame.row_of[source], frame.row_of[target]
        here, there = frame.column(source), frame.column(target)
        if here == there:
            free = [x for x in (frame.x[source], frame.x[target]) if frame.is_clear(x, first + 1, last - 1)]
            beside[source, target] = free[0] if free else None
            if not free:
                spans[here, source] += [frame.tops[first], frame.tops[last]]
            continue
        spans[here, source] += [frame.tops[first], frame.tops[last] if there == here + 1 else 0.0]
        if there > here + 1:
            spans[there - 1, source] += [0.0, frame.tops[last]]
    number, count = _pack(spans)
    return Lanes(beside, number, count)


def _pack(spans: Mapping[tuple[int, int], list[float]]) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """Give each span of a gutter the first lane that is free there; past the last lane they share."""
    number: dict[tuple[int, int], int] = {}
    busy: dict[int, list[float]] = defaultdict(list)
    for (gutter, source), ys in sorted(spans.items(), key=lambda item: (item[0][0], min(item[1]))):
        lanes = busy[gutter]
        free = next((i for i, until in enumerate(lanes) if until <= min(ys)), len(lanes))
        if free == len(lanes):
            lanes.append(0.0)
        lanes[free] = max(ys)
        number[gutter, source] = free % _MAX_LANES
    return number, {gutter: min(len(lanes), _MAX_LANES) for gutter, lanes in busy.items()}


def route_edges(
    frame: Frame, lanes: Lanes, edges: Sequence[Edge], starts: Sequence[float], gutters: Sequence[float]
) -> dict[Edge, tuple[Point, ...]]:
    """Corners of the line of each edge, from the source's lower to the target's upper border.

    Args:
        frame: where the cards lie.
        lanes: what `assign_lanes` found.
        edges: the edges.
        starts: x of each column's origin.
        gutters: x of the first lane to the right of each column.
    """
    routes: dict[Edge, tuple[Point, ...]] = {}
    for source, target in edges:
        here, there = frame.column(source), frame.column(target)
        begin = (starts[here] + frame.x[source], frame.tops[frame.row_of[source]] + frame.sizes[source][1])
        end = (starts[there] + frame.x[target], frame.tops[frame.row_of[target]])
        bottom = frame.tops[frame.row_of[source]] + frame.heights[frame.row_of[source]]
        straight = lanes.beside.get((source, target))
        if here == there and straight is not None:
            x, leave, enter = starts[here] + straight, bottom + ROW_GAP / 2, end[1] - ROW_GAP / 2
            corners = [(begin[0], leave), (x, leave), (x, enter), (end[0], enter)]
        else:
            corners = _through_gutters(lanes, source, (here, there), gutters, (begin[0], bottom), end)
        routes[source, target] = _without_repeats([begin, *corners, end])
    return routes


def _through_gutters(
    lanes: Lanes, source: int, columns: tuple[int, int], gutters: Sequence[float], begin: Point, end: Point
) -> list[Point]:
    """Corners of a way along the lane of a source; over the top of the columns between, where there are any."""
    here, there = columns
    number = lanes.number[here, source]
    x, leave, enter = gutters[here] + LANE * number, begin[1] + _offset(number), end[1] - _offset(number)
    corners = [(begin[0], leave), (x, leave)]
    if there > here + 1:
        over, last = ROW_GAP / 2 + _offset(number) / 2, lanes.number[there - 1, source]
        x = gutters[there - 1] + LANE * last
        corners += [(corners[-1][0], over), (x, over)]
    return [*corners, (x, enter), (end[0], enter)]


def _offset(number: int) -> float:
    """Distance from a row of the line that leads to a lane: neighbouring lanes use different ones."""
    return 6.0 + 3.0 * (number % 4)


def _without_repeats(points: list[Point]) -> tuple[Point, ...]:
    """Corners without those at which a line does not turn."""
    distinct = [point for point, _ in groupby(points)]
    turns = [
        point
        for before, point, after in zip(distinct, distinct[1:], distinct[2:], strict=False)
        if not (before[0] == point[0] == after[0] or before[1] == point[1] == after[1])
    ]
    return (distinct[0], *turns, distinct[-1])
