"""Every criterion as a plain loop in float64 over two toy networks whose groups are written down by hand."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Scores = list[float]


@dataclass(frozen=True)
class Parts:
    """What a group consists of: its layers, its norms, which of these reads which layer, and what its units show in."""

    layers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    norm_of: Mapping[str, str] = field(default_factory=dict)
    shown: tuple[str, ...] = ()


class Toy(nn.Module):
    """A network that multiplies what each layer makes by a gate, and remembers activations and inputs."""

    parts: ClassVar[Mapping[str, Parts]]

    def made(self, layer: str, x: Tensor) -> Tensor:
        self.seen.setdefault(f"input of {layer}", []).append(x.detach())
        y = self.get_submodule(layer)(x)
        gate = self.gates.get(layer)
        return y if gate is None else y * gate[:, :, None, None]

    def show(self, name: str, x: Tensor) -> Tensor:
        self.seen.setdefault(name, []).append(x.detach())
        return x

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, Tensor] = {}
        self.seen: dict[str, list[Tensor]] = {}


class Residual(Toy):
    """A stem and a branch that make one stream, with a wider layer between."""

    parts: ClassVar[Mapping[str, Parts]] = {
        "stem.weight[0]": Parts(("stem", "down"), ("norm",), {"stem": "norm"}, ("first", "last")),
        "up.weight[0]": Parts(("up",), ("up_norm",), {"up": "up_norm"}, ("middle",)),
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.up, self.up_norm = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.down, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.show("first", torch.relu(self.norm(self.made("stem", x))))
        y = self.show("middle", torch.relu(self.up_norm(self.made("up", x))))
        x = self.show("last", torch.relu(x + self.made("down", y)))
        return self.head(x.mean((2, 3)))


class Grouped(Toy):
    """A convolution in two groups behind a plain one, whose norm reads a multiple of what it makes."""

    parts: ClassVar[Mapping[str, Parts]] = {
        "one.weight[0]": Parts(("one",), ("norm",), {}, ("first",)),
        "two.weight[0]": Parts(("two",), ("two_norm",), {"two": "two_norm"}, ("last",)),
    }

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.two, self.two_norm = nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.show("first", torch.relu(self.norm(self.made("one", x) * 1.5)))
        x = self.show("last", torch.relu(self.two_norm(self.made("two", x))))
        return self.head(x.mean((2, 3)))


class Watched:
    """A toy after all its batches: what it showed, and gradients of each batch."""

    def __init__(self, toy: Toy, data: list[tuple[Tensor, Tensor]]) -> None:
        self.weights = {name: p.detach() for name, p in toy.named_parameters()}
        self.gradients: list[dict[str, Tensor]] = []
        self.gates: list[dict[str, Tensor]] = []  # by group, one a batch; shape (samples, C)
        toy.seen.clear()
        for x, target in data:
            gates = {
                name: torch.ones(len(x), self.width(name), dtype=x.dtype, requires_grad=True) for name in toy.parts
            }
            toy.gates = {layer: gates[name] for name, parts in toy.parts.items() for layer in parts.layers}
            wanted = [*toy.parameters(), *gates.values()]
            found = torch.autograd.grad(functional.cross_entropy(toy(x), target), wanted)
            self.gradients.append(dict(zip(self.weights, found, strict=False)))
            self.gates.append(dict(zip(gates, found[len(self.weights) :], strict=True)))
        self.seen, toy.seen, toy.gates = toy.seen, {}, {}

    def width(self, group: str) -> int:
        return len(self.weights[group.removesuffix("[0]")])


def own(parts: Parts) -> Iterator[str]:
    """Weights of a group, without biases."""
    for name in (*parts.layers, *parts.norms):
        yield f"{name}.weight"


def numbers(tensor: Tensor, c: int) -> list[float]:
    return [float(value) for value in tensor[c].flatten()]


def of_weights(value: Callable[[float], float]) -> "Naive":
    def score(seen: Watched, parts: Parts, c: int) -> float:
        return sum(value(w) for name in own(parts) for w in numbers(seen.weights[name], c))

    return score


def of_gradients(value: Callable[[float, float], float], momentum: float = 1.0) -> "Naive":
    def score(seen: Watched, parts: Parts, c: int) -> float:
        total = 0.0
        for gradients in seen.gradients:
            pairs = [
                (w, g)
                for name in own(parts)
                for w, g in zip(numbers(seen.weights[name], c), numbers(gradients[name], c), strict=True)
            ]
            total = momentum * total + sum(value(w, g) for w, g in pairs)
        return total

    return score


def of_rows(value: Callable[[float], float], norms: bool) -> "Naive":
    """A function of what a row's weights and its bias, each times its gradient, add up to in a batch."""

    def score(seen: Watched, parts: Parts, c: int) -> float:
        total = 0.0
        for gradients in seen.gradients:
            for layer in parts.norms if norms else parts.layers:
                names = (f"{layer}.weight", f"{layer}.bias")
                total += value(sum(float((seen.weights[n][c] * gradients[n][c]).sum()) for n in names))
        return total

    return score


