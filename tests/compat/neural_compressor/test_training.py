"""Schedules by the reference's own numbers, stages, regularizer, locks, and what is refused."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.compat.neural_compressor.loops import (
    batches,
    classifier,
    layers,
    numbers,
    sgd,
    steps_on_numbers,
    train_with_hooks,
    trained,
)
from torchshear.compat.neural_compressor import (
    CompressionManager,
    WeightPruningConfig,
    prepare_compression,
    prepare_pruning,
)
from torchshear.errors import ArgumentError, DataError, MaskError
from torchshear.pruners import masks
from torchshear.pruners.schedules import OneShot

BLOCKS: dict[str, Any] = {"op_names": ["0"], "pattern": "4x1", "pruning_type": "magnitude", "target_sparsity": 0.8}
ROWS: dict[str, Any] = {"op_names": ["0"], "pattern": "1xchannel", "pruning_type": "magnitude", "target_sparsity": 0.5}


def manager_of(model: nn.Module, pruners: list[dict[str, Any]], **common: Any) -> CompressionManager:
    return prepare_compression(model, WeightPruningConfig(pruners, **common))


def laid(model: nn.Module) -> dict[str, Tensor]:
    return dict(masks.applied_masks(model).tensors)


# Shares of 384 blocks that Neural Compressor 2.6 reaches at five events for a target of 0.8.
CURVES = {
    "exp": [0, 0.331, 0.552, 0.701, 0.799],
    "linear": [0, 0.198, 0.398, 0.599, 0.799],
    "cos": [0, 0.060, 0.232, 0.492, 0.799],
    "cube": [0, 0.010, 0.099, 0.336, 0.799],
}


@pytest.mark.parametrize("word", CURVES)
def test_curves_by_the_numbers_of_the_reference(word: str) -> None:
    model = layers(32, 48)  # 12 x 32 blocks
    steps = {"start_step": 2, "end_step": 15, "pruning_frequency": 3, "sparsity_decay_type": word}
    manager = manager_of(model, [{**BLOCKS, **steps}])
    for _ in steps_on_numbers(manager, sgd(model), 16, 32):
        pass
    renewals = manager.session.history.renewals
    assert [one.step for one in renewals] == [2, 5, 8, 11, 14]  # the last comes before end_step
    assert [math.floor(one.reached * 1000 + 0.5) / 1000 for one in renewals] == CURVES[word]
    assert float((model[0].weight == 0).double().mean()) == pytest.approx(307 / 384)


@pytest.mark.parametrize(("start", "end", "frequency", "initial"), [(0, 5, 1, 0.0), (1, 6, 2, 0.2), (2, 3, 1, 0.1)])
def test_epochs_of_version_1(start: int, end: int, frequency: int, initial: float) -> None:
    """s = s_init + (s_T - s_init) floor((e - start + 1) / f) f / (end - start + 1) at epoch e."""
    model = layers(32, 48)
    epochs = {"start_epoch": start, "end_epoch": end, "update_frequency": frequency, "initial_sparsity": initial}
    manager = manager_of(model, [{**BLOCKS, **epochs}])
    for _ in steps_on_numbers(manager, sgd(model), 16, 32, per_epoch=2):
        pass
    seen = {one.epoch: one.asked for one in manager.session.history.renewals}
    for epoch in range(start, end + 1):
        passed = (epoch - start + 1) // frequency * frequency
        share = initial + (0.8 - initial) * passed / (end - start + 1)
        if passed:
            assert seen[max(at for at in seen if at <= epoch)] == pytest.approx(share)


def test_pruners_follow_schedules_of_their_own() -> None:
    """Rows at steps 2 to 5, and blocks in stages from steps 8 and 16 on: each at its own events only."""
    model = layers()
    pruners = [
        {**ROWS, "op_names": ["2"], "start_step": 1, "end_step": 4, "sparsity_decay_type": "linear"},
        {**BLOCKS, "target_sparsity": 0.5, "pruning_type": "magnitude_progressive", "start_step": 0,
         "end_step": 16, "pruning_frequency": 8, "sparsity_decay_type": "linear"},
    ]  # fmt: skip
    manager = manager_of(model, pruners)
    rows, blocks, whole = [], [], []
    for _ in steps_on_numbers(manager, sgd(model), 20):
        mask = laid(model)
        rows.append(int((~mask["2.bias"]).sum()))
        grid = mask["0.weight"].reshape(4, 4, 8)
        whole.append(bool((grid.all(1) == grid.any(1)).all()))
        blocks.append(int((~grid).sum()))
    assert rows == [0, 0, 2, 4, *[6] * 16]
    assert blocks == [*[0] * 8, 8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 48, 48]
    assert whole[:8] == [True] * 8
    assert whole[14:16] == [True, True]
    assert not any(whole[8:14])
    result = manager.finish()  # ends with what the stages lead to
    assert float((model[0].weight == 0).double().mean()) == 0.5
    assert result.model[2].out_features == 6
    assert result.history.reached == pytest.approx(0.5)
    assert result.history.note == ""
    assert [one.step for one in result.history.renewals] == [0, 1, 2, 3, 4, 8, 10, 12, 14, 16, 18, 20, 20]


def test_a_stage_goes_on_while_another_pruner_has_its_event() -> None:
    """Stages of one keep their steps, however many events of the other come in between."""
    seen = []
    for others in ([], [{**ROWS, "op_names": ["2"], "start_step": 1, "end_step": 15, "sparsity_decay_type": "linear"}]):
        model = layers()
        staged = {**BLOCKS, "target_sparsity": 0.5, "pruning_type": "magnitude_progressive", "start_step": 0,
                  "end_step": 8, "pruning_frequency": 8}  # fmt: skip
        manager = manager_of(model, [staged, *others])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen.append([laid(model)["0.weight"] for _ in steps_on_numbers(manager, optimizer, 18)])
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))
    counts = [int((~one).sum()) for one in seen[0]]
    assert counts[7:16] == [0, 16, 16, 32, 32, 48, 48, 64, 64]


def test_group_lasso_adds_its_gradient_within_the_steps_of_its_pruner() -> None:
    """W <- W - lr (g + c W_b / ||W_b||) in blocks of the layer, from start_step to end_step."""
    model, twin = layers(), layers()
    pruner = {**BLOCKS, "start_step": 2, "end_step": 4, "pruning_frequency": 9, "target_sparsity": 0.25,
              "reg_type": "group_lasso", "parameters": {"reg_coeff": 0.3}}  # fmt: skip
    manager = manager_of(model, [pruner])
    optimizer, other = (torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, twin))
    mask = torch.ones(16, 8, dtype=torch.bool)
    for step in steps_on_numbers(manager, optimizer, 7):
        if step == 2:
            blocks = twin[0].weight.detach().abs().reshape(4, 4, 8).mean(1)
            least = blocks.flatten().argsort()[:8]
            gone = torch.zeros(32, dtype=torch.bool)
            gone[least] = True
            mask = ~gone.reshape(4, 1, 8).expand(4, 4, 8).reshape(16, 8)
            with torch.no_grad():
                twin[0].weight.mul_(mask)
        x, target = numbers(step)
        other.zero_grad()
        functional.cross_entropy(twin(x), target).backward()
        if 2 <= step <= 4:
            grid = twin[0].weight.detach().reshape(4, 4, 8)
            norms = grid.norm(dim=1, keepdim=True)
            twin[0].weight.grad += 0.3 * torch.where(norms > 0, grid / norms, 0.0).reshape(16, 8)
        twin[0].weight.grad *= mask
        other.step()
        torch.testing.assert_close(model[0].weight.detach(), twin[0].weight.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(model[4].weight.detach(), twin[4].weight.detach(), rtol=1e-10, atol=1e-12)
    assert manager.session.history.penalties


def test_group_lasso_of_channels_presses_units_with_all_that_goes_with_them() -> None:
    model = layers()
    pruner = {**ROWS, "start_step": 0, "end_step": 9, "pruning_frequency": 20, "target_sparsity": 0.25,
              "reg_type": "group_lasso", "parameters": {"reg_coeff": 0.1}}  # fmt: skip
    manager = manager_of(model, [pruner, {**BLOCKS, "op_names": ["2"], "end_step": 9, "pruning_frequency": 9}])
    seen = steps_on_numbers(manager, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    next(seen)
    weights = [model[0].weight, model[0].bias, model[2].weight]
    first, bias, second = (one.detach() for one in weights)
    squares = first.square().sum(1) + bias.square() + second.square().sum(0)
    callbacks = manager.callbacks
    callbacks.on_step_begin(1)
    x, target = numbers(1)
    functional.cross_entropy(model(x), target).backward()
    before = [one.grad.clone() for one in model.parameters()]
    callbacks.on_before_optimizer_step()
    added = {name: one.grad - old for (name, one), old in zip(model.named_parameters(), before, strict=True)}
    norms = torch.where(squares > 0, squares.sqrt(), 1.0)
    found = next(one for name, one in added.items() if name.startswith("0.parametrizations.bias"))
    torch.testing.assert_close(found, 0.1 * bias / norms, rtol=1e-9, atol=1e-12)
    read = next(one for name, one in added.items() if name.startswith("2.") and one.ndim == 2)
    torch.testing.assert_close(read, 0.1 * second / norms * (model[2].weight != 0), rtol=1e-9, atol=1e-12)
    assert not added["4.weight"].any()


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "1x1"])
def test_pattern_lock_keeps_a_pruned_model(pattern: str) -> None:
    """Element by element: a 2:4 model stays one, which is all zeros after the lock of Neural Compressor."""
    model = classifier()
    first = masks.choose_masks(model, pattern, 0.5, layers=["layer1.0", "layer2.0"])
    masks.apply(model, first)
    masks.make_permanent(model)
    zeros = {name: one.detach() == 0 for name, one in model.named_parameters() if name in first.tensors}
    lock = {"pruning_type": "pattern_lock", "pattern": pattern, "op_names": ["layer1.0", "layer2.*"]}
    manager = prepare_compression(model, WeightPruningConfig([lock], start_step=0, end_step=0))
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    for _ in train_with_hooks(manager, sgd(model)):
        pass
    for name, one in model.named_parameters():
        assert name not in zeros or torch.equal(one == 0, zeros[name]), name
        assert not torch.equal(one, before[name])
    assert manager.session.history.reached == pytest.approx(0.5)
    with pytest.raises(ArgumentError, match="have none"):
        list(train_with_hooks(prepare_compression(classifier(), WeightPruningConfig([lock])), sgd(classifier())))


def test_what_is_saved_and_read(tmp_path: Path) -> None:
    model = classifier()
    pruner = {"op_names": ["layer1.*"], "pattern": "1x1", "target_sparsity": 0.5, "start_step": 2, "end_step": 2}
    manager = prepare_compression(model, WeightPruningConfig([pruner]))
    with pytest.raises(ArgumentError, match="was not called yet"):
        manager.save(tmp_path / "early")
    assert not (tmp_path / "early").exists()
    steps = train_with_hooks(manager, sgd(model))
    for step in steps:
        if step == 4:
            manager.save(tmp_path / "middle")
    manager.save(tmp_path / "out")
    for folder in ("middle", "out"):
        state = torch.load(tmp_path / folder / "best_model.pt", weights_only=True)
        fresh = classifier(1)
        fresh.load_state_dict(state)
        kept = masks.Masks.load(tmp_path / folder / "masks.safetensors")
        assert kept.tensors.keys() == {"layer1.0.weight", "layer1.2.weight"}
        assert all(torch.equal(dict(fresh.named_parameters())[name] != 0, one) for name, one in kept.tensors.items())
    x = batches(40, 1)[0]
    torch.testing.assert_close(fresh.eval()(**x).logits, model.eval()(**x).logits)


def test_example_inputs_may_be_given() -> None:
    found = []
    for example in ({}, {"args": numbers(50)[0]}, {"kwargs": {"input": numbers(50)[0]}}):
        model = layers()
        manager = prepare_compression(model, WeightPruningConfig([ROWS], start_step=1, end_step=3), **example)
        assert any(isinstance(module, masks.Mask) for module in model.modules()) == bool(example)
        for _ in steps_on_numbers(manager, sgd(model), 4):
            pass
        found.append(model[0].weight.detach().clone())
        assert manager.finish().model[0].out_features == 8
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_going_on_after_a_stop() -> None:
    """With example inputs the session is there before the first batch, and takes its state up again."""
    pruners = [
        {**ROWS, "pruning_type": "snip_momentum_progressive", "start_step": 1, "end_step": 9, "pruning_frequency": 4},
        {**BLOCKS, "op_names": ["2"], "start_step": 0, "end_step": 8},
    ]  # fmt: skip

    def begin() -> tuple[CompressionManager, torch.optim.Optimizer]:
        model = layers()
        manager = prepare_compression(model, WeightPruningConfig(pruners), args=numbers(50)[0])
        return manager, sgd(model)

    def loop(manager: CompressionManager, optimizer: torch.optim.Optimizer, first: int) -> Iterator[int]:
        manager.callbacks.on_train_begin()
        for step in range(first, 14):
            manager.callbacks.on_step_begin(step)
            x, target = numbers(step)
            functional.cross_entropy(manager.model(x), target).backward()
            manager.callbacks.on_before_optimizer_step()
            optimizer.step()
            manager.callbacks.on_after_optimizer_step()
            optimizer.zero_grad()
            yield step

    whole, optimizer = begin()
    saved = io.BytesIO()
    for step in loop(whole, optimizer, 0):
        if step == 6:  # between two stages
            states = [one.state_dict() for one in (whole.session, whole.model, optimizer)]
            torch.save(states, saved)
    saved.seek(0)
    again, other = begin()
    for one, state in zip((again.session, again.model, other), torch.load(saved, weights_only=True), strict=True):
        one.load_state_dict(state)
    assert list(loop(again, other, 7))[-1] == 13
    results = [one.finish() for one in (whole, again)]
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert results[0].history.renewals == results[1].history.renewals
    assert results[0].plan == results[1].plan


def test_convolutions_with_what_belongs_to_their_channels() -> None:
    """Filters go with their norms and the columns that read them; single weights of others stay zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ).double()  # fmt: skip
    pruners = [{"op_names": ["0"], "pattern": "1xchannel"}, {"op_names": ["3"], "pattern": "2:4"},
               {"op_names": ["5"], "pattern": "4x1", "pruning_scope": "local"}]  # fmt: skip
    config = WeightPruningConfig(pruners, target_sparsity=0.5, start_step=1, end_step=3, pruning_op_types=["Conv"])
    optimizer = sgd(model)
    manager = prepare_pruning(model, config, optimizer)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    result = manager.finish()
    gone = (model[0].weight == 0).flatten(1).all(1)
    assert int(gone.sum()) == 8
    assert not model[1].weight[gone].any()
    assert not model[3].weight[:, gone].any()
    left = model[3].weight.permute(0, 2, 3, 1).reshape(16, 9, 4, 4) != 0
    assert int(left.sum(-1).max()) <= 2
    grid = model[5].weight.reshape(2, 4, 16, 9) == 0
    assert bool((grid.all(1) == grid.any(1)).all())
    assert float(grid.double().mean()) == 0.5
    assert result.model[0].out_channels == result.model[1].num_features == result.model[3].in_channels == 8
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-12)


