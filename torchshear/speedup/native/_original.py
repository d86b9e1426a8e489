"""A captured model, with facts that hold for all cuts of it."""

from contextlib import nullcontext
from functools import cached_property

import torch
from torch import nn

from torchshear.graph import ExampleInputs, Graph
from torchshear.graph.capture._check import run_failure
from torchshear.graph.model._caches import Cache, find_caches
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import set_exporting_flag
from torchshear.graph.numerics._float64 import compute_in, to_float64


class Original:
    """A model as it is before a cut.

    Attributes:
        model: the model, or the calls of its parts; not changed.
        graph: its capture.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model = model
        self.graph = graph

    @cached_property
    def example(self) -> ExampleInputs:
        """The example; at most four samples of it where the batch is free, which the graph is known to run on."""
        inputs = self.graph.inputs
        batch = inputs.batch_size()
        return inputs.with_batch(4) if self.graph.batch_hint is not None and batch and batch > 4 else inputs

    @cached_property
    def example_in_training(self) -> ExampleInputs:
        """The example, with two samples where it has one and the batch is free: batch norms need two values each."""
        is_single = self.graph.batch_hint is not None and self.example.batch_size() == 1
        return self.example.with_batch(2) if is_single else self.example

    @cached_property
    def caches(self) -> tuple[Cache, ...]:
        """Attributes in which the model keeps values computed from its weights."""
        return find_caches(self.model, self.graph.inputs)

    @cached_property
    def runs_as_exported(self) -> bool:
        """True if it runs when it believes that it is being exported."""
        with set_exporting_flag():
            return run_failure(self.model, self.example, "eval") is None

    @cached_property
    def refuses_float64(self) -> bool:
        """True if it runs in its own dtype but not in float64, which some fast kernels do not take."""
        wide, inputs = copy_model(self.model, {}).to(torch.float64), to_float64(self.example)
        for branch in (nullcontext, set_exporting_flag):
            with branch():
                if run_failure(self.model, self.example, "eval") is None:
                    with compute_in(torch.float64):
                        if run_failure(wide, inputs, "eval") is not None:
                            return True
        return False
