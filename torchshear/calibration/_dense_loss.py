"""A loss for data without labels: the network's own outputs are the targets."""

from collections.abc import Callable
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from torchshear.errors import DataError

LossFunction = Callable[[Any, Any], Tensor]
Loss = LossFunction | Literal["dense"]
DENSE: Final = "dense"


class DenseLoss:
    """Loss of a network against its own outputs, of which gradients still tell something.

    Logits are held to the class that is the largest by cross-entropy. A squared error against the output itself has no
    gradient, and so all other outputs are held to themselves plus noise as large as they vary, drawn from a seed: the
    squares of such gradients estimate the Fisher information of a normal distribution around the output.

    Outputs with a name "logits" count alone; without one, all floating outputs count, and those of at least two classes
    are logits: (samples, classes), (samples, classes, height, width) or (samples, places, classes).
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the loss of a batch.

        Args:
            output: what the network gave, with gradients.
            target: what the batch holds beside its inputs; ignored.

        Raises:
            DataError: no output is a floating tensor that gradients flow from.
        """
        named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        leaves = [leaf for leaf in pytree.tree_leaves(output if named is None else named) if isinstance(leaf, Tensor)]
        leaves = [leaf for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad]
        if not leaves:
            raise DataError(
                "loss_fn='dense' takes the model's own outputs as targets, and none of them is a floating tensor that "
                "depends on weights. Give a loss of output and target."
            )
        return torch.stack([self._of_tensor(leaf.float()) for leaf in leaves]).sum()

    def _of_tensor(self, output: Tensor) -> Tensor:
        classes = class_dimension(output)
        if classes is not None:
            logits = output.movedim(classes, -1).flatten(0, -2)
            return functional.cross_entropy(logits, logits.detach().argmax(1))
        held = output.detach()
        noise = torch.randn(held.shape, generator=self._generator).to(held)
        size = held.std() if held.numel() > 1 else held.new_ones(())
        return functional.mse_loss(output, held + noise * torch.where(size > 0, size, 1.0))


def class_dimension(output: Tensor) -> int | None:
    """Return the dimension of the classes where an output is taken for logits; None for any other output."""
    dim = 2 if output.ndim == 3 else 1
    return dim if output.ndim >= 2 and output.shape[dim] > 1 else None
