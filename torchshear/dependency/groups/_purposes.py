"""Purposes of the dimensions of weights, by what they say of a unit; see `torchshear.dependency.Member`."""

# What a unit's removal deletes and that is a weight of the unit itself. Input columns ("in") belong to the layers that
# read the unit and biases ("bias") are offsets; either is counted only on request. Running statistics never are, nor
# what a weight is computed of ("factor"), since its values are those of the computed weight.
OWN_PURPOSES = frozenset({"out", "depthwise", "norm", "embedding", "raw"})
MAKING_PURPOSES = frozenset({"out", "depthwise", "embedding"})  # of weights from which the units' values are made
READING_PURPOSES = frozenset({"in"})  # of weights that multiply the units' values
NORM_PURPOSES = frozenset({"norm"})

# Roles of groups (see `torchshear.dependency.ROLES`) whose units are attention heads.
HEADS = frozenset({"heads", "q_heads", "kv_heads"})
