"""Networks with recurrent layers and cells."""

from typing import Any

from torch import Tensor, nn

from mutation_networks._base import linear, network

for name, make in {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}.items():
    given = {"nonlinearity": "relu"} if name == "rnn_relu" else {}
    for options in ({"batch_first": True}, {"num_layers": 2, "bidirectional": True, "batch_first": True}):
        wide = 24 if "bidirectional" in options else 12
        build = lambda make=make, options={**given, **options}: make(8, 12, **options)  # noqa: E731
        network(
            f"{name}.input", lambda m, x: m.two(m.layer(m.one(x))[0]), (3, 5, 4),
            one=linear(4, 8), layer=build, two=linear(wide, 3),
        )  # fmt: skip

        def last(m: Any, x: Tensor) -> Tensor:
            """Final states of the last layer."""
            state = m.layer(m.one(x))[1]
            state = state[0] if isinstance(state, tuple) else state
            return m.two(state[-1])

        network(f"{name}.input", last, (3, 5, 4), one=linear(4, 8), layer=build, two=linear(12, 3))
network(
    "lstm.input", lambda m, x: m.two(m.layer(m.one(x))[0]), (3, 5, 4), one=linear(4, 8),
    layer=lambda: nn.LSTM(8, 12, 2, batch_first=True, proj_size=6), two=linear(6, 3),
)  # fmt: skip
network(
    "lstm.input", lambda m, x: m.two(m.other(m.one(x), m.layer(m.one(x))[1])[0]), (3, 5, 4), one=linear(4, 8),
    layer=lambda: nn.LSTM(8, 12, 2, batch_first=True), other=lambda: nn.LSTM(8, 12, 2, batch_first=True),
    two=linear(12, 3),
)  # fmt: skip
for name, make in {
    "lstm_cell": nn.LSTMCell,
    "gru_cell": nn.GRUCell,
    "rnn_tanh_cell": nn.RNNCell,
    "rnn_relu_cell": lambda i, o: nn.RNNCell(i, o, nonlinearity="relu"),
}.items():

    def stepped(m: Any, x: Tensor) -> Tensor:
        """Two steps of a cell."""
        state = m.cell(m.one(x[:, 0]))
        state = m.cell(m.one(x[:, 1]), state)
        return m.two(state[0] if isinstance(state, tuple) else state)

    network(name, stepped, (3, 2, 4), one=linear(4, 8), cell=lambda make=make: make(8, 12), two=linear(12, 3))
