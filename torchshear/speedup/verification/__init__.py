"""Proof by comparison: a shrunk model computes what the masked model computes."""
