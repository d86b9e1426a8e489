"""Give the library inputs that are wrong in every way, as many as wanted; only its own errors are allowed.

    python benchmarks/fuzz_inputs.py --section files --count 20000 --seed 0
    python benchmarks/fuzz_inputs.py --section calls --count 80000 --seed 0

Files are damaged in places and in structure; calls of public functions and methods get one or two arguments that are
wrong themselves, or in what stands inside them.

Every failure is printed with the seed that makes it again (`--count 1 --seed N --kind NAME`), and the run ends with 1.
"""

import argparse
import atexit
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.blocks import RandomSource, Source
from tests.damaged_files import KINDS, check_damaged
from tests.hostile_calls import CALLS, Given, check_call

_MEMORY: Final = 4 << 30  # bytes that a run may take beyond what it has after its imports


@dataclass(frozen=True)
class Section:
    """A kind of input to the library.

    Attributes:
        kinds: names of what is tried in turn.
        check: takes such a name and a source of choices; gives whether the input was refused, and raises for anything
            but success and an error of the library.
    """

    kinds: Sequence[str]
    check: Callable[[str, Source], bool]


@cache
def _given() -> Given:
    """What valid calls are made with; files that wrong paths write lie beside it."""
    folder = tempfile.mkdtemp(prefix="calls-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chdir(folder)
    return Given.make(Path(folder))


SECTIONS: Final[Mapping[str, Section]] = {
    "files": Section(tuple(KINDS), lambda kind, source: check_damaged(kind, source).is_refused),
    "calls": Section(tuple(CALLS), lambda kind, source: check_call(kind, source, _given())),
}


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0


def check_one(section: Section, kind: str, seed: int, tally: Tally) -> None:
    """Try one input; print and count a failure."""
    started = time.perf_counter()
    try:
        is_refused = section.check(kind, RandomSource(random.Random(f"{kind} {seed}")))
        tally.counts["refused" if is_refused else "taken"] += 1
    except Exception as error:
        tally.counts["failed"] += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(f"\nFAILED {kind!r} seed {seed}: {type(error).__name__}: {str(error)[:300]}")
        print(f"  raised at {frame.filename}:{frame.lineno} in {frame.name}", flush=True)
    tally.slowest = max(tally.slowest, time.perf_counter() - started)


def run(section: Section, kinds: Sequence[str], count: int, first_seed: int) -> dict[str, Tally]:
    """Try inputs `first_seed` to `first_seed + count - 1`, of each kind in turn."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    for index in range(count):
        kind = kinds[index % len(kinds)]
        check_one(section, kind, first_seed + index, tallies[kind])
        if (index + 1) % 1000 == 0:
            failed = sum(tally.counts["failed"] for tally in tallies.values())
            print(f"{index + 1}/{count} inputs, {failed} failed", flush=True)
    return tallies


def table(tallies: Mapping[str, Tally]) -> str:
    """What came of all inputs, as Markdown."""
    lines = ["| input | tried | refused | taken | failed | slowest, s |", "|---|---|---|---|---|---|"]
    for kind, tally in tallies.items():
        counts = tally.counts
        lines.append(
            f"| {kind} | {counts.total():,} | {counts['refused']:,} | {counts['taken']:,} | {counts['failed']} | "
            f"{tally.slowest:.2f} |"
        )
    total = sum((tally.counts for tally in tallies.values()), Counter())
    slowest = max(tally.slowest for tally in tallies.values())
    lines.append(
        f"| all | {total.total():,} | {total['refused']:,} | {total['taken']:,} | {total['failed']} | {slowest:.2f} |"
    )
    return "\n".join(lines)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=list(SECTIONS), default="files", help="what kind of input is wrong")
    parser.add_argument("--kind", help="one kind of the section alone")
    parser.add_argument("--count", type=int, default=20_000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first input; the next ones count up")
    options = parser.parse_args()
    section = SECTIONS[options.section]
    kinds = [options.kind] if options.kind else section.kinds
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for kind in kinds:
        check_one(section, kind, -1, Tally())  # makes what all inputs start from
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    tallies = run(section, kinds, options.count, options.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(table(tallies))
    seconds = time.perf_counter() - started
    print(f"\n{options.count:,} inputs in {seconds:.0f} s; memory grew by {grown:.0f} MiB at most")
    return 1 if any(tally.counts["failed"] for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
