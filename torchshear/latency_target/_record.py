"""Record of how the widths for a target of latency were found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torchshear.speedup.latency import Device


@dataclass(frozen=True, slots=True)
class LatencyRound:
    """One choice of widths, solved and measured.

    Attributes:
        widths: name of each group that may shrink -> width.
        loss: loss of these widths, as the solver has it.
        bound: no widths within the budget of this round lose less.
        seconds: how long the solver took.
        predicted_share: time by the table, as a share of the dense model's.
        measured_share: time that was measured in the same rounds as the dense model's, as a share of it.
        uncertainty: standard error of the measured share, as a share of it.
    """

    widths: Mapping[str, int]
    loss: float
    bound: float
    seconds: float
    predicted_share: float
    measured_share: float
    uncertainty: float

    @property
    def gap(self) -> float:
        """Share of the loss that other widths might save at most."""
        excess = max(self.loss - self.bound, 0.0)
        return excess / abs(self.loss) if excess else 0.0


@dataclass(frozen=True, slots=True)
class LatencyAllocation:
    """Widths that were chosen for a target of latency.

    Attributes:
        device: how the model runs.
        target_share: latency that may be left, as a share of the dense model's.
        dense_ms: median time of the dense model when the target was set.
        widths: name of each group that may shrink -> width in the result.
        rounds: what was solved and measured, one after another.
        chosen: number of the round that was taken.
        loss: loss of the widths in the result, as the solver has it; that of the round unless groups were left whole.
        macs_share: multiply-accumulate operations that are left, as a share of the dense model's.
        table_errors: median and largest error of the table at widths that it was not fitted to.
        notes: remarks, one sentence each.
    """

    device: Device
    target_share: float
    dense_ms: float
    widths: Mapping[str, int]
    rounds: tuple[LatencyRound, ...]
    chosen: int
    loss: float
    macs_share: float
    table_errors: tuple[float, float]
    notes: tuple[str, ...] = ()

    @property
    def round(self) -> LatencyRound:
        """The round that was taken."""
        return self.rounds[self.chosen]

    @property
    def predicted_ms(self) -> float:
        """Milliseconds of the result by the table."""
        return self.dense_ms * self.round.predicted_share

    @property
    def measured_ms(self) -> float:
        """Milliseconds of the result as measured in its round, at the dense model's time when the target was set."""
        return self.dense_ms * self.round.measured_share

    @property
    def gap(self) -> float:
        """Share of the loss that other widths within the same budget might save at most."""
        return self.round.gap

    @property
    def realised_share(self) -> float:
        """Measured speed-up by the ratio of multiply-accumulate operations, dense by pruned."""
        return self.macs_share / self.round.measured_share

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        return asdict(self) | {
            "widths": dict(self.widths),
            "rounds": [asdict(one) | {"widths": dict(one.widths)} for one in self.rounds],
            "predicted_ms": self.predicted_ms,
            "measured_ms": self.measured_ms,
            "gap": self.gap,
            "realised_share": self.realised_share,
        }

    def __str__(self) -> str:
        one = self.round
        lines = [
            f"target      {self.target_share:.3f} of {self.dense_ms:.3f} ms, {self.device.threads} threads, batch "
            f"{self.device.batch}",
            f"measured    {one.measured_share:.3f} ±{one.uncertainty:.1%}, predicted {one.predicted_share:.3f}; "
            f"{len(self.rounds)} rounds",
            f"solver      at most {self.gap:.2%} of the loss of {one.loss:.4g} can be saved by other widths",
            f"realised    {self.realised_share:.2f} of the MACs ratio of {1 / self.macs_share:.2f}",
            *self.notes,
        ]
        return "\n".join(lines)
