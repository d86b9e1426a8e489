"""Seeing a network's channel groups: what shrinks with what, under which constraints, as plain data and as a page."""

from torchshear.inspection._details import Constraint, GroupDetail, MemberDetail, describe_groups, find_group
from torchshear.inspection._document import groups_document
from torchshear.inspection._page import render_page, write_page

__all__ = [
    "Constraint",
    "GroupDetail",
    "MemberDetail",
    "describe_groups",
    "find_group",
    "groups_document",
    "render_page",
    "write_page",
]
