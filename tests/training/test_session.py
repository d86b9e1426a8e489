"""Sessions: resuming, hard and soft masks, targets, proof of the result, and what is refused."""

import copy
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import torchshear
from tests.training.loops import adam, images, perceptron, residual, sgd, steps_of, train, vectors
from torchshear.errors import ArgumentError, DataError, KeywordError, MaskError
from torchshear.pruners import masks
from torchshear.pruners.regularizers import GroupLasso, GrowingL2, ScaleL1
from torchshear.pruners.schedules import AGP, Exp, Linear, Lottery, OneShot

N_STEPS = 9
EVERY = AGP(start=1, end=7, frequency=2)


def session_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"schedule": EVERY, **options}
    return torchshear.PruningSession(model, images(0)[0], optimizer=optimizer, **settings)


def laid(model: nn.Module) -> dict[str, Tensor]:
    return dict(masks.applied_masks(model).tensors)


CASES: dict[str, dict[str, Any]] = {
    "l1": {"ratio": 0.5},
    "taylor": {"criterion": "taylor"},
    "snip_momentum": {"criterion": "snip_momentum"},
    "rows": {"criterion": "taylor_bn"},
    "growing": {"regularizer": GrowingL2(0.1, every=2), "schedule": OneShot(at=7)},
    "soft": {"soft": True},
    "weights": {"pattern": "1x1", "criterion": "snip_momentum", "scope": "global"},
    "epochs": {"schedule": Linear(end=2, by="epoch")},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_killed_at_any_step_it_goes_on_with_the_same_numbers(options: dict[str, Any]) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = residual()
        optimizer = adam(model)
        return model, optimizer, session_of(model, optimizer, **options)

    model, optimizer, session = begin()
    saved = []
    for _ in steps_of(session, model, optimizer, images, N_STEPS):
        file = io.BytesIO()
        torch.save([session.state_dict(), model.state_dict(), optimizer.state_dict()], file)
        saved.append(file.getvalue())
    whole = session.finish()
    for step in (0, 4, 7):
        again, its_optimizer, other = begin()
        states = torch.load(io.BytesIO(saved[step]), weights_only=True)
        other.load_state_dict(states[0])
        again.load_state_dict(states[1])
        its_optimizer.load_state_dict(states[2])
        train(other, again, its_optimizer, images, N_STEPS, first=step + 1)
        for (name, one), (_, expected) in zip(again.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(one, expected), (step, name)
        assert all(torch.equal(mask, laid(model)[name]) for name, mask in laid(again).items())
        assert str(other.history) == str(session.history)
        assert other.history.renewals == session.history.renewals
        assert other.history.losses == session.history.losses
    again_state, state = other.finish().model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in again_state.items())


@pytest.mark.parametrize("options", [
    {"ratio": 0.5}, {"ratio": 0.6, "scope": "global"}, {"target_macs": 0.3}, {"target_params": 0.4, "align": 4},
    {"target_macs": 20_000, "scope": "global"}, {"ratio": {"last": 0.75}}, {"ratio": 0.5, "min_ratio": 0.4, "align": 2},
    {"ratio": 0.5, "criterion": "fpgm", "scope": "global"}, {"pattern": "1x1", "scope": "global", "ratio": 0.7},
    {"pattern": "channelx1"}, {"pattern": "4x1", "ratio": {}, "layers": {"stem": 0.5, "last": 0.25}},
], ids=str)  # fmt: skip
def test_what_went_stays_away_and_the_target_is_met(options: dict[str, Any]) -> None:
    if options.get("ratio") == {}:
        options = {name: value for name, value in options.items() if name != "ratio"}
    model = residual()
    optimizer = sgd(model, 0.3)
    session = session_of(model, optimizer, **options)
    seen: list[dict[str, Tensor]] = []
    for _ in steps_of(session, model, optimizer, images, N_STEPS):
        seen.append(laid(model))
    for before, after in itertools.pairwise(seen):
        assert all(bool((mask & ~before[name]).sum() == 0) for name, mask in after.items())
    result = session.finish()
    x, _ = images(50)
    torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-12)
    assert result.verification.max_error < 1e-12
    report, history = result.report, result.history
    assert history.renewals[-1].step == 7
    assert history.note == ""
    assert history.asked == pytest.approx(history.target)
    if "target_macs" in options:
        target = options["target_macs"]
        assert report.after.macs <= (target if target > 1 else target * report.before.macs)
        assert history.reached == pytest.approx(1 - report.after.macs / report.before.macs)
        assert history.unit == "MACs"
    elif "target_params" in options:
        assert report.after.n_params <= 0.4 * report.before.n_params
    elif "pattern" not in options:
        assert history.reached == pytest.approx(report.achieved_ratio)


