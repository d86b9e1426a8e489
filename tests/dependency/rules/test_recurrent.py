"""Recurrent layers: what goes together in them, and that the smaller layer is a whole one of torch's own."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchshear
from tests.networks import Net, randomise
from tests.oracle import assert_equals_masked, assert_same_function, check_random_pruning, masked_copy
from torchshear.dependency import ChannelGroups
from torchshear.errors import CaptureError, PlanError
from torchshear.pruners import plan_from_kept

WIDTH, HIDDEN = 8, 12
INPUT = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _network(layer: nn.Module, run: Any, **parts: Any) -> nn.Module:
    net = Net(run, stem=nn.Linear(6, WIDTH), layer=layer, **parts)
    return randomise(net.double().eval(), seed=5)


def _sequence(m: Net, x: Tensor) -> Tensor:
    return m.head(m.layer(m.stem(x))[0])


def _last_of_each_direction(m: Net, x: Tensor) -> Tensor:
    h = m.layer(m.stem(x))[1]
    h = h[0] if isinstance(h, tuple) else h
    return m.head(torch.cat([h[-2], h[-1]], 1))


def _states_joined(m: Net, x: Tensor) -> Tensor:
    h = m.layer(m.stem(x))[1]
    h = h[0] if isinstance(h, tuple) else h
    return m.head(h.transpose(0, 1).flatten(1))


def _groups(model: nn.Module, *args: Tensor) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, args or (INPUT,)))


def _shapes(groups: ChannelGroups) -> list[tuple[str, int, int]]:
    return [(group.name, group.width, group.n_peers) for group in groups]


LAYERS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 4, "bias": False, "dropout": 0.5}),
    (nn.LSTM, {"bidirectional": True, "proj_size": 5}),
    (nn.GRU, {"batch_first": True, "bias": False}),
    (nn.GRU, {"num_layers": 3}),
    (nn.GRU, {"bidirectional": True}),
    (nn.RNN, {"num_layers": 2}),
    (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=lambda v: v.__name__ if isinstance(v, type) else ",".join(v))
def test_sequence_is_exact_and_native(kind: type[nn.Module], options: dict[str, Any]) -> None:
    out = options.get("proj_size", HIDDEN) * (2 if options.get("bidirectional") else 1)
    model = _network(kind(WIDTH, HIDDEN, **options), _sequence, head=nn.Linear(out, 5))
    groups = _groups(model)
    for seed in (0, 1):
        outcome = check_random_pruning(model, (INPUT,), None, seed, is_cross_channel=False, groups=groups)
        assert outcome.is_native
        assert outcome.n_cut > 0


def test_groups_of_one_layer() -> None:
    model = _network(nn.LSTM(WIDTH, HIDDEN), _sequence, head=nn.Linear(HIDDEN, 5))
    groups = _groups(model)
    assert _shapes(groups) == [("stem.weight[0]", 8, 1), ("layer.weight_ih_l0[0]", 12, 1)]
    members = {(m.name, m.dim): (m.multiplicity, sorted(m.purposes)) for m in groups[1].members}
    assert members == {
        ("layer.weight_ih_l0", 0): (4, ["out"]),
        ("layer.weight_hh_l0", 0): (4, ["out"]),
        ("layer.weight_hh_l0", 1): (1, ["in"]),
        ("layer.bias_ih_l0", 0): (4, ["bias"]),
        ("layer.bias_hh_l0", 0): (4, ["bias"]),
        ("head.weight", 1): (1, ["in"]),
    }


def test_layers_and_directions_choose_their_own_units_but_equally_many() -> None:
    layer = nn.GRU(WIDTH, HIDDEN, 2, bidirectional=True)
    model = _network(layer, _last_of_each_direction, head=nn.Linear(2 * HIDDEN, 5))
    groups = _groups(model)
    assert _shapes(groups) == [("stem.weight[0]", 8, 1), ("layer.weight_ih_l0[0]", 48, 4)]
    assert np.array_equal(groups[1].balance, np.repeat(range(4), HIDDEN))
    result = torchshear.prune(model, (INPUT,), ratio=0.5)
    masks = result.plan.masks()
    chosen = {name: tuple(mask[:HIDDEN].any(1).tolist()) for name, mask in masks.items() if "weight_ih" in name}
    assert [sum(rows) for rows in chosen.values()] == [6] * 4
    assert len(set(chosen.values())) > 1, "each layer and direction is ranked by itself"
    assert_equals_masked(model, result.model, result.plan, (INPUT,))
    uneven = np.delete(np.arange(48), [0, 1, 12])
    with pytest.raises(PlanError, match="blocks keep"):
        plan_from_kept(groups, {"layer.weight_ih_l0[0]": uneven})


def test_final_states_read_as_one_tensor_tie_the_directions() -> None:
    layer = nn.LSTM(WIDTH, HIDDEN, bidirectional=True)
    model = _network(layer, _states_joined, head=nn.Linear(2 * HIDDEN, 5))
    assert _shapes(_groups(model))[1] == ("layer.weight_ih_l0[0]", 12, 1)
    check_random_pruning(model, (INPUT,), None, 0, is_cross_channel=False)


def test_a_final_state_that_is_an_output_fixes_the_layers() -> None:
    model = _network(nn.GRU(WIDTH, HIDDEN, 2), lambda m, x: m.layer(m.stem(x)))
    groups = _groups(model)
    assert _shapes(groups) == [("stem.weight[0]", 8, 1)]
    fixed = {(f.name, f.dim): f.reason for f in groups.fixed}
    assert "model output" in fixed["layer.weight_hh_l1", 1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("n_layers", "both_ways"), [(1, False), (2, False), (1, True), (2, True)])
def test_final_states_of_all_layers_may_be_outputs_that_shrink(kind: Any, n_layers: int, both_ways: bool) -> None:
    layer = kind(WIDTH, HIDDEN, n_layers, bidirectional=both_ways)
    head = nn.Linear(HIDDEN * (1 + both_ways), 5)

    def run(m: Net, x: Tensor) -> Any:
        y, states = m.layer(m.stem(x))
        return m.head(y), states

    model = _network(layer, run, head=head)
    result = torchshear.prune(model, (INPUT,), ratio=0.5, prunable_outputs="1")
    assert [len(group.kept) for group in result.plan.groups] == [4, 6]
    masked = masked_copy(model, result.plan.masks())
    (y, *states), (expected, *wanted) = (pytree.tree_leaves(one(INPUT)) for one in (result.model, masked))
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    for state, want, output in zip(states, wanted, result.plan.outputs, strict=True):
        kept = torch.from_numpy(output.kept[2].copy())
        assert state.shape == (n_layers * (1 + both_ways), 5, 6)
        assert torch.allclose(state, want[:, :, kept], rtol=0, atol=1e-12)


def test_an_output_fixes_the_last_layer_and_with_it_the_width_of_the_others() -> None:
    groups = _groups(_network(nn.GRU(WIDTH, HIDDEN, 2), lambda m, x: m.layer(m.stem(x))[0]))
    assert _shapes(groups) == [("stem.weight[0]", 8, 1)]
    assert "another block" in next(f.reason for f in groups.fixed if f.name == "layer.weight_ih_l0")


def test_a_given_initial_state_fixes_and_a_learned_one_shrinks() -> None:
    def given(m: Net, x: Tensor, h: Tensor) -> Tensor:
        return m.head(m.layer(m.stem(x), h)[0])

    model = _network(nn.GRU(WIDTH, HIDDEN), given, head=nn.Linear(HIDDEN, 5))
    state = torch.zeros(1, 5, HIDDEN, dtype=torch.float64)
    assert _shapes(_groups(model, INPUT, state)) == [("stem.weight[0]", 8, 1)]

    def learned(m: Net, x: Tensor) -> Tensor:
        state = m.state.expand(-1, x.shape[0], -1).contiguous()
        return m.head(m.layer(m.stem(x), (state, state + 1))[0])

    start = nn.Parameter(torch.zeros(2, 1, HIDDEN))
    model = _network(nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True), learned, head=nn.Linear(HIDDEN, 5), state=start)
    assert _shapes(_groups(model)) == [("state[2]", 12, 1), ("stem.weight[0]", 8, 1)]
    check_random_pruning(model, (INPUT,), None, 0, is_cross_channel=False)


def test_encoder_hands_its_states_to_a_decoder_layer_by_layer() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        _, state = m.layer(m.stem(x))
        return m.head(m.decoder(x, state)[0])

    decoder = nn.LSTM(6, HIDDEN, 2, batch_first=True)
    layer = nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True)
    model = _network(layer, run, decoder=decoder, head=nn.Linear(HIDDEN, 5))
    groups = _groups(model)
    assert _shapes(groups)[1:] == [("layer.weight_ih_l0[0]", 24, 2)]
    for seed in (0, 1):
        assert check_random_pruning(model, (INPUT,), None, seed, is_cross_channel=False, groups=groups).is_native


def test_hidden_units_stay_more_than_the_projection_has() -> None:
    model = _network(nn.LSTM(WIDTH, HIDDEN, proj_size=8), _sequence, head=nn.Linear(8, 5))
    groups = _groups(model)
    assert (groups[1].name, groups[1].min_units, groups[1].max_cut) == ("layer.weight_ih_l0[0]", 9, 3)
    result = torchshear.prune(model, (INPUT,), ratio=0.9)
    assert (result.model.layer.hidden_size, result.model.layer.proj_size) == (9, 1)
    with pytest.raises(PlanError, match="at least 9"):
        plan_from_kept(groups, {"layer.weight_ih_l0[0]": range(8)})


def test_aligned_widths_count_for_each_layer() -> None:
    model = _network(nn.LSTM(WIDTH, 24, 3), _sequence, head=nn.Linear(24, 5))
    result = torchshear.prune(model, (INPUT,), ratio=0.4, align=8)
    assert result.model.layer.hidden_size == 16


CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {"bias": False}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"})]


@pytest.mark.parametrize(("kind", "options"), CELLS, ids=lambda v: v.__name__ if isinstance(v, type) else ",".join(v))
def test_cell_in_a_loop(kind: type[nn.Module], options: dict[str, Any]) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        x, state, steps = m.stem(x), None, []
        for step in x.unbind(1):
            state = m.layer(step, state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return m.head(torch.stack(steps, 1))

    model = _network(kind(WIDTH, HIDDEN, **options), run, head=nn.Linear(HIDDEN, 5))
    groups = _groups(model)
    assert _shapes(groups) == [("stem.weight[0]", 8, 1), ("layer.weight_ih[0]", 12, 1)]
    outcome = check_random_pruning(model, (INPUT,), None, 0, is_cross_channel=False, groups=groups)
    assert outcome.is_native


def test_shrunk_layer_is_whole() -> None:
    model = _network(nn.LSTM(WIDTH, HIDDEN, 2, bidirectional=True), _sequence, head=nn.Linear(2 * HIDDEN, 5))
    result = torchshear.prune(model, (INPUT,), ratio=0.5)
    small = result.model.layer
    fresh = nn.LSTM(4, 6, 2, bidirectional=True)
    assert (small.input_size, small.hidden_size, repr(small)) == (4, 6, repr(fresh))
    for layer in (small, copy.deepcopy(small)):
        own = [getattr(layer, name) for name in layer._flat_weights_names]
        assert all(a is b for a, b in zip(layer._flat_weights, own, strict=True))
        assert all(ref() is b for ref, b in zip(layer._flat_weight_refs, own, strict=True))
    rebuilt = randomise(copy.deepcopy(result.model), seed=9)
    rebuilt.load_state_dict(result.model.state_dict())
    assert_same_function(rebuilt, result.model, (INPUT,))
    fresh.double().load_state_dict(small.state_dict())
    steps = torch.randn(5, 3, 4, dtype=torch.float64)
    assert torch.equal(fresh(steps)[0], small(steps)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_shrunk_layer_exports(kind: type[nn.Module], tmp_path: Any) -> None:
    layer = kind(WIDTH, HIDDEN, batch_first=True, bidirectional=True)
    model = _network(layer, _last_of_each_direction, head=nn.Linear(2 * HIDDEN, 5)).float()
    result = torchshear.prune(model, (INPUT.float(),), ratio=0.5)
    file = torchshear.export_onnx(result.model, tmp_path / "small.onnx", (INPUT.float(),))
    session = InferenceSession(file.path)
    (given,) = session.run(None, {session.get_inputs()[0].name: INPUT[:1].float().numpy()})
    torch.testing.assert_close(torch.from_numpy(given), result.model(INPUT[:1].float()))


def test_cost_counts_every_step() -> None:
    model = _network(nn.GRU(WIDTH, HIDDEN, batch_first=True), _sequence, head=nn.Linear(HIDDEN, 5))
    result = torchshear.prune(model, (INPUT,), ratio=0.5)
    before, after = result.report.before.macs, result.report.after.macs
    assert before == 5 * (6 * 8 + 3 * 12 * (8 + 12) + 12 * 5)
    assert after == 5 * (6 * 4 + 3 * 6 * (4 + 6) + 6 * 5)


def test_packed_sequences_are_not_captured() -> None:
    def run(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(m.stem(x), lengths, batch_first=True, enforce_sorted=False)
        out, _ = m.layer(packed)
        return m.head(nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0])

    model = _network(nn.LSTM(WIDTH, HIDDEN, batch_first=True), run, head=nn.Linear(HIDDEN, 5))
    with pytest.raises(CaptureError, match="cannot capture"):
        torchshear.trace(model, (INPUT, torch.tensor([5, 3])))
