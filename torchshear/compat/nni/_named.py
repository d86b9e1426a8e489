"""The pruners by name: each says by what units are ranked."""

from typing import ClassVar

from torchshear.compat.nni._pruner import Pruner


class ConfigPruner(Pruner):
    """Prunes as a config of Neural Compressor says, whose pruners name criteria and patterns themselves.

    magnitude, gradient, snip and snip_momentum; single weights ("1x1"), blocks ("4x1"), "N:M", input and output
    channels ("channelx1", "1xchannel") and heads ("mha"). Channels and heads go for real in `shrink`; the rest are
    zeros.
    """


class LevelPruner(Pruner):
    """Masks the single weights of least magnitude.

    score of w = |w|; of each layer the floor(n * sparsity) lowest of its n weights become zero.

    Reference: Han et al., NeurIPS 2015, arXiv:1506.02626.
    """

    criterion: ClassVar[str | None] = "l1"
    pattern: ClassVar[str] = "1x1"


class L1FilterPruner(Pruner):
    """Removes the filters of least L1 norm.

    score of channel c = sum over the layers of its group of ||W[c]||_1

    Reference: Li et al., ICLR 2017, arXiv:1608.08710.
    """

    criterion: ClassVar[str | None] = "l1"


class L2FilterPruner(Pruner):
    """Removes the filters of least L2 norm.

    score of channel c = (sum over the layers of its group of ||W[c]||_2^2)^(1/2)

    Reference: Li et al., ICLR 2017, arXiv:1608.08710.
    """

    criterion: ClassVar[str | None] = "l2"


class FPGMPruner(Pruner):
    """Removes the filters that are nearest to all others, and so the easiest to replace.

    score of channel c = sum over the layers of its group, and over channels j, of ||W[c] - W[j]||_2

    Reference: He et al., CVPR 2019, arXiv:1811.00250; which prunes while training, and this once.
    """

    criterion: ClassVar[str | None] = "fpgm"


class ActivationAPoZRankFilterPruner(Pruner):
    """Removes the channels whose activations are zero most often; needs `data`.

    score of channel c = 1 - share of zeros behind the activation, over all samples and places

    Reference: Hu et al., 2016, arXiv:1607.03250.
    """

    criterion: ClassVar[str | None] = "apoz"


class ActivationMeanRankFilterPruner(Pruner):
    """Removes the channels of least mean activation; needs `data`.

    score of channel c = mean of |a_c| behind the activation, over all samples and places

    Reference: Molchanov et al., ICLR 2017, arXiv:1611.06440.
    """

    criterion: ClassVar[str | None] = "mean_activation"


class TaylorFOWeightFilterPruner(Pruner):
    """Removes the channels of least first-order importance of their weights; needs `data` and `loss_fn`.

    score of channel c = sum over batches, and over the weights w of the channel, of (w dL/dw)^2

    Reference: Molchanov et al., CVPR 2019, arXiv:1906.10771.
    """

    criterion: ClassVar[str | None] = "taylor"


# The names of NNI 2.3 and later.
L1NormPruner = L1FilterPruner
L2NormPruner = L2FilterPruner
ActivationAPoZRankPruner = ActivationAPoZRankFilterPruner
ActivationMeanRankPruner = ActivationMeanRankFilterPruner
TaylorFOWeightPruner = TaylorFOWeightFilterPruner