def test_batches_and_a_loss_without_training() -> None:
    """A criterion of gradients goes by the batches that are given; the model is not trained."""
    model, twin = layers(), layers()
    pruner = {**BLOCKS, "pruning_type": "snip", "target_sparsity": 0.5, "start_step": 1, "end_step": 3}
    loader = [numbers(step) for step in range(5)]
    pruning = prepare_pruning(
        model, WeightPruningConfig([pruner]), dataloader=iter(loader), loss_func=functional.cross_entropy
    )
    total = torch.zeros(16, 8, dtype=torch.float64)
    for x, target in loader[:3]:  # as many as end_step says
        twin.zero_grad()
        functional.cross_entropy(twin(x), target).backward()
        total += (twin[0].weight * twin[0].weight.grad).abs().detach()
    least = total.reshape(4, 4, 8).mean(1).flatten().argsort()[:16]
    gone = (model[0].weight.reshape(4, 4, 8) == 0).all(1).flatten().nonzero().flatten()
    assert set(gone.tolist()) == set(least.tolist())
    assert torch.equal(model[4].weight, twin[4].weight)
    assert pruning.finish().history.reached == 0.5
    with pytest.raises(DataError, match="holds no loss"):
        prepare_pruning(layers(), WeightPruningConfig([pruner]), dataloader=loader)