def test_soft_channels_come_back() -> None:
    """What is masked keeps its weights; where others fall below them, the masks change places."""
    model = perceptron()
    session = torchshear.PruningSession(
        model, vectors(0)[0], soft=True, ratio={"0": 0.5}, schedule=Linear(start=-1, end=3)
    )
    session.on_train_begin()
    session.on_epoch_begin(0)
    dense = model[0].parametrizations.weight.original
    with torch.no_grad():
        for step, scale in enumerate([torch.arange(1.0, 17), torch.arange(16.0, 0, -1)] * 2):
            dense.copy_(scale[:, None] * torch.ones(16, 8))
            session.on_step_begin(step)
            gone = (~laid(model)["0.weight"]).all(1).nonzero().flatten().tolist()
            count = [2, 4, 6, 8][step]
            assert gone == (list(range(count)) if step % 2 == 0 else list(range(16 - count, 16)))
            session.on_before_optimizer_step()
            session.on_after_optimizer_step()
            session.on_step_end()
    assert model[0].weight[15].abs().sum() == 0 if gone[-1] == 15 else model[0].weight[0].abs().sum() == 0


def test_history_writer_and_picture(tmp_path: Any) -> None:
    class Scalars:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen.append((tag, value, step))

    writer, model = Scalars(), residual()
    optimizer = sgd(model)
    session = session_of(model, optimizer, regularizer=GroupLasso(1e-3), writer=writer)
    train(session, model, optimizer, images, N_STEPS, adds_penalty=True)
    history = session.history
    assert [one.step for one in history.renewals] == [1, 3, 5, 7]
    assert [dict(one.widths) for one in history.renewals] == [
        {"stem.weight[0]": a, "last.weight[0]": b} for a, b in ((8, 12), (6, 8), (5, 7), (4, 6))
    ]
    assert len(history.losses) == len(history.penalties) == N_STEPS
    assert all(map(math.isfinite, history.penalties))
    tags = {tag for tag, _, _ in writer.seen}
    assert {"pruning/asked", "pruning/reached", "pruning/loss", "pruning/left/last.weight[0]"} <= tags
    assert ("pruning/reached", 0.5, 7) in writer.seen
    history.draw(tmp_path / "history.svg")
    assert "stem.weight[0]" in (tmp_path / "history.svg").read_text()
    assert str(session).startswith("step 9, epoch 2: 50.0% of the channels gone, 50.0% asked by now")
    assert session.finish().history == session.history


def test_schedule_beyond_the_training() -> None:
    """The result has what was reached, and says what is missing."""
    model = residual()
    optimizer = sgd(model)
    session = session_of(model, optimizer, schedule=Linear(start=0, end=100, frequency=4))
    train(session, model, optimizer, images, N_STEPS)
    result = session.finish()
    assert result.history.note == "target not reached: training ended before 23 of 26 events of the schedule"
    assert result.history.reached < 0.1
    assert result.report.after.macs == result.report.before.macs
    late = residual()
    late_session = session_of(late, schedule=OneShot(at=500))
    train(late_session, late, sgd(late), images, 2)
    assert "before 1 of 1 events" in late_session.finish().history.note


def test_events_that_are_due_at_the_end_and_by_rounds() -> None:
    model = residual()
    session = session_of(model, schedule=Exp(end=N_STEPS, frequency=3))
    train(session, model, sgd(model), images, N_STEPS)
    assert [one.step for one in session.history.renewals] == [0, 3, 6, 9]
    assert session.history.reached == 0.5
    by_epoch = residual()
    session = session_of(by_epoch, schedule=Linear(end=2, by="epoch"))
    train(session, by_epoch, sgd(by_epoch), images, 8)
    assert [(one.epoch, one.step) for one in session.history.renewals] == [(0, 0), (1, 4), (1, 8)]
    rounds = residual()
    session = session_of(rounds, schedule=Lottery(end=2), ratio=0.75)
    for number in range(3):
        session.on_event()
        train(session, rounds, sgd(rounds), images, 2)
        assert session.history.reached == pytest.approx([0, 0.5, 0.75][number])
    assert session.finish().model.last.weight.shape == (3, 2, 3, 3)
    assert [one.asked for one in session.history.renewals] == pytest.approx([0, 0.5, 0.75])


