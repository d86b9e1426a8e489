"""An estimate of how much a network would shrink, by widths alone, before units are chosen."""

import numpy as np

from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.graph import Graph
from torchshear.graph.capture._part_advice import Forecast, register_forecast


def forecast(graph: Graph) -> Forecast:
    """Estimate the parameters of a network, and of the same with half of its channels.

    Args:
        graph: the captured model, or parts of it.
    """
    groups = analyze(graph)
    widths = np.array([group.width for group in groups], np.int64)
    halves = np.array([group.width - min(group.width // 2, group.max_cut) for group in groups], np.int64)
    cost = WidthCost(groups)
    return Forecast(cost(widths).n_params, cost(halves).n_params)


register_forecast(forecast)
