"""Proof by comparison: a shrunk model computes what the masked model computes."""

from torchshear.speedup.verification._verify import Verification, verify, verify_analyzed

__all__ = ["Verification", "verify", "verify_analyzed"]
