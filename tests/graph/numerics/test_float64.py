"""Computing in float64 with weights that are narrower."""

import torch
from torch import Tensor, nn

from torchshear.graph._inputs import ExampleInputs
from torchshear.graph.numerics._float64 import compute_in, to_float64


class Casting(nn.Module):
    """Casts inside, keeps a table that it writes to, and reads it through a view."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.conv, self.norm = nn.Linear(6, 8), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)
        self.rnn, self.act = nn.GRU(8, 8, batch_first=True), nn.PReLU(8)
        self.register_buffer("table", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.one(x))[0].transpose(1, 2)
        h = self.act(self.norm(self.conv(h))).float().softmax(1)
        self.table[:2].copy_(self.one.weight[:2].repeat(1, 2)[:, :8])
        self.table[0].mul_(3)
        y: Tensor = h.mean(2).to(self.one.weight.dtype) @ self.table.t() + torch.tensor(0.1, dtype=torch.float32)
        return y


def test_weights_are_widened_where_they_are_used() -> None:
    model, inputs = Casting().eval(), ExampleInputs.of((torch.randn(2, 5, 6),))
    wide_inputs = to_float64(inputs).args
    with torch.no_grad():
        with compute_in(torch.float64):
            narrow = model(*wide_inputs)
        table = model.table.clone()
        with compute_in(torch.float64):
            wide = model.double()(*wide_inputs)
    assert narrow.dtype == wide.dtype == torch.float64
    torch.testing.assert_close(narrow, wide, rtol=1e-6, atol=1e-7)  # the table alone is rounded
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), model.table, rtol=1e-6, atol=0)


def test_nothing_is_written_to_the_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad(), compute_in(torch.float64):
        narrow = model(x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32
    torch.testing.assert_close(narrow, model.double()(x).detach(), rtol=1e-14, atol=1e-14)