def test_gathered_gradients_count_as_one_step() -> None:
    model = residual()
    optimizer = sgd(model)
    session = session_of(model, optimizer, criterion="snip", schedule=OneShot(at=2))
    session.on_train_begin()
    session.on_epoch_begin(0)
    sums = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for batch in range(6):
        session.on_step_begin(batch)
        x, target = images(batch)
        (functional.cross_entropy(model(x), target) / 2).backward()
        if batch % 2:
            if batch < 4:
                for name, one in model.named_parameters():
                    sums[name] += (one * one.grad).abs().detach()
            session.on_before_optimizer_step()
            optimizer.step()
            session.on_after_optimizer_step()
            optimizer.zero_grad()
        session.on_step_end()
        if batch == 3:
            assert not session.history.renewals
    assert [one.step for one in session.history.renewals] == [2]
    seen = next(name for name in sums if name.startswith("last") and name.endswith("weight.original"))
    scores = sums[seen].flatten(1).sum(1) + next(
        one for name, one in sums.items() if name.startswith("scale") and "weight" in name
    )
    gone = (~laid(model)["last.weight"]).flatten(1).all(1)
    assert set(gone.nonzero().flatten().tolist()) == set(scores.argsort()[:6].tolist())


def test_scaled_gradients() -> None:
    """A scaler's factor is taken out of sums and put on the penalty; a step that it leaves out counts for nothing."""
    found = []
    for scale in (None, 1024.0):
        model = residual()
        optimizer = sgd(model)
        session = session_of(model, optimizer, criterion="taylor", regularizer=ScaleL1(0.1), schedule=OneShot(at=3))
        session.on_train_begin()
        session.on_epoch_begin(0)
        for step in range(4):
            is_left_out = step == 1 and scale is not None
            session.on_step_begin(step)
            if step == 1 and scale is None:
                session._progress.n_steps += 1  # the scaler's run counts a step that it leaves out
                session.on_step_end()
                continue
            x, target = images(step)
            (functional.cross_entropy(model(x), target) * (scale or 1.0)).backward()
            if is_left_out:
                model.head.parametrizations.weight.original.grad[0, 0] = math.inf
            session.on_before_optimizer_step(grad_scale=scale)
            for parameter in model.parameters():
                parameter.grad.div_(scale or 1.0)
            if not is_left_out:
                optimizer.step()
            session.on_after_optimizer_step()
            optimizer.zero_grad()
            session.on_step_end()
        found.append((laid(model), {name: one.detach().clone() for name, one in model.named_parameters()}))
    (left, own), (right, other) = found
    assert all(torch.equal(mask, right[name]) for name, mask in left.items())
    for name, one in own.items():
        torch.testing.assert_close(one, other[name], rtol=1e-9, atol=1e-12, msg=name)


def test_data_for_criteria_of_activations() -> None:
    """Batches are run on the model as it is masked and trained by then."""
    model = residual()
    optimizer = sgd(model)
    data = [images(70)[0], images(71)[0]]
    session = session_of(model, optimizer, criterion="mean_activation", data=data, batches=2, schedule=OneShot(at=3))
    train(session, model, optimizer, images, 3)
    again = residual()
    train(session_of(again, schedule=OneShot(at=500)), again, sgd(again), images, 3)
    masks.remove(again)
    expected = torchshear.prune(again, data[0], criterion="mean_activation", data=data, batches=2, ratio=0.5)
    result = session.finish()
    assert result.plan == expected.plan


