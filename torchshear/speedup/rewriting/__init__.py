"""A captured graph for fewer units: its sizes, its tensors, and the module that runs it."""
