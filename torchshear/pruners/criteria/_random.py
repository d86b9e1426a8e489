"""Scores drawn at random: the baseline, and a choice where there are no weights to look at."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.errors import ArgumentError
from torchshear.pruners.criteria._criterion import Criterion, criterion


def random_criterion(seed: int = 0) -> Criterion:
    """Make a criterion that draws scores from a seed, uniformly in [0, 1).

    It needs no weights, so that a model on the meta device can be planned. A group is drawn from the seed and its
    name: the same seed gives the same plan wherever and in whatever order groups are scored.

    Args:
        seed: any integer.

    Returns:
        A criterion, for `torchshear.plan(groups, criterion=random_criterion(7))`. "random" names that of seed 0.

    Raises:
        ArgumentError: `seed` is not an integer.

    Reference: Li et al., CVPR 2022, arXiv:2205.05676, who find random channels a strong baseline after fine-tuning.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentError(f"seed={seed!r}; expected an integer.")

    def random_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
        """Score each unit by a draw from a seed; shape (C,).

        s_c ~ U[0, 1), the generator's seed being made of the criterion's and of the group's name

        Low scores go first: units by chance. Needs no data.

        Reference: Li et al., CVPR 2022, arXiv:2205.05676.
        """
        digest = hashlib.sha256(f"{seed}|{group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.rand(group.width, generator=generator, dtype=torch.float64)

    random_scores.__name__ = f"random(seed={seed})"
    return random_scores


criterion("random", needs=())(random_criterion(0))
