"""Cut random networks at random and compare with the masked original, as often as wanted.

    python benchmarks/fuzz.py --count 5000 --seed 0

Each failure is printed with the network's description, which rebuilds it (`--describe`), and the run ends non-zero.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.oracle import Outcome, check_random_pruning
from tests.strategies import Description, RandomNetwork, example_input, has_mixing, random_description


def check(description: Description, kept_seed: int) -> Outcome:
    """Assert every invariant on one network; the same property as the test suite's."""
    inputs = (example_input(description),)
    return check_random_pruning(RandomNetwork(description), inputs, None, kept_seed, has_mixing(description))


def minimised(description: Description, fails: Callable[[Description], bool]) -> Description:
    """Drop blocks one by one while the network still fails."""
    index = 0
    while index < len(description["blocks"]):
        blocks = description["blocks"]
        smaller = {**description, "blocks": blocks[:index] + blocks[index + 1 :]}
        if _is_buildable(smaller) and fails(smaller):
            description = smaller
        else:
            index += 1
    return description


def _is_buildable(description: Description) -> bool:
    try:
        RandomNetwork(description)(example_input(description))
    except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError):
        return False
    return True


def run_failure(description: Description, kept_seed: int) -> Exception | None:
    """The exception that checking a network ends in, or None."""
    try:
        check(description, kept_seed)
    except Exception as error:
        return error
    return None


def _kind(error: Exception | None) -> tuple[str, str]:
    """What makes two failures the same: type and beginning of the message, where no numbers are yet."""
    return type(error).__name__, str(error)[:20]


def report_failure(seed: int, description: Description, error: Exception, minimises: bool) -> None:
    """Print what is needed to see the failure again."""
    print(f"\nFAILED seed {seed}: {type(error).__name__}: {str(error)[:400]}")
    frames = traceback.extract_tb(error.__traceback__)
    print(f"  raised at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}")
    print(f"  network   {json.dumps(description)}")
    if minimises:
        kind = _kind(error)
        small = minimised(description, lambda d: _kind(run_failure(d, seed)) == kind)
        print(f"  minimised {json.dumps(small)}")
    sys.stdout.flush()


def run(count: int, first_seed: int, minimises: bool) -> int:
    """Check networks `first_seed` to `first_seed + count - 1`, print a summary, and return the number of failures."""
    totals: Counter[str] = Counter()
    started = time.perf_counter()
    for index in range(count):
        seed = first_seed + index
        description = random_description(seed)
        try:
            outcome = check(description, seed)
        except Exception as error:
            totals["failed"] += 1
            report_failure(seed, description, error, minimises)
            continue
        totals["groups"] += outcome.n_groups
        totals["units"] += outcome.n_units
        totals["cut"] += outcome.n_cut
        totals["networks cut"] += outcome.n_cut > 0
        totals["mixed"] += has_mixing(description)
        totals["native" if outcome.is_native else "traced"] += 1
        if (index + 1) % 50 == 0:
            rate = (index + 1) / (time.perf_counter() - started)
            print(f"{index + 1}/{count} networks, {totals['failed']} failed, {rate:.1f}/s", flush=True)
    print_summary(count, totals, time.perf_counter() - started)
    return totals["failed"]


def print_summary(count: int, totals: Counter[str], seconds: float) -> None:
    """Print how much was checked."""
    print(
        f"\n{count} networks in {seconds:.0f} s: {count - totals['failed']} equal, {totals['failed']} failed\n"
        f"{totals['groups']} groups, {totals['units']} units, {totals['cut']} of them cut, "
        f"in {totals['networks cut']} networks\n"
        f"{totals['mixed']} networks mix a channel axis (compared by the library's verification alone)\n"
        f"{totals['native']} native, {totals['traced']} traced"
    )


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="number of networks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first network; the next ones count up")
    parser.add_argument("--minimise", action="store_true", help="drop blocks of a failing network while it still fails")
    parser.add_argument("--describe", metavar="JSON", help="check one network given by its description, cut by --seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if options.describe:
        print(check(json.loads(options.describe), options.seed))
        return 0
    return 1 if run(options.count, options.seed, options.minimise) else 0


if __name__ == "__main__":
    sys.exit(main())