def of_activations(value: Callable[[list[float]], float]) -> "Naive":
    def score(seen: Watched, parts: Parts, c: int) -> float:
        return value([float(a) for name in parts.shown for x in seen.seen[name] for a in x[:, c].flatten()])

    return score


def fpgm(seen: Watched, parts: Parts, c: int) -> float:
    layers = [seen.weights[f"{layer}.weight"] for layer in parts.layers]
    return sum(math.dist(numbers(layer, c), numbers(layer, j)) for layer in layers for j in range(len(layer)))


def lamp(seen: Watched, parts: Parts, c: int) -> float:
    size = of_weights(lambda w: w * w)
    sizes = [size(seen, parts, j) for j in range(len(seen.weights[f"{parts.layers[0]}.weight"]))]
    return sizes[c] / sum(other for other in sizes if other >= sizes[c])


def unipruning(seen: Watched, parts: Parts, c: int) -> float:
    found = []
    for layer in parts.layers:
        norm = parts.norm_of.get(layer)
        scale = abs(float(seen.weights[f"{norm}.weight"][c])) if norm else 1.0
        found.append(math.sqrt(sum(w * w for w in numbers(seen.weights[f"{layer}.weight"], c))) * scale)
    return max(found)


def wanda(seen: Watched, parts: Parts, c: int) -> float:
    total = 0.0
    for layer in parts.layers:
        weight, inputs = seen.weights[f"{layer}.weight"], torch.cat(seen.seen[f"input of {layer}"])
        n_groups = inputs.shape[1] // weight.shape[1]
        first = c // (len(weight) // n_groups) * weight.shape[1]
        for i in range(weight.shape[1]):
            size = math.sqrt(float(inputs[:, first + i].square().mean()))
            total += float(weight[c, i].abs().sum()) * size
    return total


def _gates(seen: Watched, parts: Parts, c: int) -> list[Tensor]:
    (group,) = [name for name in seen.gates[0] if name == f"{parts.layers[0]}.weight[0]"]
    return [gates[group][:, c] for gates in seen.gates]


Naive = Callable[[Watched, Parts, int], float]
NAIVE: dict[str, Naive] = {
    "l1": of_weights(abs),
    "l2": lambda *given: math.sqrt(of_weights(lambda w: w * w)(*given)),
    "lamp": lamp,
    "fpgm": fpgm,
    "bn_scale": lambda seen, parts, c: sum(abs(float(seen.weights[f"{norm}.weight"][c])) for norm in parts.norms),
    "unipruning": unipruning,
    "apoz": of_activations(lambda values: sum(a != 0 for a in values) / len(values)),
    "mean_activation": of_activations(lambda values: sum(map(abs, values)) / len(values)),
    "activation_variance": of_activations(
        lambda values: sum((a - sum(values) / len(values)) ** 2 for a in values) / len(values)
    ),
    "wanda": wanda,
    "taylor": of_gradients(lambda w, g: (w * g) ** 2),
    "snip": of_gradients(lambda w, g: abs(w * g)),
    "snip_momentum": of_gradients(lambda w, g: abs(w * g), momentum=0.9),
    "gradient": of_gradients(lambda w, g: abs(g)),
    "taylor_bn": of_rows(lambda row: row * row, norms=True),
    "sensitivity": of_rows(abs, norms=False),
    "group_fisher": lambda *given: sum(float(g) ** 2 for batch in _gates(*given) for g in batch),
    "retrain_free": lambda *given: sum(float(batch.sum()) ** 2 for batch in _gates(*given)),
}


def scores(name: str, seen: Watched, parts: Parts) -> Scores:
    """Scores of a group's units by the definition of a criterion."""
    width = len(seen.weights[f"{parts.layers[0]}.weight"])
    return [NAIVE[name](seen, parts, c) for c in range(width)]
