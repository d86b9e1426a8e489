"""Roles of the dimensions of weights by what they say of a unit; see `torchshear.dependency.Member`."""

# What a unit's removal deletes and that is a weight of the unit itself. Input columns ("in") belong to the layers that
# read the unit and biases ("bias") are offsets; either is counted only on request. Running statistics never are.
OWN_ROLES = frozenset({"out", "depthwise", "norm", "embedding", "raw"})
MAKING_ROLES = frozenset({"out", "depthwise", "embedding"})  # of weights from which the units' values are made
NORM_ROLES = frozenset({"norm"})