def test_configs_share_nothing_and_stay_as_they_are(tmp_path: Path) -> None:
    first, common = [{"op_names": ["layer1.*"]}], {"target_sparsity": 0.3, "excluded_op_names": ["classifier"]}
    one = WeightPruningConfig(first, **common)
    two = WeightPruningConfig()
    assert (first, common) == (
        [{"op_names": ["layer1.*"]}],
        {"target_sparsity": 0.3, "excluded_op_names": ["classifier"]},
    )
    assert (one.pruners[0].entry.ratio, two.pruners[0].entry.ratio) == (0.3, 0.9)
    path = tmp_path / "config.yaml"
    path.write_text(
        "pruning_configs:\n- op_names: ['layer1.*']\ntarget_sparsity: 0.3\nexcluded_op_names: [classifier]\n"
    )
    assert WeightPruningConfig(path).pruners == one.pruners
    assert "step 1" in WeightPruningConfig([{}]).pruners[0].entry.notes[0]
    assert WeightPruningConfig([{}]).pruners[0].schedule == OneShot(at=1)
    assert "OneShot" in repr(two)


def test_words_are_searched_for_only_where_none_is_whole() -> None:
    """A head "fc" leaves "fc1" alone; ".fc" finds both."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc, self.last = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fc(self.fc2(self.fc1(x))))

    for words, excluded, expected in (
        (["fc"], [], {"fc"}), (["fc.*"], ["fc"], {"fc1", "fc2"}), (["c[12]"], [], {"fc1", "fc2"}),
        (["f.*"], ["c1"], {"fc2", "fc"}), (["fc1", "mlp"], ["pooler"], {"fc1"}),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = Named().double()
        pruner = {"op_names": words, "excluded_op_names": excluded, "pattern": "1x1", "pruning_type": "magnitude"}
        manager = manager_of(model, [pruner])
        for _ in steps_on_numbers(manager, sgd(model), 2):
            pass
        pruned = {name.removesuffix(".weight") for name, one in model.named_parameters() if bool((one == 0).any())}
        assert pruned == expected
    with pytest.raises(ArgumentError, match="'mlp' fits no layer"):
        next(steps_on_numbers(manager_of(Named().double(), [{**pruner, "op_names": ["mlp"]}]), sgd(model), 1))


BAD: list[tuple[Any, str]] = [
    ([{"start_step": 5, "end_step": 1}], r"pruning_configs\[0\]: start_step=5 is behind end_step=1"),
    ([{"start_step": 0, "end_step": 0}], "snip_momentum, which is made of gradients"),
    ([{"start_step": -1}], "start_step=-1; expected an integer of at least 0"),
    ([{"pruning_frequency": 0}], "pruning_frequency=0"),
    ([{"sparsity_decay_type": "cubic"}], "sparsity_decay_type='cubic'.*exp, cos, cube, linear"),
    ([{"reg_type": "lasso"}], "reg_type='lasso'"),
    ([{"reg_coeff": 0.1}], "belongs into parameters"),
    ([{"parameters": {"coefficient": 1}}], "expected a mapping with 'reg_coeff' alone"),
    ([{"parameters": {"reg_coeff": -1}}], "reg_coeff=-1"),
    ([{"reg_type": "group_lasso", "pattern": "2:4", "target_sparsity": 0.5}], "presses blocks"),
    ([{"reg_type": "group_lasso", "pattern": "mha", "target_sparsity": 0.5}], "presses blocks"),
    ([{"pruning_type": "snip_progressive", "pattern": "1x1"}], "at least 4 weights"),
    ([{"pruning_type": "snip_progressive", "pattern": "2:4", "target_sparsity": 0.5}], "at least 4 weights"),
    ([{"pruning_type": "pattern_lock", "start_step": 1, "end_step": 3}], "locks once"),
    ([{"pruning_type": "pattern_lock", "pattern": "4by1"}], "pattern='4by1'"),
    ([{"pruning_type": "block_mask"}], "masks that are trained"),
    ([{"pruning_type": "sparse_gpt"}], "layer by layer"),
    ([{"start_epoch": 1}], "end_epoch is missing"),
    ([{"start_epoch": 1, "end_epoch": 4, "start_step": 1}], "start_step counts steps"),
    ([{"start_epoch": 4, "end_epoch": 1}], "start_epoch=4 is behind"),
    ([{"initial_sparsity": 0.2, "pruning_type": "magnitude"}], "initial_sparsity with start_step=end_step"),
    ([{"target_sparsity": 1.0}], "target_sparsity=1.0"),
    ([{"nothing": 1}], "'nothing' is no key"),
    ([], "expected a list of at least one pruner"),
    ([5], r"pruning_configs\[0\] is int"),
    ("config.txt", "ends in '.txt'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "match"), BAD, ids=[match for _, match in BAD])
def test_what_means_nothing_is_refused_by_key(given: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        WeightPruningConfig(given)


def test_calls_that_do_not_fit() -> None:
    config, model = WeightPruningConfig([BLOCKS]), layers()
    for call, match in (
        (lambda: prepare_compression(model, {"target_sparsity": 0.5}), "the config is dict"),
        (lambda: prepare_compression(model, [config, config]), "confs holds 2 configs"),
        (lambda: prepare_compression(config, config), "model is WeightPruningConfig"),
        (lambda: prepare_compression(model, config, args=5), "args is int"),
        (lambda: prepare_pruning(model, config), "neither an optimizer nor a dataloader"),
        (lambda: prepare_pruning(model, config, optimizer=sgd(layers())), "none of the model's parameters"),
        (lambda: prepare_pruning(model, config, optimizer=5), "optimizer"),
        (lambda: prepare_pruning(model, config, dataloader=[]), "gives no batches"),
        (lambda: prepare_pruning(model, config, dataloader=5), "dataloader is int"),
        (lambda: prepare_compression(model, WeightPruningConfig(
            [{"pruning_type": "retrain_free", "pattern": "channelx1"}])), r"use prepare_pruning\(model, config, data"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=match):
            call()
    assert not model._forward_pre_hooks
    manager = prepare_compression(model, config)
    for hook in ("on_step_begin", "on_before_optimizer_step", "on_train_end"):
        with pytest.raises(ArgumentError, match=r"on_train_begin\(\) did not come"):
            getattr(manager.callbacks, hook)()
    manager.callbacks.on_train_begin()
    with pytest.raises(ArgumentError, match="came before"):
        manager.callbacks.on_train_begin()
    manager.callbacks.on_step_begin(0)
    with pytest.raises(ArgumentError, match="was not called yet"):
        manager.callbacks.on_before_optimizer_step()
    with pytest.raises(ArgumentError, match="was not called yet"):
        manager.finish()
    over = trained([{"op_names": ["layer1.0"], "pruning_type": "magnitude"}])
    with pytest.raises(ArgumentError, match="training is over"):
        over.callbacks.on_step_begin(0)
    assert over.finish().history.note == over.finish().history.note == ""


def test_a_layer_of_two_pruners_and_blocks_that_fit_nothing() -> None:
    model = layers()
    for pruners, error, match in (
        ([BLOCKS, {**ROWS, "op_names": ["0", "2"]}], ArgumentError, "'0' is claimed by"),
        ([{**BLOCKS, "pattern": "5x1"}], MaskError, "fits none"),
        ([{**BLOCKS, "op_names": ["4"]}], ArgumentError, "it makes an output of the model"),
    ):
        manager = manager_of(model, pruners)
        with pytest.raises(error, match=match):
            next(steps_on_numbers(manager, sgd(model), 2))
        assert not model._forward_pre_hooks
        assert not any(isinstance(module, masks.Mask) for module in model.modules())
