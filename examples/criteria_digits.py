"""Every criterion at equal MACs on real digits: a CNN and a ViT, beside Torch-Pruning, random units and narrower nets.

python examples/criteria_digits.py [--models cnn vit] [--seeds 0 1 2 3 4] [--left 0.75 0.5 0.25] [--fast]

For each seed a network is trained, cut to a share of its MACs by each criterion, and scored: right after the cut, with
batch norms estimated anew, and after one epoch. Results are written as they come; what is there is not done again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from criteria_digits_table import draw, markdown, table
from digits import BATCH, Digits, DigitsNet, accuracy, fit, load_data
from digits_vit import DigitsViT
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import torchshear
from torchshear.pruners import random_criterion, registered_criteria

try:
    import torch_pruning as tp
except ImportError:  # the extra "bench"; its rows are left away
    tp = None

N_STATISTICS = 8  # batches that criteria look at
NARROWER = "narrower, trained as long"
RIVALS = {
    "cnn": [f"Torch-Pruning {label}" for label in ("L1", "L2", "Taylor", "BN scale")],
    "vit": [f"Torch-Pruning {label}" for label in ("L1", "L2", "Taylor")],
}
GLOBAL = ("l1", "lamp", "bn_scale", "taylor", "group_fisher")  # ranked over all groups as well
console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of network, how it is trained from scratch, and the learning rate of the epoch after a cut.

    That rate is one for all methods: of 1e-4, 3e-4, 1e-3 and 3e-3 the one with which networks cut by `l1` did best.
    """

    build: Callable[[], nn.Module]
    n_epochs: int
    learning_rate: float
    tuning_rate: float


@dataclass(frozen=True, slots=True)
class Row:
    """One network that was cut.

    Attributes:
        model: "cnn" or "vit".
        seed: of the training.
        left: share of the MACs that was asked to be left.
        method: criterion, with its scope if it is not local; or a control or a rival.
        macs: share that is left.
        after_cut: test accuracy right after the cut.
        compensated: with batch norms estimated anew; None where there are none.
        tuned: after one epoch.
        note: why there is no result, or "".
    """

    model: str
    seed: int
    left: float
    method: str
    macs: float | None = None
    after_cut: float | None = None
    compensated: float | None = None
    tuned: float | None = None
    note: str = ""


