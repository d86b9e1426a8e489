"""Replay plans of the zoo: prune, save, load, shrink a fresh model, and compare with what `prune` gave.

    python benchmarks/replay.py [--only PATTERN] [--seed N] [--write]

Every model is pruned by half on random tokens with masks that end before the row does, once after it ran. The fresh
model has other weights and never ran. `--write` puts the table into benchmarks/results/replay.md. Needs `make
zoo-setup`.
"""

import argparse
import fnmatch
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.zoo import zoo
from tests.zoo.replaying import Replay, replay

OUTPUT = Path(__file__).parent / "results" / "replay.md"
HEAD = """# Plans of the zoo, replayed

Each model is pruned by half and its plan saved; the plan is loaded, applied to a fresh model with other weights, and
that model loads the weights of the first. `python benchmarks/replay.py --write`, seed {seed}. The last column is the
largest difference of any output, relative to its largest value.

| model | form | attributes | hooks | tensors equal bit for bit | all else equal | outputs |
|---|---|---|---|---|---|---|
"""


def row(name: str, found: Replay) -> str:
    """A line of the table."""
    equal = f"{found.n_equal} of {found.n_tensors}"
    rest = "; ".join(found.differences) or "yes"
    return f"| {name} | {found.form} | {found.n_sizes} | {found.n_scales} | {equal} | {rest} | {found.error:.1e} |"


def main() -> int:
    """Replay all models that are asked for; gives the number of those that do not come back as they were."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="*", help="pattern of names, as 'transformers:*'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/replay.md")
    given = parser.parse_args()
    lines, n_failed = [], 0
    for name in (name for name in zoo.REPLAYED if fnmatch.fnmatch(name, given.only)):
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = replay(name, given.seed)
            line, is_same = row(name, found), found.is_same
        except Exception as error:  # one model that fails is a line of the table
            traceback.print_exc()
            line, is_same = f"| {name} | {type(error).__name__}: {str(error)[:160]} | | | | | |", False
        n_failed += not is_same
        lines.append(line)
        print(f"{line}  {time.perf_counter() - start:.0f} s", flush=True)
    if given.write:
        OUTPUT.write_text(HEAD.format(seed=given.seed) + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - n_failed} of {len(lines)} come back as they were")
    return n_failed


if __name__ == "__main__":
    sys.exit(bool(main()))
