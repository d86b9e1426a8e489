"""Training that shrinks its model on the way, beside masks alone and the dense model: whole time, and time of a step.

python benchmarks/shrinking.py --steps 300

Rounds are interleaved, so that all kinds see the same machine; reported are medians over rounds. The time of shrinking
itself (tracing aside, which both kinds do once) is part of the whole.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch.nn import functional

import torchshear
from examples.digits import DigitsNet

KINDS = ("dense", "masks", "shrinks")


def run(kind: str, n_steps: int, ratio: float, batch: int) -> dict[str, float]:
    """Train some steps and time them.

    Args:
        kind: one of `KINDS`.
        n_steps: steps of the optimizer; the schedule ends after a third of them.
        ratio: share of the channels that goes in the end, in four events behind the first.
        batch: images in a batch.

    Returns:
        Seconds of the whole training, and of the median step of the last third.
    """
    torch.manual_seed(0)
    model, images = DigitsNet().train(), torch.rand(batch, 1, 8, 8)
    labels = torch.randint(0, 10, (batch,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session: Any = None
    if kind != "dense":
        every = max(1, n_steps // 12)
        schedule = torchshear.schedules.AGP(start=0, end=4 * every, frequency=every)
        shrink_every = 1 if kind == "shrinks" else None
        options = {"schedule": schedule, "optimizer": optimizer, "shrink_every": shrink_every}
        session = torchshear.PruningSession(model, images[:2], ratio=ratio, **options)
        session.on_train_begin()
        session.on_epoch_begin(0)
    steps, started = [], time.perf_counter()
    for step in range(n_steps):
        began = time.perf_counter()
        if session is not None:
            session.on_step_begin(step)
        functional.cross_entropy((model if session is None else session.model)(images), labels).backward()
        if session is not None:
            session.on_before_optimizer_step()
        optimizer.step()
        if session is not None:
            session.on_after_optimizer_step()
        optimizer.zero_grad()
        if session is not None:
            session.on_step_end()
        steps.append(time.perf_counter() - began)
    return {"whole": time.perf_counter() - started, "step": statistics.median(steps[-n_steps // 3 :])}


def main() -> None:
    """Time all kinds, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(given.rounds):
        for kind in KINDS:
            found[kind].append(run(kind, given.steps, given.ratio, given.batch))
    medians = {
        kind: {what: statistics.median(one[what] for one in runs) for what in ("whole", "step")}
        for kind, runs in found.items()
    }
    for kind, times in medians.items():
        print(f"{kind:8} whole {times['whole']:7.2f} s   last steps {1e3 * times['step']:7.2f} ms")
    for what in ("whole", "step"):
        ratios = [one[what] / other[what] for one, other in zip(found["masks"], found["shrinks"], strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"masks / shrinks, {what}: {statistics.median(ratios):.2f} (rounds {shown})")


if __name__ == "__main__":
    main()
