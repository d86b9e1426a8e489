"""Gradients of the loss by gates, which multiply what the layers of a group make; without multiplying anything."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchshear.calibration._statistics import GateSums
from torchshear.calibration._sums import GateAccumulator, pieces_of, sum_but, wide
from torchshear.calibration._taps import GroupTaps, Tap
from torchshear.dependency import ChannelGroups
from torchshear.graph._nodes import is_written


@dataclass(frozen=True, slots=True, eq=False)
class _Gate:
    """A gate on one value.

    Attributes:
        group: name of the group.
        dim: dimension of the value that it stands on.
        sample_dim: dimension of the value that the samples stand on; None if there is none.
        positions: positions along `dim`; None for all, in order.
        units: for each of them, the unit of the group.
    """

    group: str
    dim: int
    sample_dim: int | None
    positions: Tensor | None
    units: Tensor


class Gates:
    """All gates of a network.

    The derivative by a gate that multiplies a value v by 1 is the sum of v dL/dv over what the gate multiplies, so that
    a hook on the gradient of the value gives it.
    """

    def __init__(self, groups: ChannelGroups, taps: Mapping[str, GroupTaps], device: torch.device) -> None:
        self._gates: dict[str, list[_Gate]] = {}
        for name, one in taps.items():
            for tap in one.made:
                self._gates.setdefault(tap.node, []).append(_gate(name, tap, device))
        written = {node.name for node in groups.graph if is_written(node)}
        self._written = {name for name in self._gates if name.partition(":")[0] in written}
        self._sums = {name: GateAccumulator(groups[name].width) for name, one in taps.items() if one.made}
        self._widths = {name: groups[name].width for name in self._sums}
        self._device = device
        self._found: dict[str, Tensor] = {}
        self.leaves: list[Tensor] = []  # values that no parameter reaches, by which to differentiate as well

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that gates stand on."""
        return tuple(self._gates)

    def start(self, n_samples: int) -> None:
        """Begin a batch."""
        self.leaves = []
        self._found = {name: self._zeros(n_samples, width) for name, width in self._widths.items()}

    def _zeros(self, n_samples: int, width: int) -> Tensor:
        return torch.zeros(n_samples, width, dtype=torch.float64, device=self._device)

    def watch(self, name: str, value: Tensor) -> Tensor:
        """Have the gradient of a value counted in when it is known; gives the value to go on with."""
        gates = self._gates.get(name)
        if gates is None:
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
            self.leaves.append(value)
        held, version = [value.detach()], value._version

        def count(gradient: Tensor) -> None:
            seen = held.pop()  # its memory is free for gradients that come later
            assert seen._version == version, f"{name} was written to"
            for gate in gates:
                self._add(gate, seen, gradient)

        value.register_hook(count)  # type: ignore[no-untyped-call]
        return value.clone() if name in self._written else value

    def _add(self, gate: _Gate, value: Tensor, gradient: Tensor) -> None:
        total = self._found[gate.group]
        lines = _lines(value, gradient, gate.dim, gate.sample_dim)
        if gate.sample_dim is None:  # of no sample: what it adds to the loss of the batch counts once
            total = total[:1]
        elif len(lines) != len(total):  # several places of a sample, one after another
            lines = lines.reshape(len(total), -1, lines.shape[1]).sum(1)
        total.index_add_(1, gate.units, lines if gate.positions is None else lines[:, gate.positions])

    def finish(self) -> None:
        """Count the gradients of the batch in."""
        for name, gradient in self._found.items():
            self._sums[name].add(gradient)
        self._found = {}

    def result(self) -> dict[str, GateSums]:
        """Return the sums of each group."""
        return {name: sums.result() for name, sums in self._sums.items()}


def _gate(group: str, tap: Tap, device: torch.device) -> _Gate:
    is_all = np.array_equal(tap.positions, np.arange(tap.size))
    positions = None if is_all else torch.from_numpy(tap.positions).to(device)
    return _Gate(group, tap.dim, tap.samples, positions, torch.from_numpy(tap.units).to(device))


def _lines(value: Tensor, gradient: Tensor, dim: int, samples: int | None) -> Tensor:
    """Sum of value times gradient for each sample and position of a dimension; shape (samples, positions)."""
    kept = [dim] if samples is None else [dim, samples]
    pieces = zip(pieces_of(value, 0), pieces_of(gradient, 0), strict=True)
    parts = [sum_but(wide(v) * wide(g), kept).double() for v, g in pieces]
    lines = torch.cat(parts) if 0 in kept else torch.stack(parts).sum(0)
    if samples is None:
        return lines[None]
    return lines if samples < dim else lines.T
