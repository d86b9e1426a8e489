"""Sessions by config lists: channels and single weights together, entry by entry, by a schedule."""

import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.training.loops import adam, images, perceptron, residual, sgd, steps_of, train, vectors
from torchshear.compat.nni import ConfigPruner, L1FilterPruner
from torchshear.configs import parse_config
from torchshear.errors import ArgumentError, MaskError
from torchshear.pruners import masks
from torchshear.pruners.regularizers import ADMM, BlockLasso, GrowingL2
from torchshear.pruners.schedules import AGP, Linear, OneShot
from torchshear.pruners.schedules._several import Several
from torchshear.training._training_config import TrainingConfig

ROWS = {"op_names": ["0"], "pattern": "1xchannel", "pruning_type": "magnitude", "target_sparsity": 0.5}
BLOCKS = {"op_names": ["2"], "pattern": "4x1", "pruning_type": "magnitude", "target_sparsity": 0.5}
BOTH = [ROWS, BLOCKS]


def laid(model: nn.Module) -> dict[str, Tensor]:
    return dict(masks.applied_masks(model).tensors)


def session_of(model: nn.Module, config: Any, optimizer: Any = None, **options: Any) -> torchshear.PruningSession:
    settings: dict[str, Any] = {"schedule": Linear(start=0, end=8, frequency=2), **options}
    return torchshear.PruningSession(model, vectors(0)[0], config=config, optimizer=optimizer, **settings)


def blocks(weight: Tensor) -> Tensor:
    """Mean magnitude of the blocks of four outputs by one input, shape (blocks of outputs, inputs)."""
    return weight.detach().abs().reshape(-1, 4, weight.shape[1]).mean(1)


def test_channels_and_blocks_follow_the_schedule_each_by_its_entry() -> None:
    """At every event rows of the first layer and blocks of the second go, as many as asked, and none comes back."""
    model = perceptron()
    with torch.no_grad():
        model[0].bias.zero_()
    optimizer = sgd(model, 0.3)
    session = session_of(model, BOTH, optimizer)
    gone_rows, gone_blocks = torch.zeros(16, dtype=torch.bool), torch.zeros(3 * 16, dtype=torch.bool)
    for step in steps_of(session, model, optimizer, lambda step: vectors(step), 9):
        if step % 2:
            continue
        mask = laid(model)
        n_rows, n_blocks = step, 6 * step // 2  # an eighth, ... of 16 rows and of 48 blocks
        assert torch.equal(~mask["0.weight"].any(1), ~mask["0.bias"])
        assert int((~mask["0.bias"]).sum()) == n_rows
        assert bool((gone_rows <= ~mask["0.bias"]).all())
        gone_rows = ~mask["0.bias"]
        found = mask["2.weight"] | gone_rows[None]  # columns of rows that are gone belong to neither
        whole = found.reshape(3, 4, 16)
        assert bool((whole.all(1) | ~whole.any(1) | gone_rows[None]).all())
        own = dict(session._renewer.choice.singles)["2.weight"].reshape(3, 4, 16)
        assert int((~own.any(1)).sum()) == n_blocks
        assert bool((own.all(1) == own.any(1)).all())
        assert bool((gone_blocks <= ~own.any(1).flatten()).all())
        gone_blocks = ~own.any(1).flatten()
        assert torch.equal(mask["2.weight"], own.reshape(12, 16) & ~gone_rows[None])
    history = session.history
    assert [one.asked for one in history.renewals] == pytest.approx([0, 1 / 8, 1 / 4, 3 / 8, 1 / 2])
    assert [one.reached for one in history.renewals] == pytest.approx([0, 1 / 8, 1 / 4, 3 / 8, 1 / 2])
    assert (history.unit, history.target) == ("channels and weights", 0.5)
    assert history.renewals[-1].widths == {"0.weight[0]": 8, "2.weight": 96}
    result = session.finish()
    assert result.model[0].out_features == 8
    assert result.verification.max_error < 1e-12
    assert [row.pattern for row in result.config.rows] == ["out_channel", "4x1", ""]
    x, _ = vectors(50)
    torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-12)


