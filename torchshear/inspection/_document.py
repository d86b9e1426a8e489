"""Channel groups of a network as plain data, for JSON."""

from dataclasses import asdict
from typing import Any

from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import dense_cost
from torchshear.inspection._details import describe_groups


def groups_document(groups: ChannelGroups) -> dict[str, Any]:
    """Return the channel groups of a network and its fixed dimensions, as data that `json` writes.

    Args:
        groups: the analysed network.

    Returns:
        `model` (class name), `n_params`, `macs`, `groups` (see `GroupDetail`) and `fixed` (see `FixedDimension`).
    """
    return {
        "model": groups.graph.model_type,
        **asdict(dense_cost(groups.graph)),
        "groups": [asdict(detail) for detail in describe_groups(groups)],
        "fixed": [asdict(dimension) for dimension in groups.fixed],
    }
