"""Comparable numbers: float64 throughout, and the same choice among equal values."""
