"""Operators on the kept positions of their operands alone: the reference that a cut is compared with."""
