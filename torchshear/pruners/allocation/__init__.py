"""Allocation of widths to groups within budgets, solved exactly."""
