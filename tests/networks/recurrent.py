"""Recurrent layers."""

import torch
from torch import nn

from tests.networks._base import Net, network, noise


def _recurrent(layer: nn.Module) -> tuple:
    return Net(lambda m, x: m.fc(m.rnn(x)[0]), rnn=layer, fc=nn.Linear(16, 5)), noise(2, 3, 8)


@network("nn.LSTM: gate blocks of the weights go with the hidden units", "recurrent", widths=(16,))
def lstm():
    return _recurrent(nn.LSTM(8, 16, batch_first=True))


@network(
    "nn.GRU of two layers with dropout: gate blocks of the weights go with the hidden units", "recurrent", widths=(32,)
)
def gru():
    return _recurrent(nn.GRU(8, 16, num_layers=2, batch_first=True, dropout=0.3))


@network("nn.RNN: gate blocks of the weights go with the hidden units", "recurrent", widths=(16,))
def rnn():
    return _recurrent(nn.RNN(8, 16, batch_first=True))


@network("a bidirectional LSTM of two layers with projections, read at its final states", "recurrent", widths=(24, 64))
def lstm_final_states():
    def run(m, x):
        _, (state, _) = m.rnn(x)
        return m.fc(torch.cat([state[-2], state[-1]], 1))

    layer = nn.LSTM(8, 16, num_layers=2, bidirectional=True, proj_size=6)
    return Net(run, rnn=layer, fc=nn.Linear(12, 5)), noise(3, 2, 8)
