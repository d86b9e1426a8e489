"""Choosing the units that stay: shares by group, budgets, limits, and the exact choice itself."""
