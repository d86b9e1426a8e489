"""A language model, cut and then compensated: the third network of `compensation.py`, scored by its perplexity.

Beside the library's criteria stand Wanda-sp and FLAP (An et al., AAAI 2024, arXiv:2312.11983), which cut heads and
feed-forward units by what their readers make of them and fold the means of what is gone into biases, and
Torch-Pruning: the best of six settings (norm or Taylor; ranked in each layer, over all, or over alike ones), told by
the text that is held out, after the cut and after 200 steps of training on the text.
"""

import copy
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.dependency import ChannelGroup
from torchshear.pruners import unit_sums

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from language_model import BATCH, LENGTH, STEPS, LanguageModel, fit, load_text, perplexity, sequences, trained

LEFTS: Final = (0.5, 0.25)
INSIDE: Final = ("heads", "ffn")  # the stream stays whole
N_TUNED: Final = 200  # steps of training behind Torch-Pruning
Sums = Mapping[str, tuple[Tensor, Tensor]]  # weight -> means and mean squares of its inputs


def measure_text(seed: int, score: Callable[[str, str, float], None]) -> None:
    """Train a language model, and score it after each cut and compensation."""
    folder = Path("out/language_model")
    folder.mkdir(parents=True, exist_ok=True)
    learnt, held = load_text()
    model = trained(LanguageModel, learnt, STEPS, seed, folder)
    batches = list(sequences(learnt, 256, torch.Generator().manual_seed(1000 + seed))[:, :-1].split(BATCH))
    score("dense", "", perplexity(model, held))
    graph = torchshear.trace(model, batches[0][:2])
    groups = torchshear.analyze(graph)
    grams = torchshear.collect(graph, batches, batches=len(batches), criteria="reconstruction", progress=False)
    ways = _ways(model, batches)
    for left in LEFTS:
        for name, asked in ways.items():
            plan = torchshear.plan(groups, statistics=grams, target_macs=left, **asked)
            small, row = torchshear.shrink(model, plan), f"{left:.0%} of the MACs left, {name}"
            score(row, "after the cut", perplexity(small, held))
            for method, column in (("means", "means folded in"), ("refit", "refit, 256 sequences")):
                ready = torchshear.compensate(model, small, plan, batches, method, batches=len(batches), progress=False)
                score(row, column, perplexity(ready, held))
        if importlib.util.find_spec("torch_pruning") is not None:
            row = f"{left:.0%} of the MACs left, Torch-Pruning, best of six"
            small = min(_rivals(model, left, learnt), key=lambda one: perplexity(one, held))
            score(row, "after the cut", perplexity(small, held))
            fit(small, learnt, N_TUNED, seed + 1, 1e-3)
            score(row, f"{N_TUNED} steps on the text", perplexity(small, held))


def _ways(model: nn.Module, batches: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `torchshear.plan`."""
    sums = _sums_of_inputs(model, batches)
    reconstruction = {"criterion": "reconstruction", "scope": "global"}
    return {
        "l1": {"criterion": "l1"},
        "random": {"criterion": "random"},
        "reconstruction": {"criterion": "reconstruction"},
        "reconstruction, global": reconstruction,
        "reconstruction, global, inside": {**reconstruction, "roles": INSIDE},
        "Wanda-sp": {"criterion": _wanda_sp(sums), "roles": INSIDE},
        "FLAP": {"criterion": _flap(sums), "scope": "global", "normalize": "none", "roles": INSIDE},
    }


@torch.no_grad()
def _sums_of_inputs(model: nn.Module, batches: list[Tensor]) -> Sums:
    """Means and mean squares of what the last layer of each attention and feed-forward network reads."""
    found: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0]))
        for name, layer in model.named_modules()
        if name.endswith((".mix", ".down"))
    ]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    read = {name: torch.cat(parts).flatten(0, 1).double() for name, parts in found.items()}
    return {f"{name}.weight": (values.mean(0), values.square().mean(0)) for name, values in read.items()}


def _wanda_sp(sums: Sums) -> Callable[..., Tensor]:
    """Score a unit by the weights that read it, each times the norm of its input."""

    def scores(group: ChannelGroup, weights: Mapping[str, Tensor], _statistics: object) -> Tensor:
        sized = {name: weights[name].abs().double() * squares.sqrt() for name, (_, squares) in sums.items()}
        return unit_sums(group, sized, lambda size: size, frozenset({"in"}))

    return scores


def _flap(sums: Sums) -> Callable[..., Tensor]:
    """Score a unit by the weights that read it, squared, times the variance of their input; then standardise.

    A head counts for the mean over its width.
    """

    def scores(group: ChannelGroup, weights: Mapping[str, Tensor], _statistics: object) -> Tensor:
        sized = {name: weights[name].square().double() * (two - one**2) for name, (one, two) in sums.items()}
        plain = unit_sums(group, sized, lambda size: size, frozenset({"in"}))
        return (plain - plain.mean()) / plain.std()

    return scores


def _rivals(model: nn.Module, left: float, codes: Tensor) -> list[nn.Module]:
    """Torch-Pruning's largest networks within a share of the MACs, in six settings."""
    import torch_pruning as tp

    scopes = ({}, {"global_pruning": True}, {"global_pruning": True, "isomorphic": True})
    makers = (lambda: tp.importance.GroupMagnitudeImportance(p=2), tp.importance.GroupTaylorImportance)
    dense, found, gradients = _macs(model), [], _gradients(model, codes)
    for scope in scopes:
        for importance in makers:
            low, high, best = 0.0, 0.95, None
            for _ in range(8):
                ratio = (low + high) / 2
                small = _cut_by_rival(model, importance(), ratio, scope, gradients)
                if _macs(small) <= left * dense:
                    high, best = ratio, small
                else:
                    low = ratio
            found += [] if best is None else [best]
    return found


def _gradients(model: nn.Module, codes: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss on 32 sequences, and their next characters, by name."""
    drawn = sequences(codes, BATCH, torch.Generator().manual_seed(0))
    loss = functional.cross_entropy(model(drawn[:, :-1]).flatten(0, 1), drawn[:, 1:].flatten())
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def _cut_by_rival(
    model: nn.Module, importance: Any, ratio: float, scope: dict[str, Any], gradients: dict[str, Tensor]
) -> nn.Module:
    """One step of Torch-Pruning, on a copy: the stream, the width of heads, and feed-forward networks."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    for name, weight in small.named_parameters():
        weight.grad = gradients[name].clone()
    heads = {layer: block.n_heads for block in small.blocks for layer in (block.query, block.key, block.value)}
    pruner = tp.pruner.BasePruner(
        small,
        torch.zeros(2, LENGTH, dtype=torch.long),
        importance,
        pruning_ratio=ratio,
        ignored_layers=[small.classifier],
        num_heads=heads,
        unwrapped_parameters=[(small.places, 1)],
        **scope,
    )
    pruner.step()
    small.zero_grad(set_to_none=True)
    return small


def _macs(model: nn.Module) -> int:
    """Multiply-accumulate operations of a character: those of layers, and of attention over a whole sequence."""
    layers = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    return layers + LENGTH * sum(block.query.out_features + block.value.out_features for block in model.blocks)
