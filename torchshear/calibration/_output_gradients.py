"""Squared gradients of the loss by what layers give: how much an error there costs."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.calibration._weight_calls import WeightCall
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._purposes import READING_PURPOSES
from torchshear.errors import DataError, first_line
from torchshear.graph._nodes import shape_of

ENOUGH: Final = 64  # samples of which gradients are taken, unless a batch holds more; means need no more
_RELATIVE: Final = "errors of layers count relative to what they give"


class OutputGradients:
    """Sums of squared gradients by the outputs of layers that read prunable groups.

    Args:
        groups: the analysed network.
        layers: calls that read weights; those that read no prunable group are passed over.
        is_given: whether the user gave the loss, whose failures are errors.

    Attributes:
        problem: why there are no gradients; "" if there are.
        opened: recurrent calls inside of which gradients are taken.
    """

    def __init__(self, groups: ChannelGroups, layers: Sequence[WeightCall], is_given: bool) -> None:
        self._is_given = is_given
        read = {m.name for group in groups.prunable for m in group.members if m.purposes & READING_PURPOSES}
        nodes = {node.name: node for node in groups.graph if node.op in ("call_function", "placeholder")}
        self._dims: dict[str, int] = {}
        self.opened: set[str] = set()
        for layer in layers:
            if layer.dim is None or layer.weight not in read:
                continue
            node, source = nodes[layer.node], nodes.get(layer.source)
            if layer.output != layer.node:  # inside a recurrent call
                self._dims[layer.output] = layer.dim
                self.opened.add(layer.node)
            elif source is not None and _is_alike(node, source):
                self._dims[layer.node] = layer.dim  # channels of the output lie where those of the input do
        self._sums: dict[str, Tensor] = {}
        self._n_samples = 0
        self.problem = ""

    @property
    def is_enough(self) -> bool:
        """Return True once no more gradients are needed."""
        return bool(self.problem) or self._n_samples >= ENOUGH

    def watch(self, name: str, value: Tensor, n_samples: int) -> None:
        """Have the gradient by a value counted in when it is taken; that of a mean counts as one of each sample."""
        if name in self._dims and value.requires_grad and not self.is_enough:
            others = [dim for dim in range(value.ndim) if dim != self._dims[name]]

            def count(gradient: Tensor) -> None:
                found = (gradient.detach().float() * n_samples).square().sum(others).double().cpu()
                self._sums[name] = self._sums[name] + found if name in self._sums else found

            value.register_hook(count)  # type: ignore[no-untyped-call]

    def take(self, loss: Callable[[], Tensor], output: Any, weights: list[Tensor], n_samples: int) -> None:
        """Take the gradients of a batch. A model that has none is no error: errors of layers tell something without.

        Args:
            loss: gives the loss of the batch.
            output: what the model gave.
            weights: what the gradients are taken by, so that all that is watched is passed.
            n_samples: samples in the batch.

        Raises:
            DataError: a loss that the user gave is not finite, or not a scalar.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not weights or not any(leaf.is_floating_point() for leaf in leaves):
            self.problem = f"no gradient flows from the outputs; {_RELATIVE}"
            return
        try:
            value = loss()
        except DataError as error:
            if self._is_given:
                raise
            self.problem = f"the model's own outputs give no loss ({first_line(error)}); {_RELATIVE}"
            return
        try:
            torch.autograd.grad(value, weights, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:  # an operator that has no derivative
            self.problem = f"gradients cannot be taken ({first_line(error)}); {_RELATIVE}"
        self.finish(n_samples)

    def finish(self, n_samples: int) -> None:
        """Count the samples of a batch whose gradients were taken."""
        if self.is_enough:
            return
        self._n_samples += n_samples
        if not all(bool(one.isfinite().all()) for one in self._sums.values()):
            self.problem = f"gradients of the loss are NaN or infinite; {_RELATIVE}"

    def result(self) -> dict[str, Tensor]:
        """Return the means over samples; nothing where gradients could not be taken."""
        if self.problem or not self._n_samples:
            return {}
        return {name: total / self._n_samples for name, total in self._sums.items()}


def _is_alike(node: fx.Node, source: fx.Node) -> bool:
    """Return whether a call gives one tensor with as many dimensions as what it reads."""
    return isinstance(node.meta.get("val"), Tensor) and len(shape_of(node)) == len(shape_of(source))
