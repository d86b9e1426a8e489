"""Sums of products, from which the roles of channel groups are told, and the names of these roles."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from torch import fx

from torchshear.dependency.algebra._axis import Axes

ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "residual": "width of a stream to which several branches add",
        "channels": "channels between convolutions",
        "ffn": "width between linear layers, as inside a feed-forward block",
        "expert_ffn": "inner width of experts, alike in all whose weights are one tensor",
        "experts": "whole experts, with the rows of the router that choose them",
        "heads": "attention heads",
        "q_heads": "query heads inside each group that shares a key and value head",
        "kv_heads": "key and value heads, each with the query heads that it serves",
        "head_dim": "width of a head, where queries, keys and values share it",
        "qk_dim": "width over which queries and keys are multiplied",
        "v_dim": "width of the values of a head",
        "queries": "learned queries or latents: tokens that are parameters, which attention reads or is read by",
        "state": "state size of a state-space layer",
        "inner": "channels of a state-space layer, each with a state of its own",
        "hidden": "hidden size of a recurrent layer",
        "rank": "width between two linear layers with nothing in between",
        "embedding": "width of a table of embeddings that is no residual stream",
        "other": "anything else",
    }
)
"""Role of a channel group -> what its units are."""

FAMILIES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "ffn": ("ffn", "expert_ffn"),
        "heads": ("heads", "q_heads", "kv_heads"),
        "head_dim": ("head_dim", "qk_dim", "v_dim"),
    }
)
"""Role that stands for narrower ones too, where a user asks for it -> these, itself first."""

Kind = Literal["product", "convolution", "depthwise", "lookup"]


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """Two operands multiplied and summed over axes that both have; each may be a value or a weight.

    Attributes:
        kind: "product" (linear, matmul, einsum), "convolution", "depthwise" (a convolution that sums over space alone),
            or "lookup" (the product of one-hot rows with a table).
        operands: the left and the right operand.
        contracted: axes that are summed over.
        rows: axes that only the left operand has.
        columns: axes that only the right operand has.
        batch: axes that both have and the result keeps.
    """

    kind: Kind
    operands: tuple[fx.Node, fx.Node]
    contracted: Axes
    rows: Axes
    columns: Axes
    batch: Axes
