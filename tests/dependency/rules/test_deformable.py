"""A deformable convolution is fixed at its boundary; everything around it shrinks."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Net, randomise
from tests.oracle import check_random_pruning
from tests.zoo.torchvision_models import is_installed, load_torchvision

pytestmark = pytest.mark.skipif(not is_installed(), reason="torchvision is an extra")


@pytest.fixture
def deform_conv2d() -> Iterator[torch._ops.OpOverload]:
    """torchvision's operator; where its own library does not load, with a kernel that moves nothing."""
    load_torchvision()
    operator = torch.ops.torchvision.deform_conv2d.default
    if torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::deform_conv2d", "CPU"):
        yield operator
        return

    def plain(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *rest: object) -> Tensor:
        return functional.conv2d(x, weight, bias, padding=1) * mask.mean(1, keepdim=True) + offset.sum(1, keepdim=True)

    with torch.library._scoped_library("torchvision", "FRAGMENT") as library:
        library.impl("deform_conv2d", plain, "CPU")
        if not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::deform_conv2d", "Meta"):
            library.impl("deform_conv2d", plain, "Meta")
        yield operator


def test_it_is_fixed_at_its_boundary(deform_conv2d: torch._ops.OpOverload) -> None:
    rest = (1, 1, 1, 1, 1, 1, 1, 1, True)[: len(deform_conv2d._schema.arguments) - 5]

    def run(m: Net, x: Tensor) -> Tensor:
        x = torch.relu(m.neck(torch.relu(m.stem(x))))
        offset, mask = m.offset(x), m.mask(x).sigmoid()
        y = deform_conv2d(x, m.weight, offset, mask, m.bias, *rest)
        return m.last(torch.relu(m.after(y)))

    layers = {
        "stem": nn.Conv2d(3, 12, 3, padding=1),
        "neck": nn.Conv2d(12, 8, 1),
        "offset": nn.Conv2d(8, 18, 3, padding=1),
        "mask": nn.Conv2d(8, 9, 3, padding=1),
        "after": nn.Conv2d(10, 14, 1),
        "last": nn.Conv2d(14, 5, 1),
    }
    net = Net(run, weight=nn.Parameter(torch.zeros(10, 8, 3, 3)), bias=nn.Parameter(torch.zeros(10)), **layers)
    model = randomise(net.double().eval(), seed=3)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    assert [(group.name, group.width) for group in groups] == [("stem.weight[0]", 12), ("after.weight[0]", 14)]
    reasons = {(fixed.name, fixed.dim): fixed.reason for fixed in groups.fixed}
    for key in (("weight", 0), ("weight", 1), ("neck.weight", 0), ("offset.weight", 0), ("after.weight", 1)):
        assert "deformable convolution is fixed at its boundary: torchvision.deform_conv2d" in reasons[key]
    check_random_pruning(model, (x,), None, 0, is_cross_channel=False)
