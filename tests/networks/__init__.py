"""Small networks that tests of all parts use, by topic, and a registry of them.

A rule, a criterion or an invariant is proved over `NETWORKS`, or over those that `tagged` picks. Many are what a tool
without axes (one implicit channel index, matched by position) cannot prune correctly, derived from the public code of
Torch-Pruning 1.6.1 and its issue threads.
"""

from typing import Any

import pytest

from tests.networks import attention, feed_forward, gates, layers, norms, plain, recurrent, routing, signatures, weights
from tests.networks._base import (
    REGISTERED,
    Between,
    LooksAtValues,
    Net,
    Network,
    analyzed,
    classified,
    image,
    labelled,
    network,
    noise,
    picture,
    randomise,
    zero,
)
from tests.networks.attention import Attention, FusedAttention, Separate, ViTBlock
from tests.networks.feed_forward import FeedForward, TwoReaders
from tests.networks.norms import Grouped
from tests.networks.plain import Classifier, Residual
from tests.networks.routing import Chunked
from tests.networks.weights import Tied

NETWORKS = tuple(REGISTERED.values())


def named(*names: str) -> tuple[Network, ...]:
    """The networks of the given names, in their order."""
    return tuple(REGISTERED[name] for name in names)


def tagged(tag: str) -> tuple[Network, ...]:
    """The networks that a tag is true of."""
    return tuple(one for one in NETWORKS if tag in one.tags)


def third(number: int) -> list[Any]:
    """Every network that can be cut, as parameters of a test; all but every third one, from one on, are for test-zoo.

    Args:
        number: the first that the default suite takes, of 0, 1 and 2. Tests that take long take different ones, so that
            each network is in some of them every time.
    """
    prunable = (one for one in NETWORKS if "refused" not in one.tags)
    return [
        pytest.param(one, id=one.name, marks=[] if place % 3 == number else [pytest.mark.zoo])
        for place, one in enumerate(prunable)
    ]


__all__ = [
    "NETWORKS", "Attention", "Between", "Chunked", "Classifier", "FeedForward", "FusedAttention", "Grouped",
    "LooksAtValues", "Net", "Network", "Residual", "Separate", "Tied", "TwoReaders", "ViTBlock", "analyzed",
    "attention", "classified", "feed_forward", "gates", "image", "labelled", "layers", "named", "network", "noise",
    "norms", "picture", "plain", "randomise", "recurrent", "routing", "signatures", "tagged", "third", "weights",
    "zero",
]  # fmt: skip
