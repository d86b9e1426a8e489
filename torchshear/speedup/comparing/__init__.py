"""Comparing models: inputs and weights that exercise them, and outputs element by element."""
