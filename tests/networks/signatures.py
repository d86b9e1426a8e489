"""Several inputs and outputs, by name and in containers."""

import torch.nn.functional as F  # noqa: N812

from tests.networks._base import Net, conv, conv_bn, head, network, noise, picture


@network("returns (logits, None)", "signature", widths=(16,))
def returns_none():
    return Net(lambda m, x: (m.b(m.a(x)), None), a=conv_bn(3, 16), b=head(16)), (picture(),)


@network("several inputs, some by name, one unused", "signature", widths=(16,))
def several_inputs():
    def run(m, x, *, scale, context=None):
        y = F.relu(m.a(x)) * scale
        return {"main": m.c(y + m.b(context)), "side": m.d(y)}

    model = Net(run, a=conv(3, 16), b=conv(2, 16), c=conv(16, 4), d=conv(16, 2))
    return model, (picture(),), {"scale": noise(2, 1, 1, 1), "context": picture(2)}


@network("dictionary of inputs", "signature", widths=(16,))
def dict_input():
    def run(m, batch):
        return m.head(F.relu(m.a(batch["left"]) + m.b(batch["right"])))

    return Net(run, a=conv(3, 16), b=conv(1, 16), head=head(16)), ({"left": picture(), "right": picture(1)},)
