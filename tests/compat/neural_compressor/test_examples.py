"""The examples of Neural Compressor's pages, with another line of imports and nothing else changed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.compat.neural_compressor.loops import Classifier, batches, classifier, sgd, trained
from torchshear.compat.neural_compressor import (
    WeightPruningConfig,
    parse_auto_slim_config,
    prepare_compression,
    prepare_pruning,
)
from torchshear.errors import ArgumentError
from torchshear.pruners import masks

# The template of the first page: the second pruner says neither steps nor share, which its defaults give.
TEMPLATE: list[dict[str, Any]] = [
    {
        "target_sparsity": 0.9, "pruning_type": "snip_momentum", "pattern": "4x1", "op_names": ["layer1.*"],
        "excluded_op_names": ["layer3.*"], "start_step": 0, "end_step": 10, "pruning_scope": "global",
        "pruning_frequency": 1, "min_sparsity_ratio_per_op": 0.0, "max_sparsity_ratio_per_op": 0.98,
        "sparsity_decay_type": "exp", "pruning_op_types": ["Conv", "Linear"],
    },
    {"op_names": ["layer3.*"], "pruning_type": "snip_momentum_progressive"},
]  # fmt: skip
# Two pruners that a common part complements.
COMPLEMENTED: list[dict[str, Any]] = [
    {"op_names": ["layer1.*"], "pattern": "4x1"}, {"op_names": ["layer2.*"], "pattern": "1x1", "target_sparsity": 0.5}
]  # fmt: skip
COMMON: dict[str, Any] = {"target_sparsity": 0.8, "excluded_op_names": ["classifier"]}
# The configs of the second page, with a key as it is written there.
SECOND: list[dict[str, Any]] = [
    {
        "op_names": ["layer1.*"], "start_step": 1, "end_step": 10000, "excluded_op_names": [".*embeddings*"],
        "target_sparsity": 0.9, "pruning_frequence": 250, "pattern": "4x1",
    },
    {**TEMPLATE[0], "op_names": ["layer2.*"], "start_step": 1},
]  # fmt: skip
FREE: list[dict[str, Any]] = [
    {
        "pruning_type": "retrain_free", "pruning_scope": "global", "op_names": [".fc", ".mlp"], "start_step": 1,
        "end_step": 300, "excluded_op_names": ["lm_head"], "target_sparsity": 0.2, "pruning_frequency": 50,
        "pattern": "channelx1",
    }
]  # fmt: skip


def zeros(weight: Tensor) -> float:
    return float((weight == 0).double().mean())


def block_zeros(weight: Tensor) -> Tensor:
    """Whether blocks of four outputs by one input are zero, and that none is so in part."""
    grid = weight.detach().reshape(-1, 4, weight.shape[1]) == 0
    assert bool((grid.all(1) == grid.any(1)).all())
    return grid.all(1)


def test_template_with_hooks() -> None:
    manager = trained(TEMPLATE)
    model = manager.model
    assert isinstance(model, Classifier)
    assert list(model.state_dict()) == list(Classifier().state_dict())
    share = torch.cat([block_zeros(model.layer1[place].weight).flatten() for place in (0, 2)]).double().mean()
    assert float(share) == pytest.approx(0.9, abs=1 / 256)
    assert float(block_zeros(model.layer3[0].weight).double().mean()) == pytest.approx(0.9, abs=1 / 96)
    assert zeros(model.layer2[0].weight) == zeros(model.classifier.weight) == 0
    result = manager.finish()
    assert result.verification.max_error < 1e-6
    x = batches(40, 1)[0]
    torch.testing.assert_close(result.model.eval()(**x).logits, model.eval()(**x).logits, rtol=1e-4, atol=1e-5)


def test_pruners_that_a_common_part_complements() -> None:
    manager = trained(COMPLEMENTED, COMMON)
    model = manager.model
    share = torch.cat([block_zeros(model.layer1[place].weight).flatten() for place in (0, 2)]).double().mean()
    assert float(share) == pytest.approx(0.8, abs=1 / 256)
    assert zeros(model.layer2[0].weight) == 0.5
    assert manager.finish().history.note == ""


def test_second_page_in_both_forms() -> None:
    """Without hooks, by an optimizer that knows of it, it is what it is with them."""
    hooked = trained(SECOND, n_epochs=2)
    model = classifier()
    optimizer = sgd(model)
    config = WeightPruningConfig(SECOND)
    manager = prepare_pruning(config, model, optimizer)  # in this order there; in later versions model, config
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(2):
        model.train()
        for batch in batches():
            outputs = model(**batch)
            loss = outputs.loss
            loss.backward()
            optimizer.step()
            decay.step()
            model.zero_grad()
        model.eval()
        before = masks.applied_masks(model).tensors
        model(**batches(30, 1)[0])  # an evaluation begins no step, at which something would go
        assert all(torch.equal(mask, before[name]) for name, mask in masks.applied_masks(model).tensors.items())
    result = manager.finish()
    for (name, one), (_, other) in zip(model.named_parameters(), hooked.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert float(block_zeros(model.layer2[0].weight).double().mean()) == pytest.approx(0.9, abs=1 / 96)
    assert zeros(model.layer1[0].weight) == 0  # its second event would come at step 251
    assert result.history.note.startswith("target not reached: training ended before")
    assert not model._forward_pre_hooks
    assert not result.model._forward_pre_hooks
    optimizer.step()  # hooks of the optimizer have gone with the training


class Block(nn.Module):
    """A block as language models have it: an attention-free mixer, and two layers with more features between them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.blocks = nn.Embedding(20, 16), nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(16, 5)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embeddings(input_ids).mean(1)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_channels_without_training_by_batches_alone() -> None:
    """Words that fit no whole name are searched for, as there; what a layer reads goes with the layer that makes it."""
    torch.manual_seed(0)
    model = Language()
    before = copy.deepcopy(model)
    configs = WeightPruningConfig(FREE, target_sparsity=0.2, pattern="channelx1", start_step=1, end_step=300)
    pruning = prepare_pruning(model, configs, dataloader=batches(0, 12))
    result = pruning.finish()
    assert [block.fc1.out_features + block.fc2.in_features for block in result.model.blocks] != [80, 80]
    kept = sum(block.fc1.out_features for block in result.model.blocks)
    assert kept == 64  # of 80
    assert result.model.lm_head.in_features == 16
    words = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]
    expected = torchshear.prune(
        before, kwargs=batches(0, 1)[0], config=[{**FREE[0], "op_names": words, "end_step": 1}],
        data=batches(0, 12), batches=12, loss_fn=lambda output, _: output["loss"],
    )  # fmt: skip
    for name, units in expected.plan.kept.items():
        assert units.tolist() == result.plan.kept[name].tolist()
    for place, block in enumerate(model.blocks):
        gone = sorted(set(range(40)) - set(result.plan.kept[f"blocks.{place}.fc1.weight[0]"].tolist()))
        assert bool((block.fc2.weight[:, gone] == 0).all())
        assert bool((block.fc1.weight[gone] == 0).all())


