"""Functions that define their own backward: others than the derivative of their forward, and the derivative itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Reversed(torch.autograd.Function):
    """Gradient reversal: hands its operand on, and the gradient back with the other sign, times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


class Rounded(torch.autograd.Function):
    """Straight-through rounding to eighths, with a switch of the gradient mode that does nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Clamped(torch.autograd.Function):
    """Clamps to [-1, 1] and lets gradients through outside as well: the derivative, as long as nothing is clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Swish(torch.autograd.Function):
    """x sigmoid(x) with its derivative, which keeps the operand alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        share = torch.sigmoid(x)
        return gradient * share * (1 + x * (1 - share))


class Product(torch.autograd.Function):
    """A linear layer and the double of its input: several operands, several results, the derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x @ weight.t() + bias, x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_double: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight + 2 * of_double, gradient.t() @ x, gradient.sum(0)


class Masked(torch.autograd.Function):
    """A softmax over what is not negative, with its derivative; its operators give none, since one writes over y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.softmax(x.masked_fill(x < 0, torch.tensor(torch.finfo(x.dtype).min)), -1)
        y.masked_fill_(x < 0, 0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (gradient - (gradient * y).sum(-1, keepdim=True))


class Doubled(torch.autograd.Function):
    """Multiplies by a tensor that its forward makes; gives the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.tensor(2.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Root(torch.autograd.Function):
    """A square root whose derivative is kept from growing above 1000."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sqrt(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / torch.sqrt(torch.clip(4 * x, min=1e-6))


class Pointwise(torch.autograd.Function):
    """A convolution over single places, with a third of the gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_weight = torch.einsum("bohw,bihw->oi", gradient, x)[:, :, None, None] / 3
        return functional.conv_transpose2d(gradient, weight), of_weight, gradient.sum((0, 2, 3))


class ReluInPlace(torch.autograd.Function):
    """Writes to its operand; gives the derivative times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.mark_dirty(x)
        ctx.factor = factor
        x.relu_()
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return gradient * (y > 0) * ctx.factor, None


class Itself(torch.autograd.Function):
    """Gives its operand itself, not a view of it, and doubles gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


round_through = Rounded.apply  # as code does it: `apply` under a name of its own, from before anything is captured


class Adversarial(nn.Module):
    """Features, a head for labels, and behind a reversal of gradients a head for domains."""

    def __init__(self, attends: bool = False) -> None:
        super().__init__()
        self.features, self.label, self.domain = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 2)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True) if attends else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.features(x))
        if self.attention is not None:
            h = h + self.attention(h, h, h, need_weights=False)[0]
        h = torch.relu(h.mean(1))
        return self.label(h), self.domain(Reversed.apply(h, 0.5))


class Quantized(nn.Module):
    """Two linear layers with rounded activations between."""

    def __init__(self, attends: bool = False, through: Callable[[Tensor], Tensor] = round_through) -> None:
        super().__init__()
        self.one, self.two, self.through = nn.Linear(6, 16), nn.Linear(16, 3), through
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True) if attends else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        if self.attention is not None:
            h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.two(self.through(torch.relu(h.mean(1))))
