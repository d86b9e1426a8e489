"""What the zoo of named architectures comes to: each captured, pruned by half, proved, trained a step and exported.

    python benchmarks/coverage.py [NAME ...] [--rival] [--jobs 2] [--limit 600] [--output benchmarks/results]

Names are `torchvision:resnet18`, `timm:deit_tiny_patch16_224`, `transformers:bert`; without any, the whole list runs.
Each model has a process of its own, with a time limit. With --rival, Torch-Pruning runs on each as well, set up as its
own examples do: L1, 50 %, classifier ignored, no other hints. Results go to coverage.json, and with all of the list to
docs/coverage.md.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.zoo import zoo  # noqa: E402

MARK = "result: "


def run_one(name: str, rival: bool) -> dict[str, Any]:
    """Everything about one model, in this process."""
    from benchmarks.coverage_of_one import of_rival, of_torchshear

    return of_rival(name) if rival else of_torchshear(name)


def run_apart(name: str, rival: bool, limit: int) -> dict[str, Any]:
    """Run one model in a process of its own; one that ends badly or late is a result too."""
    command = [sys.executable, "-W", "ignore", __file__, name, "--here", *(["--rival"] if rival else [])]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "failure": f"not done after {limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"name": name, "failure": f"the process ended with {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return found | {"wall_s": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Run the names given, or the whole list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rival", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(MARK + json.dumps(run_one(options.names[0], options.rival)))
        return
    names = options.names or list(zoo.NAMES)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda name: run_apart(name, options.rival, options.limit), names):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
