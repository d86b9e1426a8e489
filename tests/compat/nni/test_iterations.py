"""NNI's iterative pruners that prune and fine-tune a copy by themselves."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.training.loops import images, perceptron, residual, vectors
from torchshear.compat.nni import AGPPruner, LinearPruner, LotteryTicketPruner
from torchshear.errors import ArgumentError

AGP = [0, 0.217, 0.390, 0.526, 0.627, 0.7, 0.749, 0.778, 0.794, 0.799, 0.8]  # of NNI 2.5, iterations 0 to 10
LEVEL = [{"sparsity": 0.8, "op_types": ["Linear"]}]
CONVS = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


def finetuner(batch: Any, seen: list[nn.Module], note: Any) -> Any:
    def tune(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(2):
            x, target = batch(step)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), target)
            if not step:
                seen.append(note(model))  # not of the run that only shows the example inputs
            loss.backward()
            optimizer.step()

    return tune


def zeros(model: nn.Module) -> list[int]:
    return [int((model[number].weight == 0).sum()) for number in (0, 2, 4)]


@pytest.mark.parametrize(("kind", "shares"), [(AGPPruner, AGP), (LinearPruner, [k / 10 * 0.8 for k in range(11)])])
def test_single_weights_go_by_the_schedule_of_a_copy(kind: Any, shares: list[float]) -> None:
    model, seen = perceptron(), []
    before = copy.deepcopy(model.state_dict())
    tune = finetuner(vectors, seen, zeros)
    pruner = kind(model, LEVEL, pruning_algorithm="level", total_iteration=10, finetuner=tune, log_dir="nowhere")
    assert pruner.compress() is not model
    exact = shares if kind is LinearPruner else [0.8 * (1 - (1 - k / 10) ** 3) for k in range(11)]
    assert seen == [[int(n * share + 1e-9) for n in (128, 192, 60)] for share in exact]
    assert [round(one.asked, 3) for one in pruner.history.renewals] == [round(share, 3) for share in shares]
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    number, best, kept, score, config = pruner.get_best_result()
    assert (number, score, config) == (10, None, LEVEL)
    assert [int((~kept[f"{place}.weight"]).sum()) for place in (0, 2, 4)] == [102, 153, 48]
    x = vectors(9)[0]  # rows and columns that masks have ended are gone
    assert best[0].weight.numel() < 128
    assert best(x).shape == (8, 5)


@pytest.mark.parametrize("speedup", [False, True])
def test_channels_are_shares_of_the_original_whether_it_shrinks_or_not(speedup: bool) -> None:
    """With speedup NNI counts weights that went with inputs as well, and ends at half of the weights."""
    model, seen, scores = residual(), [], []

    def evaluator(model: nn.Module) -> float:
        scores.append(float(model(images(0)[0]).detach().sum()))
        return scores[-1]

    tune = finetuner(
        images, seen, lambda model: (model.stem.weight.shape[0], model.stem.weight.flatten(1).any(1).sum())
    )
    given = {"dummy_input": images(0)[0]} if speedup else {}
    pruner = LinearPruner(
        model,
        CONVS,
        pruning_algorithm="l1",
        total_iteration=4,
        finetuner=tune,
        evaluator=evaluator,
        speedup=speedup,
        **given,
    )
    assert pruner.compress() is pruner.shrink().model
    widths = [8, 7, 6, 5, 4]
    assert [one[1] for one in seen] == widths
    assert [one[0] for one in seen] == (widths if speedup else [8] * 5)
    number, best, kept, score, _ = pruner.get_best_result()
    assert number == 4
    assert score == scores[-1]
    assert best.stem.out_channels == best.side.out_channels == 4
    assert best.last.out_channels == 6
    assert int(kept["stem.bias"].sum()) == 4
    assert pruner.shrink().verification.max_error < 1e-12
    assert pruner.resolved.ratios
    assert "50.0%" in pruner.table


def test_layers_with_ends_of_their_own_follow_their_own_schedules() -> None:
    config = [{"sparsity": 0.75, "op_names": ["0"]}, {"sparsity": 0.51, "op_names": ["2"]}]
    seen: list[Any] = []
    tune = finetuner(vectors, seen, lambda model: (model[0].out_features, model[2].out_features))
    options = {"pruning_algorithm": "l2", "total_iteration": 2, "speedup": True, "reset_weight": False}
    pruner = LotteryTicketPruner(perceptron(), config, finetuner=tune, **options)
    pruner.compress()
    assert seen == [(16 - 8, 12 - 3), (16 - 12, 12 - 6)]  # 1 - 0.49^(1/2) = 0.3 of 12; in proportion it were 0.34


@pytest.mark.parametrize("algorithm", ["level", "l1"])
def test_the_ticket_has_the_weights_of_the_start(algorithm: str) -> None:
    """Train, prune, rewind, n times; the ticket is then for the user to train."""
    model, seen = perceptron(), []
    start = copy.deepcopy(model.state_dict())
    tune = finetuner(vectors, seen, lambda model: model[0].weight.detach().clone())
    config = [{"sparsity": 0.75, "op_names": ["0"]}]
    pruner = LotteryTicketPruner(model, config, pruning_algorithm=algorithm, total_iteration=2, finetuner=tune)
    pruner.compress()
    assert len(seen) == 2
    assert torch.equal(seen[0], start["0.weight"])
    kept = seen[1] != 0
    assert torch.equal(seen[1][kept], start["0.weight"][kept])
    assert round(float(kept.double().mean()), 3) == 0.5
    _, ticket, masks, _, _ = pruner.get_best_result()
    if algorithm == "level":
        assert torch.equal(ticket[0].weight, start["0.weight"] * masks["0.weight"])
        assert int(masks["0.weight"].sum()) == 32
    else:
        rows = masks["0.weight"].any(1)
        assert torch.equal(ticket[0].weight, start["0.weight"][rows])
        assert int(rows.sum()) == 4


def test_without_anybody_who_calls_a_model_inputs_are_asked_for() -> None:
    with pytest.raises(ArgumentError, match="give example inputs as dummy_input="):
        AGPPruner(perceptron(), LEVEL, total_iteration=2).compress()
    pruner = AGPPruner(perceptron(), LEVEL, total_iteration=2, dummy_input=vectors(0)[0])
    pruner.compress()
    assert [int((~mask).sum()) for mask in pruner.masks.tensors.values()] == [102, 153, 48]


def test_data_for_what_looks_at_it() -> None:
    data = [(vectors(0)[0], vectors(0)[1])]
    config = [{"sparsity": 0.5, "op_names": ["0"]}]
    options = {"pruning_algorithm": "taylorfo", "total_iteration": 2, "dummy_input": vectors(0)[0]}
    with pytest.raises(ArgumentError, match="give batches as data="):
        AGPPruner(perceptron(), config, **options)
    with pytest.raises(ArgumentError, match="give a loss as loss_fn="):
        AGPPruner(perceptron(), config, data=data, **options)
    pruner = AGPPruner(perceptron(), config, data=data, loss_fn=functional.cross_entropy, batches=1, **options)
    hand = perceptron()
    functional.cross_entropy(hand(data[0][0]), data[0][1]).backward()
    scores = (hand[0].weight * hand[0].weight.grad).square().sum(1)
    first = set(scores.argsort()[: int(16 * 0.4375)].tolist())  # (1 - 1/8) / 2
    pruner.compress()
    gone = {c for c in range(16) if not pruner.masks.tensors["0.bias"][c]}
    assert len(gone) == 8
    assert first <= gone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total_iteration": 0}, "total_iteration must be"),
        ({"finetuner": 3}, "finetuner is int"),
        ({"evaluator": "acc"}, "evaluator is str"),
        ({"speedup": True}, "single weights make nothing smaller"),
        ({"speedup": 3}, "speedup=3"),
        ({"update": 1}, "no argument 'update'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        AGPPruner(perceptron(), LEVEL, **({"total_iteration": 2} | options))


def test_methods_of_the_other_form_say_so() -> None:
    pruner = AGPPruner(perceptron(), LEVEL, total_iteration=2, dummy_input=vectors(0)[0])
    with pytest.raises(ArgumentError, match="update_epoch\\(\\) goes with a model that you train"):
        pruner.update_epoch(0)
    ticket = LotteryTicketPruner(perceptron(), LEVEL, total_iteration=2, dummy_input=vectors(0)[0])
    with pytest.raises(ArgumentError, match="prune_iteration_start\\(\\) goes with"):
        ticket.prune_iteration_start()
