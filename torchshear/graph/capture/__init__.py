"""Capture of a model: torch.export, batches of other sizes, checks of the graph, functions with their own backward."""
