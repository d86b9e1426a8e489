"""Parameters and work of each part of a model, before and after a cut."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from torchshear.dependency.plans._cut import Cut, graph_macs
from torchshear.graph import Cost, locate
from torchshear.graph._nodes import shape_of
from torchshear.graph._parts import is_in_parts


def part_costs(cut: Cut) -> dict[str, tuple[Cost, Cost]]:
    """Cost of each part before and after a cut.

    Args:
        cut: a cut of a model of which parts were captured.

    Returns:
        Name of a part -> (before, after). Tied parameters count in each part that holds them; each captured call counts
        once in the work. Empty for a model that was captured whole.
    """
    graph = cut.groups.graph
    parts = graph.parts
    if parts is None:
        return {}

    def cost(name: str, shape: Callable[[fx.Node], Any], state_shape: Callable[[str], tuple[int, ...]]) -> Cost:
        one = parts.of(name)
        held = {graph.aliases[alias] for alias in graph.aliases if is_in_parts(alias, one)}
        n_params = sum(
            int(np.prod(state_shape(key), dtype=np.int64)) for key in held if graph.state[key].kind == "parameter"
        )
        return Cost(n_params, graph_macs(graph, shape, lambda node: is_in_parts(locate(node).module, one)))

    return {
        name: (cost(name, shape_of, lambda key: graph.state[key].shape), cost(name, cut.shape, cut.state_shape))
        for name in parts.names
    }
