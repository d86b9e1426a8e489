"""From a captured graph to channel groups: the walk over the graph, the constraints, roles and costs of groups."""