def test_what_is_least_at_an_event_goes() -> None:
    """Weights are set by hand before each event, so that rows and blocks change places in the order."""
    model = perceptron()
    session = session_of(model, BOTH, schedule=Linear(start=-1, end=3))  # a quarter of what is asked at each step
    session.on_train_begin()
    session.on_epoch_begin(0)
    first = model[0].parametrizations.weight.original
    second = model[2].parametrizations.weight.original
    gone_rows: set[int] = set()
    gone_blocks: set[int] = set()
    with torch.no_grad():
        model[0].parametrizations.bias.original.zero_()
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            first.copy_(torch.rand(first.shape, generator=generator, dtype=first.dtype))
            second.copy_(torch.rand(second.shape, generator=generator, dtype=second.dtype))
            session.on_step_begin(step)
            rows, grid = first.abs().sum(1), blocks(second).flatten()
            order = [i for i in rows.argsort().tolist() if i not in gone_rows]
            gone_rows |= set(order[:2])
            order = [i for i in grid.argsort().tolist() if i not in gone_blocks]
            gone_blocks |= set(order[:6])
            mask = laid(model)
            assert set((~mask["0.bias"]).nonzero().flatten().tolist()) == gone_rows
            own = session._renewer.choice.singles["2.weight"].reshape(3, 4, 16)
            assert set((~own.any(1)).flatten().nonzero().flatten().tolist()) == gone_blocks
            session.on_before_optimizer_step()
            session.on_after_optimizer_step()
            session.on_step_end()


def steps_by_hand(session: Any, gradients: dict[str, list[Tensor]], n_steps: int) -> list[dict[str, Tensor]]:
    """Steps without an optimizer, with gradients that are set by hand; gives the masks that lie in each step."""
    session.on_train_begin()
    session.on_epoch_begin(0)
    seen = []
    for step in range(n_steps):
        session.on_step_begin(step)
        seen.append(laid(session.model))
        for name, parameter in session.model.named_parameters():
            plain = name.replace("parametrizations.", "").replace(".original", "")
            found = gradients.get(plain)
            parameter.grad = torch.zeros_like(parameter) if found is None else found[min(step, len(found) - 1)].clone()
        session.on_before_optimizer_step()
        session.on_after_optimizer_step()
        session.on_step_end()
    return seen


