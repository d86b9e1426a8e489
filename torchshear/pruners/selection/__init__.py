"""Selection of the units that stay: a share or limits for each group, a budget for all, and the exact choice."""
