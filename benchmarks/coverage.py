"""What the zoo of named architectures comes to: each captured, pruned by half, proved, trained a step and exported.

    python benchmarks/coverage.py [NAME ...] [--rival] [--jobs 2] [--limit 600] [--output FILE]
    python benchmarks/coverage.py --page FILE ...

Names are `torchvision:resnet18`, `timm:deit_tiny_patch16_224`, `transformers:bert`, the last with any model type of
Hugging Face; without any, the whole list runs. Each model has a process of its own, with a time limit. With --rival,
Torch-Pruning runs on each as well, set up as its own examples do: L1, 50 %, classifier ignored, no other hints. Results
are printed, and written as JSON; --page makes docs/coverage.md of such files.
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


def render(rows: list[dict[str, Any]], rival: dict[str, dict[str, Any]]) -> str:
    """The table of all results as a page, with reasons below it."""
    lines = [HEAD, *(_line(row, rival.get(row["name"])) for row in rows)]
    done = [row for row in rows if "failure" not in row]
    native = sum(row["form"].startswith("native") for row in done)
    both = [row for row in rows if row["name"] in rival]
    theirs = sum(rival[row["name"]].get("same_shapes") is True for row in both)
    lines += ["", f"{len(done)} of {len(rows)} verified, {native} of them native."]
    if both:
        lines += [f"Torch-Pruning gives a model that runs with the same output shapes for {theirs} of {len(both)}."]
    lines += ["", "## Why a model came back traced", ""]
    lines += [f"- `{row['name']}`: {row['form'].removeprefix('traced: ')}" for row in done if "traced" in row["form"]]
    lines += ["", "## Why more than 60 % of the parameters are left", ""]
    lines += [f"- `{row['name']}`: {_whole(row)}" for row in done if row["params_left"] > 0.6] or ["Nowhere."]
    failed = [f"- `{row['name']}`: {row['failure']}" for row in rows if "failure" in row]
    failed += [f"- `{row['name']}`, ONNX: {row['onnx']}" for row in done if row["onnx"] is not True]
    failed += [f"- `{row['name']}`, training: {row['trained']}" for row in done if row["trained"] is not True]
    lines += ["", "## What failed", "", *(failed or ["Nothing."])]
    return "\n".join(lines) + "\n"


HEAD = """# Coverage

What `torchshear.prune(model, args, kwargs, ratio=0.5)` makes of named architectures with random weights, without a
hint. Made by `python benchmarks/coverage.py`; each model runs in a process of its own. *Between* is the share of the
parameters that lie between axes that can shrink; *error* is the largest relative difference from the masked network, in
float64 unless float32 stands beside it; *batches* are those that the ONNX file ran with in onnxruntime, *any length*
where token sequences may have another length in it as well; *seconds* are those of all of it, proof, training step and
ONNX included, two models at a time on two busy cores. Torch-Pruning runs as its own examples do (L1, 50 %, last
linear layer ignored); language models return their caches, as they come, to both. Detectors are pruned in parts, in
`tests/zoo/test_detection.py`. T5, BART and Whisper return the encoder's hidden states, which fixes their width.

| model | groups | between | parameters left | error | form | trains | ONNX | batches | seconds | Torch-Pruning |
|---|---|---|---|---|---|---|---|---|---|---|"""


def _line(row: dict[str, Any], rival: dict[str, Any] | None) -> str:
    theirs = "" if rival is None else _theirs(rival)
    if "failure" in row:
        return f"| {row['name']} | failed | | | | | | | | | {theirs} |"
    error = f"{row['max_error']:.0e}" + ("" if row["dtype"] == "torch.float64" else " (float32)")
    batches = ", ".join(map(str, row["batches"])) if isinstance(row.get("batches"), list) else "fixed"
    cells = (
        row["name"],
        row["groups"],
        f"{row['between']:.0%}",
        f"{row['params_left']:.0%}",
        error,
        row["form"].partition(":")[0],
        "yes" if row["trained"] is True else "no",
        "equal" if row["onnx"] is True else "no",
        batches + (", any length" if row.get("any_length") else ""),
        row["seconds"],
        theirs,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _theirs(row: dict[str, Any]) -> str:
    if "failure" in row:
        return row["failure"].partition(":")[0]
    return f"{row['params_left']:.0%} left" if row["same_shapes"] else "other output shapes"


def _whole(row: dict[str, Any]) -> str:
    reasons = dict.fromkeys(reason.partition(":")[0] for reason in row["refused"].values())
    return f"{row['params_left']:.0%} left, {row['between']:.0%} between; " + "; ".join(list(reasons)[:4])


def main() -> None:
    """Run the names given, or the whole list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rival", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--page", type=Path, nargs="+", help="make docs/coverage.md of these JSON files and end")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(MARK + json.dumps(run_one(options.names[0], options.rival)))
        return
    if options.page:
        found = [row for file in options.page for row in json.loads(file.read_text())]
        rival = {row["name"]: row for row in found if row.get("rival")}
        own = {row["name"]: row for row in found if not row.get("rival")}
        order = [name for name in zoo.NAMES if name in own] + sorted(own.keys() - set(zoo.NAMES))
        (ROOT / "docs" / "coverage.md").write_text(render([own[name] for name in order], rival))
        return
    names = options.names or list(zoo.NAMES)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda name: run_apart(name, options.rival, options.limit), names):
            rows.append(row | ({"rival": True} if options.rival else {}))
            print(json.dumps(row), flush=True)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
