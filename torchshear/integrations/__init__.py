"""Callbacks of a pruning session for trainers; each module needs its library, which is no dependency of torchshear."""
