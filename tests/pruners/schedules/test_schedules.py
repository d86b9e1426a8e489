"""Schedules against the numbers of NNI and Neural Compressor, as their references give them."""

import math
from pathlib import Path

import pytest

from torchshear.errors import ArgumentError
from torchshear.pruners.schedules import AGP, Cos, Cube, Exp, History, Linear, Lottery, OneShot, Poly, Renewal, Schedule


def ratios(schedule: Schedule, final: float, digits: int = 3) -> list[float]:
    return [round(schedule.ratio(position, final), digits) for position in schedule.events]


def test_agp_of_nni_before_its_end_epoch() -> None:
    """NNI 2.0, start 0, end 10, frequency 1, final 0.8: epochs 0 to 9, and 0, 3, 6, 9 with frequency 3."""
    every = AGP(start=0, end=10 - 1, by="epoch")
    assert ratios(every, 0.8) == [0, 0.238, 0.424, 0.563, 0.663, 0.730, 0.770, 0.791, 0.799, 0.8]
    third = AGP(start=0, end=10 - 1, frequency=3, by="epoch")
    assert list(third.events) == [0, 3, 6, 9]
    assert [third.ratio(epoch, 0.9) for epoch in (3, 4, 5)] == pytest.approx([0.9 * (1 - (2 / 3) ** 3)] * 3)


def test_agp_and_linear_of_nni_by_iteration() -> None:
    """NNI 2.10 and later: 1 - (1 - i / N)^3 of the final ratio, N = 10; linear: i / N."""
    found = ratios(AGP(end=10, by="event"), 0.8)
    assert found == [0, 0.217, 0.390, 0.526, 0.627, 0.7, 0.749, 0.778, 0.794, 0.799, 0.8]
    assert ratios(Linear(end=10, by="event"), 0.8) == [round(0.08 * i, 3) for i in range(11)]
    interval = AGP(end=40, frequency=10)  # of NNI 3: interval_steps=10, total_times=4
    assert [interval.ratio(step, 0.8) for step in (9, 10, 19, 40)] == pytest.approx(
        [0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.75**3), 0.8]
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Exp, [0, 0.331, 0.552, 0.701, 0.799]),
        (Linear, [0, 0.198, 0.398, 0.599, 0.799]),
        (Cos, [0, 0.060, 0.232, 0.492, 0.799]),
        (Cube, [0, 0.010, 0.099, 0.336, 0.799]),
    ],
)
def test_curves_of_neural_compressor(kind: type[Schedule], expected: list[float]) -> None:
    """Its figures are of 384 blocks, of which whole ones went."""
    blocks = [int(384 * ratio + 1e-9) / 384 for ratio in ratios(kind(end=4), 0.8, 12)]
    assert blocks == pytest.approx(expected, abs=1.0 / 384)
    assert kind(end=4).ratio(4, 0.8) == 0.8


def test_events_of_neural_compressor() -> None:
    """Events at start + i * frequency up to the end; the first asks for nothing, the last may come before the end."""
    schedule = Linear(start=2, end=11, frequency=4)
    assert list(schedule.events) == [2, 6, 10]
    assert [schedule.ratio(step, 0.8) for step in (0, 1, 2, 5, 6, 9, 10, 11, 500)] == [
        0,
        0,
        0,
        0,
        0.4,
        0.4,
        0.8,
        0.8,
        0.8,
    ]
    assert [schedule.passed(step) for step in (1, 2, 5, 6, 10, 11, 500)] == [0, 1, 1, 2, 3, 3, 3]
    at_once = Exp(start=3, end=6, frequency=4)
    assert list(at_once.events) == [3]
    assert [at_once.ratio(step, 0.7) for step in (2, 3)] == [0, 0.7]