def test_what_went_goes_first_whatever_is_said_of_it_later() -> None:
    """Rows that are gone get the largest scores; others go beside them, and none comes back."""
    model = perceptron()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    rows = torch.arange(1.0, 17, dtype=torch.float64)[:, None].expand(16, 8)
    session = session_of(model, [{**ROWS, "pruning_type": "snip_momentum"}], schedule=Linear(start=0, end=4))
    seen = steps_by_hand(session, {"0.weight": [rows, 100 * rows.flip(0)]}, 5)
    # 2 of the first, which are least after one step; later the last rows have least of what is summed
    gone = [(~mask["0.weight"]).all(1).nonzero().flatten().tolist() for mask in seen]
    assert gone == [[], [0, 1], [0, 1, 14, 15], [0, 1, 12, 13, 14, 15], [0, 1, 10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize("pattern", ["4x1", "1xchannel"])
def test_what_is_on_the_way_stays_as_it_was_chosen(pattern: str) -> None:
    """While blocks go in stages the scores change, and another entry has an event: the blocks are the same ones."""
    model = perceptron()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    staged = {**ROWS, "pattern": pattern, "pruning_type": "snip_momentum"}
    entries = parse_config([staged, {**BLOCKS, "op_names": ["2"]}], "neural_compressor")
    schedules = {entries[0].label: Linear(start=0, end=8, frequency=4), entries[1].label: Linear(start=0, end=12)}
    config = TrainingConfig(entries=entries, schedules=schedules, stages={entries[0].label: 1})
    rows = torch.arange(1.0, 17, dtype=torch.float64)[:, None].expand(16, 8)
    session = session_of(model, config, schedule=Several(tuple(schedules.values())))
    seen = steps_by_hand(session, {"0.weight": [rows] * 4 + [1e4 * rows.flip(0)]}, 8)
    gone = (~seen[7]["0.weight"]).all(1).nonzero().flatten().tolist()
    assert gone == [0, 1, 2, 3]
    assert bool(seen[7]["0.weight"][4:].all())
    parts = [int((~mask["0.weight"]).sum()) for mask in seen]
    if pattern == "4x1":  # of a channel the columns that read it have gone before, whose gradients are 0 here
        assert parts == [0, 0, 0, 0, 8, 16, 24, 32]
    assert parts[3:] == sorted(parts[3:])
    others = [int((~mask["2.weight"][:, 4:]).sum()) for mask in seen]
    assert others == sorted(others)
    assert others[4] < others[7]


CONFIGS: dict[str, Any] = {
    "nni": [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["last"], "sparsity": 0.25}],
    "nni pool": [{"op_types": ["Conv2d"], "total_sparsity": 0.4, "max_sparsity_per_layer": 0.7}],
    "nni 3": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": 1, "min_sparse_ratio": 0.3}],
    "nni blocks": [{"op_names": ["last"], "sparse_ratio": 0.5, "granularity": [4, 1]},
                   {"op_names": ["stem", "side"], "sparse_ratio": 0.25}],
    "pools": [{"op_names": ["stem", "side", "last"], "pattern": "1xchannel", "target_sparsity": 0.4,
               "pruning_type": "magnitude", "min_sparsity_ratio_per_op": 0.3}],
    "mixed": [{"op_names": ["stem", "side"], "pattern": "1x1", "target_sparsity": 0.6, "pruning_type": "magnitude"},
              {"op_names": ["last"], "pattern": "1xchannel", "target_sparsity": 0.25, "pruning_type": "magnitude"}],
    "2:4": [{"op_names": ["last"], "pattern": "2:4", "target_sparsity": 0.5, "pruning_type": "magnitude"}],
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("schedule", [OneShot(at=0), AGP(end=4, frequency=2)], ids=["at once", "agp"])
def test_without_training_it_is_what_the_pruner_of_the_config_gives(config: Any, schedule: Any) -> None:
    model, x = residual(), images(0)[0]
    session = torchshear.PruningSession(residual(), x, config=config, schedule=schedule)
    session.on_train_begin()
    session.on_epoch_begin(0)
    for step in range(5):
        session.on_step_begin(step)
        session.on_before_optimizer_step()
        session.on_after_optimizer_step()
        session.on_step_end()
    session.on_epoch_end()
    session.on_train_end()
    found, result = laid(session.model), session.finish()
    if any("granularity" in entry or entry.get("pattern", "1xchannel") != "1xchannel" for entry in config):
        pruner = (ConfigPruner if "pruning_type" in config[0] else L1FilterPruner)(model, config, args=x)
        expected, expected_result = dict(pruner.masks.tensors), pruner.shrink()
    else:
        expected_result = torchshear.prune(model, x, config=config)
        expected = expected_result.plan.masks()
    widths = [{group.name: group.kept.size for group in one.plan.groups} for one in (result, expected_result)]
    if isinstance(schedule, AGP):  # what goes later is chosen by what is left by then
        assert sum(widths[0].values()) == pytest.approx(sum(widths[1].values()), abs=1)
    else:
        assert widths[0] == widths[1]
        own = {} if "granularity" in config[0] else found  # filters alone score there, and all that goes here
        for name, mask in own.items():
            assert torch.equal(mask, expected.get(name, torch.ones_like(mask))), name
    assert session.history.reached == pytest.approx(session.history.target, abs=0.06)


def test_each_entry_goes_by_its_own_criterion() -> None:
    """Blocks of one layer by S <- 0.9 S + |w g| of the training, those of the other by magnitude."""
    model = perceptron()
    optimizer = sgd(model, 0.1)
    config = [BLOCKS, {**BLOCKS, "op_names": ["0"], "pruning_type": "snip_momentum"}]
    session = session_of(model, config, optimizer, schedule=OneShot(at=4))
    again, its_optimizer = perceptron(), None
    its_optimizer = sgd(again, 0.1)
    total = torch.zeros(16, 8, dtype=torch.float64)
    for step in range(4):
        x, target = vectors(step)
        functional.cross_entropy(again(x), target).backward()
        total = 0.9 * total + (again[0].weight * again[0].weight.grad).abs().detach()
        its_optimizer.step()
        its_optimizer.zero_grad()
    train(session, model, optimizer, vectors, 5)
    for name, scores in (("0.weight", blocks(total)), ("2.weight", blocks(again[2].weight))):
        kept = laid(model)[name].reshape(-1, 4, scores.shape[1])[:, 0]
        least = scores.flatten().argsort()[: scores.numel() // 2].tolist()
        assert set((~kept).flatten().nonzero().flatten().tolist()) == set(least)
    assert session.history.unit == "weights"


CASES: dict[str, dict[str, Any]] = {
    "both": {"config": BOTH},
    "gradients": {"config": [{**ROWS, "pruning_type": "snip"}, {**BLOCKS, "pruning_type": "snip_momentum"}],
                  "schedule": AGP(start=1, end=7, frequency=3)},
    "stages": {"config": BOTH, "progressive": True, "schedule": Linear(start=0, end=8, frequency=4)},
    "admm": {"config": BOTH, "regularizer": ADMM(0.1, every=2), "schedule": OneShot(at=7)},
    "soft": {"config": BOTH, "soft": True},
    "shrinking": {"config": [ROWS], "shrink_every": 1},
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_killed_at_any_step_it_goes_on_with_the_same_numbers(options: dict[str, Any]) -> None:
    def begin() -> tuple[nn.Module, Any, Any]:
        model = perceptron()
        optimizer = adam(model)
        return model, optimizer, session_of(model, optimizer=optimizer, **options)

    def loop(session: Any, model: nn.Module, optimizer: Any, first: int = 0) -> Any:
        return steps_of(session, lambda x: session.model(x), optimizer, vectors, 10, first=first)

    model, optimizer, session = begin()
    saved = []
    for _ in loop(session, model, optimizer):
        file = io.BytesIO()
        torch.save([session.state_dict(), session.model.state_dict(), optimizer.state_dict()], file)
        saved.append(file.getvalue())
    whole = session.finish()
    for step in (0, 2, 5, 8):
        again, its_optimizer, other = begin()
        states = torch.load(io.BytesIO(saved[step]), weights_only=True)
        other.load_state_dict(states[0])
        other.model.load_state_dict(states[1])
        its_optimizer.load_state_dict(states[2])
        for _ in loop(other, again, its_optimizer, first=step + 1):
            pass
        for one, two in zip(other.model.parameters(), session.model.parameters(), strict=True):
            assert torch.equal(one, two)
        assert other.history.renewals == session.history.renewals
        mine, theirs = other.finish().model.state_dict(), whole.model.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_channels_shrink_on_the_way_and_weights_do_not() -> None:
    model = perceptron()
    optimizer = sgd(model)
    session = session_of(model, [ROWS], optimizer, shrink_every=1)
    widths = []
    for _ in steps_of(session, lambda x: session.model(x), optimizer, vectors, 9):
        widths.append(session.model[0].out_features)
    assert widths == [16, 16, 14, 14, 12, 12, 10, 10, 8]
    assert session.finish().plan.groups[0].width == 16
    for config, options in ((BOTH, {}), ([ROWS], {"progressive": True, "schedule": Linear(end=8, frequency=4)})):
        with pytest.raises(ArgumentError, match="do not go together: only channels that stay away"):
            session_of(perceptron(), config, sgd(perceptron()), shrink_every=1, **options)


def test_channels_and_blocks_go_in_quarters() -> None:
    """Single weights of least magnitude first, for each entry by itself; biases last; whole units in the end."""
    model = perceptron()
    optimizer = sgd(model, 0.0)
    dense = {name: one.detach().clone() for name, one in model.named_parameters()}
    schedule = Linear(start=0, end=8, frequency=8)
    session = session_of(model, BOTH, optimizer, schedule=schedule, progressive=True)
    seen: list[dict[str, Tensor]] = []
    for _ in steps_of(session, model, optimizer, vectors, 16, per_epoch=20):
        seen.append(laid(model))
    assert all(bool(mask.all()) for mask in seen[7].values())
    final, names = seen[15], ("0.weight", "2.weight")
    for stage, step in enumerate((8, 10, 12, 14), 1):
        for at in (step, step + 1):
            blocks_gone = ~seen[at]["2.weight"] & ~session._renewer.choice.singles["2.weight"]
            n_all = int((~final["2.weight"]).sum())
            assert abs(int((~seen[at]["2.weight"]).sum()) - n_all * stage // 4) <= 1
            assert int(blocks_gone.sum()) <= n_all
            assert bool(seen[at]["0.bias"].all()) == (stage < 4)
            n_rows = int((~final["0.weight"]).sum())
            in_rows = int((~seen[at]["0.weight"]).sum())
            assert in_rows >= n_rows * (stage - 1) // 4
        if stage < 4:
            for name in names:
                went, later = dense[name].abs()[~seen[step][name]], dense[name].abs()[seen[step][name] & ~final[name]]
                if name == "0.weight":
                    assert float(went.max()) <= float(later.min()) + 1e-12
    assert bool((final["0.weight"].all(1) | ~final["0.weight"].any(1)).all())
    assert all(bool((one[name] | ~two[name]).all()) for one, two in itertools.pairwise(seen) for name in one)
    assert session.finish().model[0].out_features == 8
    assert [one.widths["0.weight[0]"] for one in session.history.renewals] == [16, 16, 16, 16, 8]
    assert [round(one.reached, 2) for one in session.history.renewals][-1] == 0.5


def test_admm_pulls_channels_and_blocks() -> None:
    """Behind a projection Z has zeros in the least rows with all that reads them, and in the least blocks."""
    model = perceptron()
    optimizer = sgd(model, 0.02)
    session = session_of(model, BOTH, optimizer, regularizer=ADMM(0.05, every=3), schedule=OneShot(at=200))
    for step in steps_of(session, model, optimizer, vectors, 3):
        if step == 2:
            state = session.state_dict()["penalty"]
    z = {key: one for key, one in state["z"].items() if key == "2.weight" or "0.weight|0.weight" in key}
    assert "2.weight" in state["z"]
    weight = model[2].weight.detach()  # U = W - Z after the first projection, which is of W itself
    squares = weight.square().reshape(3, 4, 16).sum(1)
    gone = set((z["2.weight"].reshape(3, 4, 16).abs().sum(1) == 0).flatten().nonzero().flatten().tolist())
    assert gone == set(squares.flatten().argsort()[:24].tolist())
    first = model[0].weight.detach().square().sum(1) + model[0].bias.detach().square() + weight.square().sum(0)
    lines = next(one for key, one in state["z"].items() if "|0.weight|" in key)
    assert set((lines.abs().sum(1) == 0).nonzero().flatten().tolist()) == set(first.argsort()[:8].tolist())
    assert {"2.weight", "0.weight[0]"} == set(session.history.residuals[0].by_name)


@pytest.mark.parametrize("regularizer", [GrowingL2(0.1, every=2), BlockLasso("4x1", 1e-3)], ids=repr)
def test_other_regularizers_press_what_a_config_takes(regularizer: Any) -> None:
    model = perceptron()
    optimizer = sgd(model)
    session = session_of(model, BOTH, optimizer, regularizer=regularizer, schedule=OneShot(at=7))
    train(session, model, optimizer, vectors, 9, adds_penalty=True)
    assert all(map(math.isfinite, session.history.penalties))
    assert max(session.history.penalties) > 0
    assert session.finish().model[0].out_features == 8


def test_files_and_data(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "pruning_configs:\n- {op_names: ['0'], pattern: 1xchannel}\npruning_type: snip\ntarget_sparsity: 0.5\n"
    )
    model = perceptron()
    session = torchshear.PruningSession(
        model, vectors(0)[0], config=path, schedule=OneShot(at=0), data=[vectors(3), vectors(4)], batches=2,
        loss_fn=functional.cross_entropy,
    )  # fmt: skip
    session.on_train_begin()
    session.on_epoch_begin(0)
    session.on_step_begin(0)
    scores = torch.zeros(16, dtype=torch.float64)
    other = perceptron().eval()
    for number in (3, 4):
        other.zero_grad()
        functional.cross_entropy(other(vectors(number)[0]), vectors(number)[1]).backward()
        scores += (other[0].weight * other[0].weight.grad).abs().sum(1).detach()
        scores += (other[0].bias * other[0].bias.grad).abs().detach()
    gone = (~laid(model)["0.bias"]).nonzero().flatten().tolist()
    assert len(set(gone) & set(scores.argsort()[:8].tolist())) >= 7  # biases may or may not count


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ratio": 0.5}, ArgumentError, "ratio=0.5 says something else"),
    ({"pattern": "4x1"}, ArgumentError, "pattern= says it too"),
    ({"layers": ["0"]}, ArgumentError, "layers= says it too"),
    ({"roles": "ffn"}, ArgumentError, "roles='ffn' says something else"),
    ({"target_macs": 0.5}, ArgumentError, "target_macs=0.5 says something else"),
    ({"criterion": "l2"}, ArgumentError, "says a criterion of its own"),
    ({"schedule": Linear(end=4, initial=0.6)}, ArgumentError, "initial=0.6 is above the final ratio 0.5"),
    ({"config": [{**BLOCKS, "pruning_type": "snip"}], "schedule": OneShot(at=0)}, ArgumentError,
     "removes something before"),
    ({"config": [{**ROWS, "pruning_type": "retrain_free"}]}, ArgumentError, "'retrain_free' looks at gates"),
    ({"config": [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": [4, 1]}], "criterion": "fpgm"}, ArgumentError,
     "scores channels and no single weights"),
    ({"config": [{**BLOCKS, "pattern": "5x1"}]}, MaskError, "fits none"),
    ({"config": [{**BLOCKS, "op_names": ["nothing"]}]}, ArgumentError, "'nothing' fits no layer"),
    ({"config": [{**BLOCKS, "pattern": "1x1"}], "progressive": True, "schedule": Linear(end=8, frequency=4)},
     ArgumentError, "at least 4 weights"),
    ({"progressive": True}, ArgumentError, "a frequency of at least 4"),
    ({"config": [{**ROWS, "start_step": 0, "end_step": 9}]}, ArgumentError, "prepare_compression"),
    ({"config": 5}, ArgumentError, "the config is int"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=[match for _, _, match in BAD])
def test_what_does_not_go_is_said_and_nothing_has_changed(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = perceptron()
    with pytest.raises(error, match=match):
        session_of(model, **{"config": BOTH, **options})
    assert not any(isinstance(module, masks.Mask) for module in model.modules())


def test_an_initial_ratio_goes_with_a_least_one() -> None:
    model = perceptron()
    optimizer = sgd(model)
    schedule = Linear(start=0, end=4, frequency=2, initial=0.25)
    session = torchshear.PruningSession(
        model, vectors(0)[0], ratio=0.5, min_ratio=0.2, schedule=schedule, optimizer=optimizer
    )
    train(session, model, optimizer, vectors, 6)
    assert [round(one.reached, 2) for one in session.history.renewals] == [0.25, 0.36, 0.5]
    again = perceptron()
    other = session_of(again, BOTH, sgd(again), schedule=schedule)
    train(other, again, sgd(again), vectors, 6)
    assert [one.asked for one in other.history.renewals] == pytest.approx([0.25, 0.375, 0.5])
