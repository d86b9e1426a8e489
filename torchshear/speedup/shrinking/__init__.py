"""Shrinking a model by a plan: the whole of it or its parts, native where that is possible, traced elsewhere."""
