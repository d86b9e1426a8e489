"""A call of a `torch.autograd.Function`: a graph holds its operators, but not its backward."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Operand:
    """Stands in the arguments of a call for the tensor that a node gives; "" until nodes have their final names."""

    node: str


@dataclass(frozen=True, slots=True, eq=False)
class FunctionCall:
    """One call of a function that defines its own backward.

    Attributes:
        function: the class whose `apply` is called.
        args: positional arguments, with an `Operand` in place of each tensor of the graph.
        kwargs: keyword arguments, likewise.
        outputs: names of the nodes of its results, "" for a result that is no tensor or is never read.
        operators: names of the nodes of its operators.
        module: name of the module that calls it; "" is the model itself.
        is_replayable: whether a node is known for each of its tensors, so that the function can be called in place of
            its operators.
        has_own_backward: whether the gradients of its operators are not those of its backward, or could not be
            compared with them.
    """

    function: type[Function]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str, ...]
    operators: tuple[str, ...]
    module: str
    is_replayable: bool
    has_own_backward: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes whose tensors it is given."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return tuple(dict.fromkeys(leaf.node for leaf in leaves if isinstance(leaf, Operand)))

    def run(self, values: Mapping[str, Tensor]) -> list[Any]:
        """Call the function again and return its results.

        Args:
            values: tensors by the names of `inputs`.
        """
        given = (self.args, dict(self.kwargs))
        args, kwargs = pytree.tree_map_only(Operand, lambda operand: values[operand.node], given)
        results = self.function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return list(results) if isinstance(results, tuple) else [results]

    def __str__(self) -> str:
        """Return the name of the function, with the line of its forward and the module that calls it."""
        code = getattr(inspect.unwrap(self.function.forward), "__code__", None)
        line = f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code is not None else ""
        where = f"module {self.module!r}" if self.module else "the model's forward"
        return f"{self.function.__name__}{line}, called in {where}"
