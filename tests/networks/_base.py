"""Records of small networks, the registry of them, and what they are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchshear
from torchshear.dependency import ChannelGroups

Built = tuple[nn.Module, tuple, dict]

# What can be special about a network. Three tags say how it is checked: "cross_channel" (a norm, softmax or mean runs
# over a prunable axis, so zeroing is not cutting), "refused" (nothing can be cut, and the reason is given) and "traced"
# (its own code holds sizes that no attribute does, so that it shrinks to a graph); "layer" marks one kind of layer
# between others, for criteria.
TAGS = {
    "attention", "buffers", "computed_weights", "concatenation", "copied", "cross_channel", "detached", "experts",
    "frozen", "gate", "grouped", "layer", "moved", "norm", "parameters", "plain", "recurrent", "refused", "reshaped",
    "residual", "shared_weights", "signature", "split", "traced", "transposed",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Network:
    """A small model with example inputs and what is special about it.

    Attributes:
        name: as the function that builds it.
        build: a new model in eval mode with random float64 weights, its arguments and its keyword arguments.
        note: what it is, in a few words.
        tags: what is special about it, of `TAGS`.
        widths: of its groups of units that can be cut, sorted. A group is a set of units of which each may go by
            itself: heads and head dimensions are two groups, a channel that a gate reads again is one unit.
    """

    name: str
    build: Callable[[], Built]
    note: str
    tags: frozenset[str]
    widths: tuple[int, ...]


REGISTERED: dict[str, Network] = {}


def register(name: str, note: str, tags: str, widths: tuple[int, ...], build: Callable[[], tuple]) -> None:
    """Register a network; its weights are made random and float64 here, and no random state is touched."""

    def built() -> Built:
        with torch.random.fork_rng(devices=[]):
            model, args, *rest = build()
        args = args if isinstance(args, tuple) else (args,)
        return randomise(model.double().eval(), seed=sum(name.encode())), args, rest[0] if rest else {}

    assert name not in REGISTERED
    assert TAGS.issuperset(tags.split()), name
    REGISTERED[name] = Network(name, built, note, frozenset(tags.split()), widths)


def network(note: str, tags: str, *, widths: tuple[int, ...]) -> Callable:
    """Register a function under its name that builds a model, its arguments (or the only one), and those by name."""

    def registered(build: Callable[[], tuple]) -> Callable[[], tuple]:
        register(build.__name__, note, tags, widths, build)
        return build

    return registered


class Net(nn.Module):
    """A module whose forward is `run(self, *args)`; parts become sub-modules, parameters or plain attributes."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Between(nn.Module):
    """A layer, a call on what it makes, a layer."""

    def __init__(self, call: Callable[[Tensor], Any], one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.call, self.one, self.two = call, one, two

    def forward(self, x: Tensor) -> Any:
        return self.two(self.call(self.one(x)))


class LooksAtValues(nn.Module):
    """A part that can be captured, called by code that looks at values and cannot."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any) -> Tensor:
        y = self.part(*args)
        return y if y.sum() > 0 else -y


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and floating buffer distinct random values of a sensible size, in place.

    Matrices and kernels are scaled by their fan-in, scales scatter around 1, running variances are positive. The global
    random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                values = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            elif name.endswith("weight") and tensor.ndim == 1:
                values = 1 + 0.3 * normal(tensor)
            elif tensor.ndim >= 2:
                values = normal(tensor) / max(1, tensor[0].numel()) ** 0.5
            else:
                values = 0.3 * normal(tensor)
            tensor.copy_(values)
    return model


def zero(*places: Tensor) -> None:
    """Write zeros into tensors, as into rows of parameters."""
    with torch.no_grad():
        for place in places:
            place.zero_()


def analyzed(model: nn.Module, *args: Any) -> ChannelGroups:
    """The channel groups of a model that is called with some arguments."""
    return torchshear.analyze(torchshear.trace(model, args))


def noise(*shape: int, seed: int = 0) -> Tensor:
    """A random float64 input, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def picture(channels: int = 3, size: int = 16) -> Tensor:
    """Two random float64 maps of some channels, the same every time."""
    return noise(2, channels, size, size)


def image(batch: int = 2, size: int = 8) -> Tensor:
    """Random float32 images of three channels, the same every time."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


def labelled(n_batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of four pictures of 6 x 6 with one of four labels each, the same ones every time."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, 3, 6, 6, generator=generator), torch.randint(0, 4, (4,), generator=generator))
        for _ in range(n_batches)
    ]


def classified(*shape: int, count: int = 4, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Batches of a shape with one of five labels a sample, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(*shape, generator=generator).to(dtype), torch.randint(0, 5, shape[:1], generator=generator))
        for _ in range(count)
    ]


def conv(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def conv_bn(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(c_in, c_out, kernel, bias=False, **options), nn.BatchNorm2d(c_out), nn.ReLU())


def head(channels: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