@pytest.mark.parametrize("name", ["lstm", "attention", "grouped"])
def test_other_layers_train_under_masks(name: str) -> None:
    """The masked model trains, and what comes of it is the small one."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(x)[0][:, -1])

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(6, 8) if i < 3 else nn.Linear(8, 5) for i in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (one(x).unflatten(-1, (4, 2)).transpose(1, 2) for one in (self.q, self.k, self.v))
            return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]

    torch.manual_seed(0)
    grouped = nn.Sequential(
        nn.Flatten(), nn.Linear(24, 16), nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 16, 1, groups=4), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip
    model = {"lstm": Recurrent(), "attention": Attending(), "grouped": grouped}[name].double()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return torch.randn(6, 4, 6, generator=generator, dtype=torch.float64), torch.arange(6) % 5

    optimizer = sgd(model)
    session = torchshear.PruningSession(
        model, batch(0)[0], schedule=Linear(end=4), optimizer=optimizer, criterion="taylor"
    )
    before = {key: one.detach().clone() for key, one in model.named_parameters()}
    train(session, model, optimizer, batch, 8)
    assert all(not torch.equal(one, before[key]) for key, one in model.named_parameters())
    result = session.finish()
    x = batch(9)[0]
    torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-12)
    assert result.report.after.macs < 0.7 * result.report.before.macs


ORDERS: list[tuple[list[str], str]] = [
    (["on_epoch_begin"], r"on_epoch_begin\(\) came before training began.*next here is on_train_begin"),
    (["on_train_begin", "on_train_begin"], "on_train_begin.*came between epochs"),
    (["on_train_begin", "on_step_begin"], r"on_step_begin.*next here is on_epoch_begin"),
    (["on_train_begin", "on_epoch_begin", "on_before_optimizer_step"], r"next here is on_step_begin"),
    (["on_train_begin", "on_epoch_begin", "on_step_begin", "on_after_optimizer_step"],
     "on_after_optimizer_step.*in a step, before the optimizer.*next here is on_before_optimizer_step"),
    (["on_train_begin", "on_epoch_begin", "on_step_begin", "on_before_optimizer_step", "on_step_end"],
     r"next here is optimizer.step\(\) and then on_after_optimizer_step"),
    (["on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_begin"], "on_step_begin"),
    (["on_train_begin", "on_epoch_begin", "on_train_end"], "on_epoch_end"),
    (["on_train_begin", "finish"], "finish.*after training ended"),
    (["penalty"], "call it behind on_step_begin"),
    (["on_event"], "the schedule is by step"),
    (["on_train_begin", "on_epoch_begin", "on_step_begin", "on_before_optimizer_step", "state_dict"], "half of a step"),
]  # fmt: skip


@pytest.mark.parametrize(("hooks", "match"), ORDERS, ids=[" ".join(hooks[-2:]) for hooks, _ in ORDERS])
def test_hooks_out_of_order_are_named(hooks: list[str], match: str) -> None:
    session = session_of(residual())
    given = {"on_epoch_begin": (0,), "on_step_begin": (0,)}
    for hook in hooks[:-1]:
        getattr(session, hook)(*given.get(hook, ()))
    with pytest.raises(ArgumentError, match=match):
        getattr(session, hooks[-1])(*given.get(hooks[-1], ()))


def test_steps_of_the_optimizer_that_no_hook_announces() -> None:
    model = residual()
    optimizer = sgd(model)
    session = session_of(model, optimizer)
    optimizer.step()
    session.on_train_begin()
    with pytest.raises(ArgumentError, match="the optimizer makes a step between epochs"):
        optimizer.step()
    session.on_epoch_begin(0)
    session.on_step_begin(0)
    with pytest.raises(ArgumentError, match="on_before_optimizer_step"):
        optimizer.step()
    session.on_step_end()
    session.on_epoch_end()
    session.on_train_end()
    optimizer.step()


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 2)).double()


def pruned_by_torch() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def masked_before() -> nn.Module:
    model = perceptron()
    masks.apply(model, masks.choose_masks(model, "1x1", 0.5))
    return model


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"schedule": 3}, ArgumentError, "schedule is int"),
    ({"schedule": Linear(end=4, initial=0.6)}, ArgumentError, "initial=0.6 is above"),
    ({"regularizer": "l1"}, ArgumentError, "regularizer is str"),
    ({"writer": 3}, ArgumentError, "add_scalar"),
    ({"criterion": "apoz"}, ArgumentError, "'apoz' looks at zeros"),
    ({"criterion": "group_fisher"}, ArgumentError, "looks at gates.*data="),
    ({"criterion": "taylor", "schedule": OneShot(at=0)}, ArgumentError, "before the first step"),
    ({"criterion": "taylor", "regularizer": GrowingL2()}, ArgumentError, "when the training begins"),
    ({"data": [vectors(0)[0]]}, ArgumentError, "no criterion looks at it"),
    ({"pattern": "4x1", "target_macs": 0.5}, ArgumentError, "target_macs= goes with channels"),
    ({"layers": ["0"]}, ArgumentError, "layers= goes with a pattern"),
    ({"pattern": "4x1", "criterion": "fpgm"}, ArgumentError, "scores channels"),
    ({"pattern": "7x1"}, MaskError, "fits none"),
    ({"pattern": "2:4", "ratio": 0.9}, ArgumentError, "0.5 of the weights at most"),
    ({"ratio": 0.5, "target_macs": 0.5}, ArgumentError, "give one"),
    ({"ratio": 1.0}, ArgumentError, "ratio=1.0"),
    ({"soft": 1}, ArgumentError, "soft=1"),
    ({"dummy": 1}, KeywordError, r"PruningSession\(\)"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=[str(one[0])[:50] for one in BAD])
def test_bad_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = perceptron()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=match):
        torchshear.PruningSession(model, vectors(0)[0], **{"schedule": EVERY, **options})
    assert type(model[0]) is type(before[0])
    assert not any(isinstance(one, masks.Mask) for one in model.modules())


@pytest.mark.parametrize(("make", "match"), [
    (masked_before, "masks lie on the model already"), (normed, "parametrization of its own"),
    (pruned_by_torch, "torch.nn.utils.prune"),
])  # fmt: skip
def test_masks_and_norms_of_the_users_own(make: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(MaskError, match=match):
        torchshear.PruningSession(make(), vectors(0)[0], schedule=EVERY)


def test_an_optimizer_of_another_model() -> None:
    model = residual()
    with pytest.raises(ArgumentError, match="of another model"):
        session_of(model, sgd(residual()))
    assert not any(isinstance(one, masks.Mask) for one in model.modules())  # it can be tried again
    with pytest.raises(ArgumentError, match="expected a torch.optim.Optimizer"):
        session_of(residual(), 3)  # type: ignore[arg-type]


def test_losses_and_gradients_that_are_no_numbers() -> None:
    model = residual()
    optimizer = sgd(model)
    session = session_of(model, optimizer, criterion="taylor")
    session.on_train_begin()
    session.on_epoch_begin(0)
    session.on_step_begin(0)
    for loss, error in ((math.nan, DataError), (torch.tensor(math.inf), DataError), ("high", ArgumentError)):
        with pytest.raises(error, match="loss"):
            session.on_step_end(loss)
    x, target = images(0)
    (functional.cross_entropy(model(x), target) * math.nan).backward()
    with pytest.raises(DataError, match=r"gradient of 'stem.weight' is NaN or infinite"):
        session.on_before_optimizer_step()


def test_a_model_that_changes_its_structure() -> None:
    def replaced(model: nn.Module) -> None:
        model.head = nn.Linear(12, 5).double()

    def unmasked(model: nn.Module) -> None:
        masks.remove(model)

    def grown(model: nn.Module) -> None:
        model.more = nn.Linear(2, 2)

    for change, match in ((replaced, "head"), (unmasked, "is not on the model any more"), (grown, "had not")):
        model = residual()
        session = session_of(model, schedule=Linear(end=3))
        session.on_train_begin()
        session.on_epoch_begin(0)
        change(model)
        with pytest.raises(MaskError, match=match):
            session.on_step_begin(0)


def test_states_of_other_sessions() -> None:
    state = session_of(residual()).state_dict()
    for options, match in (
        ({"ratio": 0.4}, "ratio"), ({"criterion": "l2"}, "criterion"), ({"schedule": AGP(start=1, end=8)}, "schedule"),
        ({"regularizer": ScaleL1(1e-4)}, "regularizer"), ({"soft": True}, "soft"), ({"pattern": "1x1"}, "pattern"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=match):
            session_of(residual(), **options).load_state_dict(state)
    other = torchshear.PruningSession(perceptron(), vectors(0)[0], schedule=EVERY)
    with pytest.raises(ArgumentError, match="another network"):
        other.load_state_dict(state)
    for damaged in ({}, 3, {**state, "version": 9}, {**state, "renewals": {}}, {**state, "record": 3}):
        with pytest.raises(ArgumentError, match="state"):
            session_of(residual()).load_state_dict(damaged)
    begun = session_of(residual())
    begun.on_train_begin()
    with pytest.raises(ArgumentError, match="after on_train_begin"):
        begun.load_state_dict(state)