class Attention(nn.Module):
    """Four heads, whose number is nowhere written down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (-1, 4)).transpose(1, 2) for one in (self.first, self.second, self.third))
        return self.last(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Words(nn.Module):
    """Two blocks of attention and a feed-forward network, with names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 5)
        self.a, self.c = Attention(), Attention()
        self.b1, self.b2, self.d1, self.d2 = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 40), nn.Linear(40, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(4)])

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.table(input_ids)
        for number, (mix, one, two) in enumerate(((self.a, self.b1, self.b2), (self.c, self.d1, self.d2))):
            x = x + mix(self.norms[2 * number](x))
            x = x + two(torch.relu(one(self.norms[2 * number + 1](x))))
        logits = self.head(x.mean(1))
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def test_hidden_layers_and_heads_are_found_without_names_and_inputs() -> None:
    torch.manual_seed(0)
    model = Words()
    pruning_configs = []
    auto_configs = parse_auto_slim_config(
        model, ffn2_sparsity=0.2, mha_sparsity=0, pruning_scope="global", pruning_type="retrain_free"
    )
    pruning_configs += auto_configs
    assert pruning_configs == [
        {"op_names": ["b2", "d2"], "pattern": "channelx1", "target_sparsity": 0.2, "pruning_scope": "global",
         "pruning_type": "retrain_free"}
    ]  # fmt: skip
    pruning = prepare_pruning(model, WeightPruningConfig(pruning_configs), dataloader=batches(0, 4))
    small = pruning.finish().model
    assert small.b1.out_features + small.d1.out_features == small.b2.in_features + small.d2.in_features == 64
    both = parse_auto_slim_config(Words(), batches(0, 1), 0.5, 0.5, pruning_scope="local")
    assert [one["op_names"] for one in both][1] == [
        "a.first", "a.second", "a.third", "c.first", "c.second", "c.third"
    ]  # fmt: skip
    torch.manual_seed(0)
    model = Words()
    manager = prepare_compression(model, WeightPruningConfig(both, start_step=1, end_step=5))
    callbacks, optimizer = manager.callbacks, sgd(model)
    callbacks.on_train_begin()
    for step, batch in enumerate(batches()):
        callbacks.on_step_begin(step)
        model(**batch)["loss"].backward()
        callbacks.on_before_optimizer_step()
        optimizer.step()
        callbacks.on_after_optimizer_step()
        model.zero_grad()
    callbacks.on_train_end()
    small = manager.finish().model
    assert (small.a.first.out_features, small.c.last.in_features, small.b1.out_features) == (8, 8, 20)
    for shares, match in (((0, 0), "are 0"), ((1.0, 0), "ffn2_sparsity=1.0"), ((0, "a"), "mha_sparsity='a'")):
        with pytest.raises(ArgumentError, match=match):
            parse_auto_slim_config(Words(), None, *shares)
    with pytest.raises(ArgumentError, match="no heads"):
        parse_auto_slim_config(Classifier(), batches(0, 1), mha_sparsity=0.5)