KINDS = {
    "cnn": Kind(DigitsNet, 7, 3e-3, 3e-4),
    "vit": Kind(DigitsViT, 60, 2e-3, 1e-3),
}
FAST = {
    "cnn": Kind(lambda: DigitsNet((8, 16, 32), n_blocks=1), 1, 3e-3, 3e-4),
    "vit": Kind(lambda: DigitsViT(24, 3, 1), 1, 2e-3, 1e-3),
}


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--left", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--fast", action="store_true", help="small networks, hardly trained")
    parser.add_argument("--output", type=Path, default=Path("out/criteria"), help="folder for the results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the same figures whatever the number of cores
    for name in options.models:
        for seed in options.seeds:
            file = options.output / f"{name}-{seed}.json"
            known = json.loads(file.read_text("utf-8")) if file.exists() else []
            done = {(row["left"], row["method"]) for row in known}
            started = time.perf_counter()
            kind = (FAST if options.fast else KINDS)[name]
            for row in study(name, kind, seed, Wanted(tuple(options.left), done)):
                known.append(asdict(row))
                draft = file.with_suffix(".part")
                draft.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                draft.replace(file)
            console.print(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s")
    rows = [row for file in sorted(options.output.glob("*-*.json")) for row in json.loads(file.read_text("utf-8"))]
    for name in sorted({row["model"] for row in rows}):
        console.print(table(name, rows))
        (options.output / f"{name}.md").write_text(markdown(name, rows), encoding="utf-8")
    draw(options.output / "criteria.png", rows)
    console.print(f"Everything is in {options.output}.")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Shares of MACs that are to be left, and (share, method) pairs that there are already."""

    lefts: tuple[float, ...]
    done: set[tuple[float, str]]

    def lacks(self, left: float, method: str) -> bool:
        """Whether there is no such result yet."""
        return (left, method) not in self.done


def study(name: str, kind: Kind, seed: int, wanted: Wanted) -> Iterator[Row]:
    """Train one network, and cut it in every way that is wanted."""
    expected = [name for name, _, _ in methods(seed)] + [NARROWER, *(RIVALS[name] if tp is not None else ())]
    if not any(wanted.lacks(left, method) for left in wanted.lefts for method in expected):
        return
    data = load_data(seed)
    torch.manual_seed(seed)
    model = kind.build()
    fit(model, data, kind.n_epochs, kind.learning_rate, seed)
    if wanted.lacks(1.0, "dense"):
        yield Row(name, seed, 1.0, "dense", 1.0, test(model, data), None, test(tuned(model, kind, data, seed), data))
    images = (data.test_images[:2],)
    groups = torchshear.analyze(torchshear.trace(model, images))
    loader = batches(data)
    statistics = torchshear.collect(groups, loader, functional.cross_entropy, len(loader), progress=False)
    for left in wanted.lefts:
        for method, criterion, scope in methods(seed):
            if not wanted.lacks(left, method):
                continue
            try:
                plan = torchshear.plan(groups, criterion, statistics=statistics, scope=scope, target_macs=left)
            except torchshear.TorchshearError as error:
                yield Row(name, seed, left, method, note=str(error))
                continue
            small = torchshear.shrink(model, plan)
            torchshear.verify(model, small, plan, args=images)
            yield scored(Row(name, seed, left, method), kind, model, small, data)
        if wanted.lacks(left, NARROWER):
            uniform = torchshear.plan(groups, lambda group, *_: -torch.arange(group.width).double(), target_macs=left)
            yield narrower(Row(name, seed, left, NARROWER), kind, uniform, data)
        for method in RIVALS[name] if tp is not None else ():
            if wanted.lacks(left, method):
                yield rival_row(Row(name, seed, left, method), kind, model, data)


def methods(seed: int) -> Iterator[tuple[str, object, str]]:
    """Label, criterion and scope of everything that is compared."""
    for name in registered_criteria():
        yield name, random_criterion(seed) if name == "random" else name, "local"
    for name in GLOBAL:
        yield f"{name}, global", name, "global"


def batches(data: Digits) -> list[tuple[Tensor, Tensor]]:
    """The first training images, for criteria and for batch norms."""
    chosen = slice(0, N_STATISTICS * BATCH)
    return list(zip(data.train_images[chosen].split(BATCH), data.train_labels[chosen].split(BATCH), strict=True))


def scored(row: Row, kind: Kind, dense: nn.Module, small: nn.Module, data: Digits) -> Row:
    """Score a network that was cut."""
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    ready = torchshear.recalibrate(small, batches(data), N_STATISTICS, progress=False) if has_norms else small
    return replace(
        row,
        macs=macs(small, data) / macs(dense, data),
        after_cut=test(small, data),
        compensated=test(ready, data) if has_norms else None,
        tuned=test(tuned(ready, kind, data, row.seed), data),
    )


def narrower(row: Row, kind: Kind, plan: torchshear.PruningPlan, data: Digits) -> Row:
    """A network of the same widths for every method, trained from scratch as long as others in all."""
    torch.manual_seed(row.seed)
    fresh = kind.build()
    small = torchshear.shrink(fresh, plan)
    fit(small, data, kind.n_epochs + 1, kind.learning_rate, row.seed)
    share = macs(small, data) / macs(fresh, data)
    return replace(row, macs=share, tuned=test(small, data))


def tuned(model: nn.Module, kind: Kind, data: Digits, seed: int) -> nn.Module:
    """A copy after another epoch."""
    copied = copy.deepcopy(model)
    fit(copied, data, 1, kind.tuning_rate, seed + 1000)
    return copied


def test(model: nn.Module, data: Digits) -> float:
    """Test accuracy."""
    return accuracy(model.eval(), data.test_images, data.test_labels)


def macs(model: nn.Module, data: Digits) -> int:
    """Multiply-accumulate operations of one image, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(data.test_images[:1])
    return int(counter.get_total_flops()) // 2


# -- Torch-Pruning ------------------------------------------------------------------------------------------------


def rival_row(row: Row, kind: Kind, model: nn.Module, data: Digits) -> Row:
    """Torch-Pruning's result at the same MACs, with what its examples give by hand."""
    importances: dict[str, Callable[[], object]] = {
        "L1": lambda: tp.importance.MagnitudeImportance(p=1),
        "L2": lambda: tp.importance.MagnitudeImportance(p=2),
        "Taylor": tp.importance.TaylorImportance,
        "BN scale": tp.importance.BNScaleImportance,
    }
    try:
        small = rival(model, importances[row.method.removeprefix("Torch-Pruning ")], data, row.left)
    except Exception as error:  # whatever it raises is its result
        return replace(row, note=f"{type(error).__name__}: {error}")
    return scored(row, kind, model, small, data)


def rival(model: nn.Module, importance: Callable[[], object], data: Digits, left: float) -> nn.Module:
    """The largest network of Torch-Pruning's that keeps within a share of the MACs."""
    low, high, best = 0.0, 0.95, None
    dense = macs(model, data)
    for _ in range(8):
        ratio = (low + high) / 2
        small = cut_by_rival(model, importance(), data, ratio)
        if macs(small, data) <= left * dense:
            high, best = ratio, small
        else:
            low = ratio
    if best is None:
        raise ValueError(f"no ratio up to 0.95 leaves {left:.0%} of the MACs")
    return best


def cut_by_rival(model: nn.Module, importance: object, data: Digits, ratio: float) -> nn.Module:
    """One step of Torch-Pruning at a ratio, on a copy."""
    small = copy.deepcopy(model)
    for images, labels in batches(data) if isinstance(importance, tp.importance.TaylorImportance) else ():
        functional.cross_entropy(small(images), labels).backward()
    blocks = [block for block in small.modules() if hasattr(block, "qkv")]
    pruner = tp.pruner.BasePruner(
        small,
        data.test_images[:2],
        importance,
        pruning_ratio=ratio,
        ignored_layers=[small.get_submodule("classifier")],
        num_heads={block.qkv: block.n_heads for block in blocks},
        unwrapped_parameters=[(parameter, 2) for name, parameter in small.named_parameters() if name == "places"],
    )
    pruner.step()
    for block in blocks:
        block.head_dim = block.qkv.out_features // (3 * block.n_heads)
    small.zero_grad(set_to_none=True)
    return small


if __name__ == "__main__":
    main()
