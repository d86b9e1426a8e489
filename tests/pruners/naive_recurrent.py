"""Criteria over recurrent layers as loops over layers, directions and steps in float64."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def loss_of(output: Tensor, _: Any = None) -> Tensor:
    return (torch.linspace(-1, 2, output[0].numel(), dtype=output.dtype) * output.flatten(1).square()).mean()


class Read(nn.Module):
    """A recurrent layer of which all steps and, of the last pass, the final state are read."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        width = layer.proj_size or layer.hidden_size
        self.layer = layer
        self.head = nn.Linear(width * (2 if layer.bidirectional else 1) + width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        state = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([out.mean(1 if self.layer.batch_first else 0), state[-1]], 1))


def one_step(
    layer: nn.RNNBase, end: str, w: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden units and cell of the next step, before a projection."""
    none = torch.zeros(1, dtype=x.dtype)
    given = x @ w[f"weight_ih_{end}"].T + w.get(f"bias_ih_{end}", none)
    again = h @ w[f"weight_hh_{end}"].T + w.get(f"bias_hh_{end}", none)
    if isinstance(layer, nn.LSTM):
        i, f, g, o = (given + again).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if isinstance(layer, nn.GRU):
        (r, z, n), (r_, z_, n_) = given.chunk(3, 1), again.chunk(3, 1)
        z = (z + z_).sigmoid()
        return (1 - z) * (n + (r + r_).sigmoid() * n_).tanh() + z * h, c
    return (given + again).relu() if layer.nonlinearity == "relu" else (given + again).tanh(), c


class Steps:
    """The network as a loop over layers, directions and steps, in which gates multiply what passes hand on."""

    def __init__(self, model: Read, data: list[tuple[Tensor]]) -> None:
        layer = self.layer = model.layer
        self.ends = [
            f"l{i}{way}" for i in range(layer.num_layers) for way in ["", "_reverse"][: 1 + layer.bidirectional]
        ]
        self.weights = {name: value.detach() for name, value in layer.named_parameters()}
        self.given: dict[str, list[Tensor]] = defaultdict(list)  # by pass: what it hands on, one line a sample and step
        self.read: dict[str, list[Tensor]] = defaultdict(list)
        self.before: dict[str, list[Tensor]] = defaultdict(list)
        self.gates: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        for (x,) in data:
            width = layer.proj_size or layer.hidden_size
            gates = {end: torch.ones(len(x), width, dtype=x.dtype, requires_grad=True) for end in self.ends}
            leaves = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
            loss = loss_of(self.forward(model, x, leaves, gates))
            self.losses.append(float(loss.detach()))
            found = torch.autograd.grad(loss, [*leaves.values(), *gates.values()])
            self.gradients.append(dict(zip(leaves, found, strict=False)))
            self.gates.append(dict(zip(gates, found[len(leaves) :], strict=True)))

    def forward(self, model: Read, x: Tensor, weights: dict[str, Tensor], gates: dict[str, Tensor]) -> Tensor:
        n_ways = 1 + model.layer.bidirectional
        for first in range(0, len(self.ends), n_ways):
            ways = [
                self.one_pass(model.layer, end, weights, gates[end], x) for end in self.ends[first : first + n_ways]
            ]
            x = torch.cat(ways, 2)
        last = ways[-1][:, 0] if n_ways == 2 else ways[-1][:, -1]
        return torch.cat([x.mean(1), last], 1) @ model.head.weight.T + model.head.bias

    def one_pass(self, layer: nn.RNNBase, end: str, w: dict[str, Tensor], gate: Tensor, x: Tensor) -> Tensor:
        n_steps = x.shape[1]
        h = torch.zeros(len(x), layer.proj_size or layer.hidden_size, dtype=x.dtype)
        c = torch.zeros(len(x), layer.hidden_size, dtype=x.dtype)
        found: dict[int, Tensor] = {}
        for t in range(n_steps)[:: -1 if end.endswith("reverse") else 1]:
            self.read[end].append(x[:, t].detach())
            self.before[end].append(h.detach())
            h, c = one_step(layer, end, w, x[:, t], h, c)
            h = h @ w[f"weight_hr_{end}"].T if layer.proj_size else h
            self.given[end].append(h.detach())
            found[t] = h * gate
        return torch.stack([found[t] for t in range(n_steps)], 1)

    def rows(self, name: str, c: int) -> list[int]:
        """Rows of a weight that make hidden unit c, one a gate."""
        return list(range(c, len(self.weights[name]), self.layer.hidden_size))


def shown(seen: Steps, end: str, c: int) -> list[float]:
    return torch.cat(seen.given[end])[:, c].tolist()


def root_mean_squares(values: list[Tensor]) -> list[float]:
    return [math.sqrt(sum(v * v for v in column) / len(column)) for column in torch.cat(values).T.tolist()]


def naive_wanda(seen: Steps, end: str, c: int) -> float:
    total = 0.0
    for name, values in ((f"weight_ih_{end}", seen.read[end]), (f"weight_hh_{end}", seen.before[end])):
        sizes = root_mean_squares(values)
        for row in seen.rows(name, c):
            total += sum(abs(float(w)) * size for w, size in zip(seen.weights[name][row], sizes, strict=True))
    return total


def filters(seen: Steps, end: str, c: int) -> list[float]:
    names = (f"weight_ih_{end}", f"weight_hh_{end}")
    return [float(w) for name in names for row in seen.rows(name, c) for w in seen.weights[name][row]]


def naive_sensitivity(seen: Steps, end: str, c: int) -> float:
    total = 0.0
    for gradients in seen.gradients:
        for word in ("ih", "hh"):
            names = [f"weight_{word}_{end}", f"bias_{word}_{end}"]
            for row in seen.rows(names[0], c):
                parts = [(seen.weights[n][row] * gradients[n][row]).sum() for n in names if n in seen.weights]
                total += abs(float(sum(parts)))
    return total


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


RECURRENT: dict[str, Callable[[Steps, str, int], float]] = {
    "mean_activation": lambda seen, end, c: sum(map(abs, shown(seen, end, c))) / len(shown(seen, end, c)),
    "activation_variance": lambda seen, end, c: variance(shown(seen, end, c)),
    "apoz": lambda seen, end, c: sum(v != 0 for v in shown(seen, end, c)) / len(shown(seen, end, c)),
    "group_fisher": lambda seen, end, c: sum(float(g) ** 2 for gates in seen.gates for g in gates[end][:, c]),
    "retrain_free": lambda seen, end, c: sum(float(gates[end][:, c].sum()) ** 2 for gates in seen.gates),
    "fpgm": lambda seen, end, c: sum(
        math.dist(filters(seen, end, c), filters(seen, end, j)) for j in range(seen.layer.hidden_size)
    ),
    "wanda": naive_wanda,
    "sensitivity": naive_sensitivity,
}
