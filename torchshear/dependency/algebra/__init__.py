"""Axes of tensors as rows of positions, and the units that decide which positions go together."""