def test_schedule_of_epochs_of_neural_compressor_1() -> None:
    """s0 + (s - s0) floor((e - start + 1) / frequency) frequency / (end - start + 1)."""
    start, end, initial, final = 2, 9, 0.1, 0.9
    schedule = Linear(start=start - 1, end=end, frequency=2, initial=initial, by="epoch")
    for epoch in range(start, end + 1):
        share = (epoch - start + 1) // 2 * 2 / (end - start + 1)
        assert schedule.ratio(epoch, final) == pytest.approx(initial + (final - initial) * share)
    assert Linear(start=-1, end=3).ratio(0, 0.8) == pytest.approx(0.2)


def test_lottery_and_polynomials() -> None:
    assert ratios(Lottery(end=5), 0.8, 4) == [0, 0.2752, 0.4747, 0.6193, 0.7241, 0.8]
    assert ratios(Lottery(end=3), 0.5, 4) == [0, 0.2063, 0.3700, 0.5]  # AutoCompress, three rounds
    assert ratios(Poly(end=7, power=3), 0.6, 9) == ratios(AGP(end=7), 0.6, 9)
    assert Poly(end=2, power=1).ratio(1, 0.6) == pytest.approx(0.3)
    assert [OneShot(at=4).ratio(step, 0.5) for step in (3, 4, 5)] == [0, 0.5, 0.5]
    assert OneShot(at=4, by="epoch").by == "epoch"
    assert OneShot(at=4) == OneShot(at=4) != OneShot(at=5)


def test_initial_ratio() -> None:
    schedule = Exp(end=2, initial=0.2)
    assert ratios(schedule, 0.8, 9) == [0.2, pytest.approx(1 - 0.8 * math.sqrt(0.25)), 0.8]
    assert ratios(AGP(end=2, initial=0.2), 0.8, 9) == [0.2, pytest.approx(0.8 - 0.6 / 8), 0.8]


@pytest.mark.parametrize("kind", [AGP, Cos, Cube, Exp, Linear, Lottery, Poly])
def test_every_curve_rises(kind: type[Schedule]) -> None:
    found = [kind(end=20, frequency=2).ratio(step, 0.9) for step in range(25)]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 0.9


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AGP(start=5, end=4), "end=4 lies before start=5"),
        (lambda: AGP(end=4, frequency=0), "frequency"),
        (lambda: AGP(end=4, initial=1.0), "initial=1.0"),
        (lambda: AGP(end=4, by="batch"), "by='batch'"),
        (lambda: AGP(end=4.5), "end"),
        (lambda: AGP(start=-2, end=4), "start"),
        (lambda: Poly(end=4, power=0), "power=0"),
        (lambda: OneShot(at=-1), "at=-1"),
        (lambda: Linear(end=4, initial=0.5).ratio(0, 0.3), "initial=0.5 is above the final ratio 0.3"),
        (lambda: Linear(end=4).ratio(0, 1.0), "final=1.0"),
        (lambda: Linear(end=4).draw("a.txt"), "a.txt"),
    ],
)
def test_bad_settings(make: object, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        make()


def test_pictures(tmp_path: Path) -> None:
    AGP(start=10, end=100, frequency=10).draw(tmp_path / "agp.svg", 0.8)
    renewals = tuple(Renewal(10 * i, i, 0.1 * i, 0.1 * i, {"a": 8 - i}) for i in range(3))
    history = History(0.5, "channels", renewals, (1, 2, 3), (2.0, 1.5, math.nan), (math.nan, 0.1, 0.2), "target missed")
    history.draw(tmp_path / "history.svg")
    History(0.5, "weights").draw(tmp_path / "empty.png")
    drawn = (tmp_path / "history.svg").read_text()
    assert all(label in drawn for label in ("asked", "reached", "loss", "penalty", "channels gone", "target missed"))
    assert {path.name for path in tmp_path.iterdir()} == {"agp.svg", "history.svg", "empty.png"}
    assert str(history) == "20.0% of the channels gone, 20.0% asked by now, 50.0% in the end; target missed"
