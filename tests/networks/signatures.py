"""Several inputs and outputs, by name and in containers."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.networks._base import Net, conv, conv_bn, head, network, noise, picture


@network("returns (logits, None)", "signature", widths=(16,))
def returns_none():
    return Net(lambda m, x: (m.b(m.a(x)), None), a=conv_bn(3, 16), b=head(16)), picture()


class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 16), conv(2, 16), conv(16, 4), conv(16, 2)

    def forward(self, x: Tensor, *, scale: Tensor, context: Tensor | None = None) -> dict[str, Tensor]:
        y = F.relu(self.a(x)) * scale
        return {"main": self.c(y + self.b(context)), "side": self.d(y)}


@network("several inputs and outputs, some by name", "signature", widths=(16,))
def several_inputs():
    return SeveralInputs(), (picture(),), {"scale": noise(2, 1, 1, 1), "context": picture(2)}


@network("dictionary of inputs", "signature", widths=(16,))
def dict_input():
    def run(m, batch):
        return m.head(F.relu(m.a(batch["left"]) + m.b(batch["right"])))

    return Net(run, a=conv(3, 16), b=conv(1, 16), head=head(16)), ({"left": picture(), "right": picture(1)},)
