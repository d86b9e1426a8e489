"""Sums over the steps of a training, of the gradients that lie at the parameters anyway."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import MOMENTUM, SUMS_OF_WEIGHTS, RowSums, Sum, WeightSums
from torchshear.calibration._sums import nothing, wide, wide_dtype
from torchshear.calibration._weight_calls import find_weight_calls
from torchshear.dependency import ChannelGroups, Member
from torchshear.dependency.groups._purposes import HEADS, OWN_PURPOSES, READING_PURPOSES
from torchshear.errors import DataError
from torchshear.pruners.criteria._weight_sums import position_sums

SUMS_OF_TRAINING: Final[frozenset[Sum]] = SUMS_OF_WEIGHTS | {"rows", "heads"}
"""Sums that can be taken of the gradients that training computes: all but gates, which need those of single samples."""

_Key = tuple[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A dimension of a weight along which w g is added up, with the bias that is added to it."""

    member: Member
    bias: str


class GradientSums:
    """Sums over steps t, of the weight w_t before the step and its gradient g_t; in float32 at least.

    "taylor": sum of (w g)^2, "saliency": of |w g|, "gradient": of |g|, each since the last `clear`; "momentum":
    S <- 0.9 S + |w g| over all steps. One step is one step of the optimizer, whose gradients may be of several backward
    passes.

    Args:
        groups: the channel groups.
        parameters: canonical name -> parameter.
        wanted: which sums to take.
    """

    def __init__(self, groups: ChannelGroups, parameters: Mapping[str, Tensor], wanted: frozenset[Sum]) -> None:
        assert wanted <= SUMS_OF_TRAINING, "others are collected from data"
        self._wanted, self._fingerprint = wanted, groups.graph.fingerprint
        self._parameters = {name: one for name, one in parameters.items() if one.is_floating_point()}
        self._lift: Callable[[str, Tensor], Tensor] = _as_it_is
        self.n_steps = 0  # since the last `clear`
        self.n_all = 0
        self._sums: dict[Sum, dict[str, Tensor]] = {
            word: {name: torch.zeros_like(one, dtype=wide_dtype(one)) for name, one in self._parameters.items()}
            for word in sorted(wanted & SUMS_OF_WEIGHTS)
        }
        self._rows = _find_rows(groups, self._parameters) if "rows" in wanted else {}
        self._heads = _find_heads(groups, self._parameters) if "heads" in wanted else {}
        self._squares = {key: _zeros(rows.member.size) for key, rows in self._rows.items()}
        self._sizes = {key: _zeros(rows.member.size) for key, rows in self._rows.items()}
        self._gates = {name: _zeros(width) for name, (width, _) in self._heads.items()}

    def follow(self, parameters: Mapping[str, Tensor], lift: Callable[[str, Tensor], Tensor]) -> None:
        """Go on with the parameters of a smaller model.

        Args:
            parameters: canonical name -> parameter.
            lift: takes a name and a tensor of that parameter's shape, and gives it in full size.
        """
        self._parameters = {name: parameters[name] for name in self._parameters}
        self._lift = lift

    @torch.no_grad()
    def add(self, scale: float = 1.0) -> None:
        """Count the gradients that lie at the parameters in; where there is none it is zero.

        Args:
            scale: what the gradients were multiplied by.

        Raises:
            DataError: a gradient is NaN or infinite; nothing is counted then.
        """
        gradients = {name: _gradient(one, scale) for name, one in self._parameters.items()}
        sums = torch.stack([one.sum(dtype=torch.float64).cpu() for one in gradients.values()])
        if not bool(sums.isfinite().all()):
            names = [name for name, one in gradients.items() if not bool(one.isfinite().all())]
            if names:
                raise DataError(
                    f"the gradient of {names[0]!r} is NaN or infinite (as are those of {len(names) - 1} more); check "
                    f"the loss and the learning rate. With a gradient scaler give its scale: "
                    f"on_before_optimizer_step(grad_scale=scaler.get_scale())."
                )
        products = {
            name: self._lift(name, wide(self._parameters[name]) * gradient) for name, gradient in gradients.items()
        }
        for key, rows in self._rows.items():
            lines = position_sums(rows.member, products, _itself)
            if rows.bias:
                lines = lines + products[rows.bias].to("cpu", torch.float64)
            self._squares[key] += lines.square()
            self._sizes[key] += lines.abs()
        for name, (width, members) in self._heads.items():
            total = _zeros(width)
            for member in members:
                lines = position_sums(member, products, _itself)
                total.index_add_(0, torch.from_numpy(member.units), lines[torch.from_numpy(member.positions)])
            self._gates[name] += total.abs()
        self._count_in(products, gradients)
        self.n_steps += 1
        self.n_all += 1

    def _count_in(self, products: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Add elementwise sums; products are written to."""
        for name, product in products.items():
            if "taylor" in self._sums:
                self._sums["taylor"][name].addcmul_(product, product)
            if "gradient" in self._sums:
                self._sums["gradient"][name].add_(self._lift(name, gradients[name].abs()))
            if "saliency" in self._sums or "momentum" in self._sums:
                product.abs_()
            if "saliency" in self._sums:
                self._sums["saliency"][name].add_(product)
            if "momentum" in self._sums:
                self._sums["momentum"][name].mul_(MOMENTUM).add_(product)

    def clear(self) -> None:
        """Begin anew, but for what is kept with momentum."""
        for word, sums in self._sums.items():
            for tensor in sums.values() if word != "momentum" else ():
                tensor.zero_()
        for tensor in (*self._squares.values(), *self._sizes.values(), *self._gates.values()):
            tensor.zero_()
        self.n_steps = 0

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to rank by yet."""
        return not (self.n_all if self._wanted == {"momentum"} else self.n_steps)

    def statistics(self) -> Statistics:
        """The sums, as `torchshear.collect` gives them."""
        empty = nothing().float()
        return Statistics(
            fingerprint=self._fingerprint,
            n_batches=self.n_all if self._wanted == {"momentum"} else self.n_steps,
            n_samples=0,
            values={},
            weights={
                name: WeightSums(**{w: self._sums[w][name] if w in self._sums else empty for w in SUMS_OF_WEIGHTS})
                for name in (self._parameters if self._sums else ())
            },
            rows={key: RowSums(self._squares[key], self._sizes[key]) for key in self._rows},
            gates={},
            heads=dict(self._gates),
            taps={},
            layers=(),
            sums=self._wanted,
            notes=(f"gradients of {self.n_steps} steps of the training",),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as tensors by text keys."""
        state: dict[str, Any] = {"n_steps": self.n_steps, "n_all": self.n_all}
        return state | {key: tensor.detach().cpu().clone() for key, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.n_steps, self.n_all = int(state["n_steps"]), int(state["n_all"])
        for key, tensor in self._tensors().items():
            tensor.copy_(state[key])

    def _tensors(self) -> dict[str, Tensor]:
        """All sums, by text keys."""
        found = {f"{word}|{name}": one for word, sums in self._sums.items() for name, one in sums.items()}
        for kind, lines in (("squares", self._squares), ("sizes", self._sizes)):
            found |= {f"{kind}|{name}|{dim}": one for (name, dim), one in lines.items()}
        return found | {f"heads|{name}": one for name, one in self._gates.items()}


def _itself(value: Tensor) -> Tensor:
    return value


def _as_it_is(_: str, value: Tensor) -> Tensor:
    return value


def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64)


def _gradient(parameter: Tensor, scale: float) -> Tensor:
    """The gradient that lies at a parameter, or zeros."""
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=wide_dtype(parameter))
    gradient = wide(parameter.grad.detach())
    return gradient if scale == 1.0 else gradient / scale


def _find_rows(groups: ChannelGroups, parameters: Mapping[str, Tensor]) -> dict[_Key, _Rows]:
    """(Weight, dimension) -> its rows, for weights whose rows make units of a group."""
    bias_of = {layer.weight: layer.bias for layer in find_weight_calls(groups)}
    found = {}
    for group in groups.prunable:
        for member in group.members:
            if member.name in parameters and member.purposes & OWN_PURPOSES:
                bias = bias_of.get(member.name, "")
                fits = bias in parameters and tuple(parameters[bias].shape) == (member.size,)
                found[member.name, member.dim] = _Rows(member, bias if fits else "")
    return found


def _find_heads(groups: ChannelGroups, parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, list[Member]]]:
    """Group of attention heads -> its width, and the columns that read it."""
    found = {}
    for group in groups.prunable:
        reading = [m for m in group.members if m.name in parameters and m.purposes & READING_PURPOSES]
        if group.role in HEADS and reading:
            found[group.name] = (group.width, reading)
    return found