def test_hooks_that_are_left_out_or_come_as_well() -> None:
    """The loop with all hooks, and the one with as few as the pages show, make the same steps."""
    few = trained(TEMPLATE)
    model = classifier()
    optimizer, manager = sgd(model), prepare_compression(model, [WeightPruningConfig(TEMPLATE)])
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    callbacks = manager.callbacks
    callbacks.on_train_begin()
    for epoch in range(2):
        model.train()
        callbacks.on_epoch_begin(epoch)
        for step, batch in enumerate(batches()):
            callbacks.on_step_begin(step)
            output = model(**batch)
            loss = callbacks.on_after_compute_loss(batch, output, output.loss)
            loss.backward()
            callbacks.on_before_optimizer_step()
            optimizer.step()
            if epoch:  # a hook that one of the pages leaves out
                callbacks.on_after_optimizer_step()
            decay.step()
            model.zero_grad()
            callbacks.on_step_end()
        callbacks.on_before_eval()
        model.eval()
        model(**batches(30, 1)[0])
        callbacks.on_after_eval()
        callbacks.on_epoch_end()
    callbacks.on_train_end()
    for (name, one), (_, other) in zip(model.named_parameters(), few.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert [one.step for one in manager.session.history.renewals] == list(range(11))


def test_first_call_in_the_loop_is_the_example() -> None:
    """Calls before and copies of the model begin nothing; masks lie on it before the first batch is computed."""
    model = classifier()
    config = WeightPruningConfig([{**TEMPLATE[0], "pruning_type": "magnitude", "end_step": 0}])
    manager = prepare_compression(model, config)
    model(**batches(30, 1)[0])
    manager.callbacks.on_train_begin()
    model(**batches(30, 1)[0])
    averaged = copy.deepcopy(model)
    manager.callbacks.on_step_begin(0)
    averaged(**batches(30, 1)[0])
    assert not any(isinstance(module, masks.Mask) for module in [*model.modules(), *averaged.modules()])
    model(**batches(0, 1)[0])
    share = torch.cat([block_zeros(model.layer1[place].weight).flatten() for place in (0, 2)]).double().mean()
    assert float(share) == pytest.approx(0.9, abs=1 / 256)
