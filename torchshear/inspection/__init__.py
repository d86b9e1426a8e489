"""Seeing a network's channel groups: what shrinks with what, under which constraints, as plain data and as a page."""

from torchshear.inspection._details import GroupDetail, describe_groups
from torchshear.inspection._page import write_page

__all__ = [
    "GroupDetail",
    "describe_groups",
    "write_page",
]
